"""Checks on the longest examples that masked streams compute the same as the model."""

from dataclasses import replace

import torch
from accelerate.utils.memory import clear_device_cache
from transformers.utils import logging

from optimum_cap.data import CalibrationExample, batches
from optimum_cap.models import (
    ModelView,
    SiteUnit,
    Targets,
    Unit,
    positions_per_chunk,
    scored_logits,
    token_losses,
)
from optimum_cap.runtime import is_out_of_memory
from optimum_cap.scoring.chunks import out_of_memory_at_smallest_step
from optimum_cap.scoring.wavefront import Wavefront

logger = logging.get_logger(__name__)


def check_streams(view: ModelView, examples: list[CalibrationExample], prefix: int) -> int:
    """Return 1 if streams in which nothing is masked have the model's losses, otherwise 0.

    A stream starts in the middle of the model with recorded arguments, and its logits are computed
    position by position. This is equivalent to the model only if its layers depend on nothing else.
    Every run checks this for streams that start in each block of the first and last layer, on two
    examples, one of them padded.

    Args:
        view: The model, in evaluation mode.
        examples: The calibration examples.
        prefix: Number of tokens of their shared prefix that are computed once.

    Raises:
        MemoryError: Memory runs out with a single example and a single unit.
    """
    for count in (2, 1):
        try:
            return int(_same(view, examples, prefix, count))
        except Exception as error:
            if not is_out_of_memory(error):
                # A model may need arguments that are unknown in the middle.
                logger.warning(
                    f"{type(view.model).__name__} does not run from the middle: {error!r}"
                )
                return 0
            if count == 1:
                tokens = max(len(example.input_ids) for example in examples)
                raise out_of_memory_at_smallest_step(tokens) from error
        # After the handler: until it ends, the error keeps the recorded tensors in memory.
        clear_device_cache(garbage_collection=True)
    raise AssertionError("the last count returns or raises")


def _same(view: ModelView, examples: list[CalibrationExample], prefix: int, count: int) -> bool:
    longest = batches(examples, count)[0].positions
    most = max(1, positions_per_chunk(view.model, view.device) // count)
    chosen = [_with_fewer_scored(examples[position], most) for position in longest]
    [batch] = batches(chosen, count, prefix)
    wavefront = Wavefront(view, batch)
    expected = torch.cat([_loss_of_model(view, chosen[position]) for position in batch.positions])
    found = [wavefront.intact_losses()]
    found += wavefront.masked_losses(_units_of_nothing(view))
    tolerated = _tolerated(view.model.dtype)
    for losses in found:
        if not torch.allclose(losses, expected, rtol=tolerated, atol=tolerated, equal_nan=True):
            worst = int((losses - expected).abs().argmax())
            logger.warning(
                f"{type(view.model).__name__} computes something else when its layers run one at a "
                f"time: a loss of {float(losses[worst]):.4f} nats per token instead of "
                f"{float(expected[worst]):.4f} with nothing masked"
            )
            return False
    return True


def _units_of_nothing(view: ModelView) -> list[SiteUnit]:
    """Return units without channels, one per output module in the first and last layer."""
    ends = {view.sites[0].layer, view.sites[-1].layer}
    sites = {site.output_module: site for site in reversed(view.sites) if site.layer in ends}
    nothing = Unit(index=0, channels=(0, 0), region=())
    return [SiteUnit(site, nothing) for site in reversed(sites.values())]


def _with_fewer_scored(example: CalibrationExample, most: int) -> CalibrationExample:
    """Score only the last scored tokens of an example, to save memory for logits."""
    scored = torch.zeros_like(example.scored)
    scored[example.scored.nonzero()[-most:, 0]] = True
    return replace(example, scored=scored)


def _loss_of_model(view: ModelView, example: CalibrationExample) -> torch.Tensor:
    """Return the mean loss of an example in an ordinary forward pass, float64 `[1]`."""
    [batch] = batches([example], 1)
    logits, targets = scored_logits(view.model, batch), Targets.of(batch)
    return targets.example_means(token_losses(logits, targets.ids))


def _tolerated(dtype: torch.dtype) -> float:
    """Return the absolute (nats) and relative tolerance of losses: 0.001 in float32.

    In half precision, rounding differs between batch sizes: logits around 20 have steps of 1/8 in
    bfloat16. There, only gross errors are detected (0.35, and 0.12 in float16).
    """
    return float(4 * torch.finfo(dtype).eps ** 0.5)
