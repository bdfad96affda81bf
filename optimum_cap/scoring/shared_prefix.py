"""Whether the prefix that all examples share can be computed once."""

import torch
from accelerate.utils.memory import clear_device_cache
from transformers.utils import logging

from optimum_cap.data import CalibrationExample, batches, shared_prefix
from optimum_cap.models import ModelView, SiteUnit
from optimum_cap.runtime import is_out_of_memory
from optimum_cap.scoring.prefix import WORTHWHILE_SHARE, tolerance
from optimum_cap.scoring.wavefront import Wavefront

logger = logging.get_logger(__name__)


def prefix_to_share(view: ModelView, examples: list[CalibrationExample]) -> int:
    """Return how many tokens to compute once for all examples.

    That is their shared prefix where it saves time, otherwise 0. The prefix is computed once only
    if the model gives the same losses that way, which the longest examples show. Some models do
    not: they change their position encoding when a sequence gets long, or ignore the keys and
    values that they are given.
    """
    prefix = shared_prefix(examples)
    longest = max(len(example.input_ids) for example in examples)
    if len(examples) == 1 or prefix < WORTHWHILE_SHARE * longest:
        return 0
    try:
        same = _gives_the_same_losses(view, examples, prefix)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Not here: until the handler ends, the error keeps what was recorded in memory.
        same = None
    if same is None:
        clear_device_cache(garbage_collection=True)
        logger.warning_once(
            f"memory ran out with two examples: the {prefix} tokens that all examples begin with "
            "are computed for each example"
        )
    elif not same:
        logger.warning_once(
            f"{type(view.model).__name__} gives other losses when the {prefix} tokens that all "
            "examples begin with are computed once: they are computed for each example"
        )
    return prefix if same else 0


def _gives_the_same_losses(
    view: ModelView, examples: list[CalibrationExample], prefix: int
) -> bool:
    unit = next(SiteUnit(site, site.units[0]) for site in view.sites if site.kind == "attention")
    once, for_each = (
        _intact_and_masked(Wavefront(view, batches(examples, 2, length)[0]), unit)
        for length in (prefix, 0)
    )
    # Where the model is sure of an answer: the last bits of its logits, in float32.
    quantum = 16 * torch.finfo(torch.float32).eps
    return torch.allclose(
        once, for_each, rtol=tolerance(view.model.dtype), atol=quantum, equal_nan=True
    )


def _intact_and_masked(wavefront: Wavefront, unit: SiteUnit) -> torch.Tensor:
    return torch.stack([wavefront.intact_losses(), wavefront.masked_losses([unit])[0]])
