"""Decides whether a prefix shared by all examples can be computed once."""

import torch
from accelerate.utils.memory import clear_device_cache
from transformers.utils import logging

from optimum_cap.data import CalibrationExample, batches, shared_prefix
from optimum_cap.models import ModelView, SiteUnit, tolerance
from optimum_cap.runtime import is_out_of_memory
from optimum_cap.scoring.prefix import WORTHWHILE_SHARE
from optimum_cap.scoring.wavefront import Wavefront

logger = logging.get_logger(__name__)


def prefix_to_share(view: ModelView, examples: list[CalibrationExample]) -> int:
    """Return the number of tokens to compute once for all examples.

    This is the length of their shared prefix if sharing it saves time and does not change the
    losses of the longest examples, otherwise 0. Losses change for models that change their position
    encoding for long sequences, ignore cached keys and values, or keep recurrent states.
    """
    prefix = shared_prefix(examples)
    longest = max(len(example.input_ids) for example in examples)
    if len(examples) == 1 or prefix < WORTHWHILE_SHARE * longest:
        return 0
    reason = ""
    try:
        same = _gives_the_same_losses(view, examples, prefix)
    except Exception as error:
        if is_out_of_memory(error):
            # Cleared after the handler, because the error keeps recorded tensors in memory until it
            # ends.
            same = None
        else:  # caches of recurrent states may not continue after a prefix
            same, reason = False, f" ({error!r})"
    if same is None:
        clear_device_cache(garbage_collection=True)
        logger.warning_once(
            f"memory ran out with two examples: the shared prefix of {prefix} tokens is computed "
            "again for each example"
        )
    elif not same:
        logger.warning_once(
            f"{type(view.model).__name__} gives other losses, or none, if the shared prefix of "
            f"{prefix} tokens is computed once{reason}: it is computed again for each example"
        )
    return prefix if same else 0


def _gives_the_same_losses(
    view: ModelView, examples: list[CalibrationExample], prefix: int
) -> bool:
    unit = next(SiteUnit(site, site.units[0]) for site in view.sites if site.mixes_tokens)
    once, for_each = (
        _intact_and_masked(Wavefront(view, batches(examples, 2, length)[0]), unit)
        for length in (prefix, 0)
    )
    # Losses near zero, for answers the model is certain of, differ by rounding of the logits.
    rounding = 16 * torch.finfo(torch.float32).eps
    return torch.allclose(
        once, for_each, rtol=tolerance(view.model.dtype), atol=rounding, equal_nan=True
    )


def _intact_and_masked(wavefront: Wavefront, unit: SiteUnit) -> torch.Tensor:
    return torch.stack([wavefront.intact_losses(), wavefront.masked_losses([unit])[0]])
