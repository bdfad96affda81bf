"""Masked losses of all units, measured exactly at about half the cost of one pass per unit."""

from contextlib import nullcontext

from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.data import CalibrationExample, batches
from optimum_cap.models import (
    ModelView,
    SiteUnit,
    check_compilable,
    compiling,
    evaluation_mode,
    float32_on_cpu,
)
from optimum_cap.runtime import (
    MemoryLimit,
    ProcessGroup,
    budget_bytes,
    check_same_inputs,
    is_out_of_memory,
)
from optimum_cap.scoring.cache import ScoreCache, names
from optimum_cap.scoring.chunks import ExactScorer, agree_once, chunks_of
from optimum_cap.scoring.scores import UnitLosses
from optimum_cap.scoring.wavefront import prefix_to_share, streams_per_chunk, tokens_per_batch

logger = logging.get_logger(__name__)


def exact_losses(
    view: ModelView,
    examples: list[CalibrationExample],
    memory_budget: int | str = "auto",
    units: list[SiteUnit] | None = None,
    cache: ScoreCache | None = None,
    torch_compile: bool = False,
    memory_limit: MemoryLimit | None = None,
) -> UnitLosses:
    """Measure the loss with each unit of the sites masked.

    Args:
        view: A causal language model; it comes back as it was.
        examples: The calibration examples.
        memory_budget: Bytes for activations, text such as `"4GB"`, or `"auto"` for half of what is
            free.
        units: Which units to mask, in the order of the model; `None` masks all of the sites.
        cache: Keeps finished chunks of this model, so that a run that was stopped goes on where it
            was, with the same bytes as an undisturbed one.
        torch_compile: Compile the decoder layers, which pays in long runs on a GPU
            (`docs/performance.md`). A run that goes on then agrees with an undisturbed one up to
            rounding.
        memory_limit: What runs over this model have found out about its memory so far; this run
            adds to it.

    Returns:
        The losses, in the order of the units and of the examples. Processes that were launched
        together (`accelerate launch`, `torchrun`) share the work, so that all of them have to call
        this, and each returns all losses.

    Raises:
        ValueError: Experts are to be masked that compute in a way that is not known, the layers
            cannot be compiled, the units are in another order, or processes that were launched
            together were given different things.
        MemoryError: Memory runs out with a single example and a single unit.
        ConnectionError: Another process of the launch has stopped.
    """
    if torch_compile:
        check_compilable(view.model)
    units = view.units() if units is None else units
    _check_order(units)
    check_same_inputs(view.model, examples, names(units), memory_budget)
    view = view.with_sites({site.name for site, _ in units})
    with evaluation_mode(view.model), float32_on_cpu(view.model):
        # Of what is free when weights are widened.
        budget = agreed_budget(view.model, memory_budget, examples, units, cache)
        prefix = agree_once(
            "prefix",
            lambda: _prefix(view, examples),
            examples,
            units,
            cache,
        )
        tokens = tokens_per_batch(view.model, budget, prefix, view.sites)
        made = batches(examples, len(examples), prefix, tokens)
        chunks = [
            chunk
            for batch in made
            for chunk in chunks_of(batch, len(units), streams_per_chunk(view.model, batch, budget))
        ]
        process_group = ProcessGroup.current()
        run = ExactScorer(
            view, units, len(examples), cache, process_group, torch_compile, memory_limit
        )
        with compiling() if torch_compile else nullcontext():
            run.measure(chunks)
    return UnitLosses(units, run.intact, run.masked)


def _check_order(units: list[SiteUnit]) -> None:
    """Check that units can start one after the other as streams go up the layers."""
    places = [(site.layer, site.kind != "attention") for site, _ in units]
    for place, following, (site, unit) in zip(places, places[1:], units[1:], strict=False):
        if following < place:
            raise ValueError(
                f"unit {unit.index} of {site.name} comes after a unit of a later site: give units "
                "in the order of the model, as all_units does"
            )


def _prefix(
    view: ModelView,
    examples: list[CalibrationExample],
) -> int:
    """Tokens to compute once for all examples; none where there is no memory to try it."""
    try:
        return prefix_to_share(view, examples)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    clear_device_cache(garbage_collection=True)
    logger.warning_once(
        "memory ran out with two examples: what all examples begin with is computed for each"
    )
    return 0


def agreed_budget(
    model: PreTrainedModel,
    memory_budget: int | str,
    examples: list[CalibrationExample],
    units: list[SiteUnit],
    cache: ScoreCache | None,
) -> int:
    """Return the bytes that activations may take, the same for all processes and later runs."""
    if memory_budget != "auto":
        return budget_bytes(memory_budget, model)
    return agree_once("budget", lambda: budget_bytes("auto", model), examples, units, cache)
