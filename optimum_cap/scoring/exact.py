"""Exact losses with each unit masked, measured in cached chunks shared by processes."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from transformers.utils import logging

from optimum_cap.data import CalibrationExample, batches
from optimum_cap.models import (
    ModelView,
    SiteUnit,
    check_compilable,
    compiling,
    evaluation_mode,
    float32_on_cpu,
    have_own_tokens,
    is_offloaded,
)
from optimum_cap.progress import progress_bar
from optimum_cap.runtime import (
    budget_bytes,
    check_same_inputs,
    keep_freed_memory,
    resume_hint_on_stop,
)
from optimum_cap.scoring.batch_sizes import streams_per_chunk, tokens_per_batch
from optimum_cap.scoring.cache import unit_names
from optimum_cap.scoring.chunks import Chunk, ChunkMeasurer, chunks_of, cost_of
from optimum_cap.scoring.plain import plain_losses
from optimum_cap.scoring.scores import UnitLosses
from optimum_cap.scoring.settings import ScoringSettings
from optimum_cap.scoring.shared_prefix import prefix_to_share
from optimum_cap.scoring.stream_check import check_streams

logger = logging.get_logger(__name__)


def exact_losses(
    view: ModelView,
    examples: list[CalibrationExample],
    units: list[SiteUnit] | None = None,
    settings: ScoringSettings | None = None,
) -> UnitLosses:
    """Measure the loss with each unit masked.

    Masked streams start at their unit and share everything before it. If a model does not allow
    this (layers with several token mixers, or none), the losses are measured with whole passes.

    Args:
        view: A causal language model; it is not changed.
        examples: The calibration examples.
        units: The units to mask, in the order of the model; `None` masks all units of the sites.
        settings: Memory, cache, compilation and processes.

    Returns:
        The losses, in the order of the units and of the examples.

    Raises:
        ValueError: The layers cannot be compiled, the units are not in order, or the processes of
            the group were given different inputs.
        MemoryError: Memory runs out with a single example and a single unit.
        ConnectionError: Another process of the group has stopped.
    """
    settings = settings or ScoringSettings()
    if settings.torch_compile:
        check_compilable(view.model)
    units = view.units() if units is None else units
    whole, view = view, view.with_sites({site.name for site, _ in units})
    if reason := why_not_by_layers(view) or why_not_on(examples):
        return _by_whole_passes(whole, examples, units, settings, reason)
    _check_order(units)
    check_same_inputs(
        settings.process_group, view.model, examples, unit_names(units), settings.memory_budget
    )
    with evaluation_mode(view.model), float32_on_cpu(view.model):
        # Measured after converting the weights to float32, which takes memory.
        budget = agreed_budget(view, examples, units, settings)
        prefix = agree_once(
            "prefix", lambda: prefix_to_share(view, examples), examples, units, settings
        )
        same = agree_once(
            "streams", lambda: check_streams(view, examples, prefix), examples, units, settings
        )
        if not same:
            reason = "layers that run one at a time do not give the losses of the model"
            return _by_whole_passes(whole, examples, units, settings, reason)
        tokens = tokens_per_batch(view.model, budget, prefix, view.sites)
        chunks = [
            chunk
            for batch in batches(examples, len(examples), prefix, tokens)
            for chunk in chunks_of(batch, len(units), streams_per_chunk(view.model, batch, budget))
        ]
        scorer = ExactScorer(view, units, len(examples), settings)
        with compiling() if settings.torch_compile else nullcontext():
            scorer.measure(chunks)
    return UnitLosses(units, scorer.intact, scorer.masked)


def why_not_by_layers(view: ModelView) -> str | None:
    """Return why masked streams cannot start in the middle of a model; `None` if they can.

    Args:
        view: The model, with the sites whose units are masked and all sites that mix tokens.
    """
    for index in range(len(view.layers)):
        sites = [site for site in view.sites if site.layer == index]
        mixers = [site for site in sites if site.mixes_tokens]
        if len(mixers) != 1:
            return f"layer {index} has {len(mixers) or 'no'} mixers of tokens instead of one"
        levels = {site.level for site in sites if not site.mixes_tokens}
        if mixers[0].level or len(levels) > 1:
            return f"the sites of layer {index} run one after the other"
        for site in sites:
            if site.expert is not None and have_own_tokens(view.model.get_submodule(site.block)):
                return f"the experts of layer {index} receive tokens of their own"
    return None


def why_not_on(examples: list[CalibrationExample]) -> str | None:
    """Return why masked streams cannot be measured on these examples; `None` if they can."""
    if any(example.inputs for example in examples):
        return "the calibration examples have images"
    return None


def _by_whole_passes(
    view: ModelView,
    examples: list[CalibrationExample],
    units: list[SiteUnit],
    settings: ScoringSettings,
    reason: str,
) -> UnitLosses:
    logger.warning(
        f"{type(view.model).__name__}: {reason}, so masked losses are measured exactly, but by "
        f"{1 + len(units):,} whole passes (estimator 'plain')"
    )
    return plain_losses(view, examples, units, settings)


def _check_order(units: list[SiteUnit]) -> None:
    """Check that units are in the order in which their streams start."""
    places = [(site.layer, not site.mixes_tokens) for site, _ in units]
    for place, following, (site, unit) in zip(places, places[1:], units[1:], strict=False):
        if following < place:
            raise ValueError(
                f"unit {unit.index} of {site.name} comes after a unit of a later site: give units "
                "in the order of the model, as ModelView.units does"
            )


def agreed_budget(
    view: ModelView,
    examples: list[CalibrationExample],
    units: list[SiteUnit],
    settings: ScoringSettings,
) -> int:
    """Return the memory budget in bytes, the same for all processes and later runs."""
    if settings.memory_budget != "auto":
        return budget_bytes(settings.memory_budget, view.model)
    return agree_once("budget", lambda: budget_bytes("auto", view.model), examples, units, settings)


def agree_once(
    name: str,
    measure: Callable[[], int],
    examples: list[CalibrationExample],
    units: list[SiteUnit],
    settings: ScoringSettings,
) -> int:
    """Return the same measurement on all processes: the first one's, or an interrupted run's.

    This matters because the last bits of losses depend on the batch size, and free memory differs
    between runs.

    Args:
        name: Name of the quantity.
        measure: Measures it.
        examples: The examples of the run.
        units: The units of the run.
        settings: The processes, and the cache that stores the value.
    """
    process_group, cache = settings.process_group, settings.cache
    if process_group.rank:
        return process_group.broadcast(0)
    return process_group.broadcast(
        cache.get_or_measure(name, examples, units, measure) if cache else measure()
    )


class ExactScorer:
    """Collects the losses of one run, chunk by chunk, from the cache and from all processes.

    Args:
        view: The model, in evaluation mode.
        units: The units to mask, in the order of the model.
        examples: Number of examples.
        settings: Memory, cache, compilation and processes.

    Attributes:
        intact: Loss per example, nats, float64 `[examples]`; complete after `measure`.
        masked: The same with each unit masked, float64 `[units, examples]`.
    """

    def __init__(
        self, view: ModelView, units: list[SiteUnit], examples: int, settings: ScoringSettings
    ) -> None:
        self.intact = torch.empty(examples, dtype=torch.float64)
        self.masked = torch.empty(len(units), examples, dtype=torch.float64)
        self._view = view
        self._units = units
        self._settings = settings
        self._measurer = ChunkMeasurer(view, units, settings.torch_compile, settings.memory_limit)

    def measure(self, chunks: list[Chunk]) -> None:
        """Measure the chunks that are not in the cache.

        Several processes measure a share each and exchange the results.

        Args:
            chunks: The chunks; those of one batch are adjacent.

        Raises:
            ConnectionError: Another process has stopped, or cannot be reached.
        """
        process_group = self._settings.process_group
        cached = {index for index, chunk in enumerate(chunks) if self._recall(chunk)}
        with resume_hint_on_stop(lambda: "scoring was stopped", self._settings.cache):
            cached_by_rank = process_group.all_gather(cached)
            missing = sorted(set(range(len(chunks))).difference(*cached_by_rank))
            own_share = process_group.share([self._cost([chunks[index]]) for index in missing])
            measured_here = [missing[place] for place in own_share]
            done = self._cost(chunks) - self._cost([chunks[index] for index in missing])
            self._measure_missing([chunks[index] for index in measured_here], done)
            # Processes without a shared folder may have different chunks in their caches.
            everywhere = cached_by_rank[0].intersection(*cached_by_rank)
            to_share = [*measured_here, *cached.difference(everywhere)]
            for results in process_group.all_gather(
                {index: self._losses_of(chunks[index]) for index in to_share}
            ):
                for index, losses in results.items():
                    self._fill(chunks[index], losses)

    def _measure_missing(self, chunks: list[Chunk], done: int) -> None:
        if self._view.device.type == "cpu" and not is_offloaded(self._view.model):
            keep_freed_memory()
        with progress_bar(
            total=done + self._cost(chunks),
            initial=done,
            desc="Scoring",
            unit="tok",
            unit_scale=True,
            disable=self._settings.process_group.rank > 0,
        ) as progress:
            for _, of_batch in groupby(chunks, key=lambda chunk: chunk.batch.positions):
                self._measure_batch(list(of_batch), progress)

    def _measure_batch(self, chunks: list[Chunk], progress: Any) -> None:
        cache = self._settings.cache

        def without_cached(parts: list[Chunk]) -> list[Chunk]:
            missing = [part for part in parts if not self._recall(part)]
            progress.update(self._cost(parts) - self._cost(missing))
            return missing

        for chunk, losses in self._measurer.measure(chunks, without_cached):
            self._fill(chunk, losses)
            if cache:
                units = chunk.select(self._units)
                cache.put(chunk.batch, units, losses, self._settings.torch_compile)
            progress.update(self._cost([chunk]))

    def _recall(self, chunk: Chunk) -> bool:
        """Fill in the losses of a chunk from the cache; return whether they were there."""
        cache = self._settings.cache
        if cache is None:
            return False
        units = chunk.select(self._units)
        losses = cache.get(chunk.batch, units, self._settings.torch_compile)
        if losses is None:
            return False
        self._fill(chunk, losses)
        return True

    def _losses_of(self, chunk: Chunk) -> torch.Tensor:
        rows, columns = slice(chunk.units.start, chunk.units.stop), chunk.batch.positions
        return self.masked[rows, columns] if chunk.units else self.intact[columns]

    def _fill(self, chunk: Chunk, losses: torch.Tensor) -> None:
        if chunk.units:
            rows = slice(chunk.units.start, chunk.units.stop)
            self.masked[rows, chunk.batch.positions] = losses
        else:
            self.intact[chunk.batch.positions] = losses

    def _cost(self, chunks: list[Chunk]) -> int:
        layers = len(self._view.layers)
        return sum(cost_of(chunk, self._units, layers) for chunk in chunks)
