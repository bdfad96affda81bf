"""Chunks of a scoring: measured one by one in what memory there is, kept, and shared out.

A chunk is one batch of examples with some of the units masked. `exact_losses` cuts the work into
chunks; here is what survives a lack of memory, an interrupt and the loss of another process.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from transformers.utils import logging

from optimum_cap.data import Batch, CalibrationExample
from optimum_cap.models import (
    ModelView,
    SiteUnit,
    is_offloaded,
)
from optimum_cap.runtime import (
    MemoryLimit,
    ProcessGroup,
    halves,
    is_out_of_memory,
    keep_freed_memory,
    resume_hint_on_stop,
)
from optimum_cap.scoring.cache import ScoreCache
from optimum_cap.scoring.wavefront import Wavefront

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Chunk:
    """What is measured at a time: one batch with some of the units masked, each alone.

    Attributes:
        batch: The examples.
        units: Which units, by their place among all; none for the loss of the intact model.
    """

    batch: Batch
    units: range


def chunks_of(batch: Batch, units: int, streams: int) -> list[Chunk]:
    """Cut the work on a batch: its intact loss, then so many units at a time."""
    starts = range(0, units, streams)
    parts = [range(start, min(start + streams, units)) for start in starts]
    return [Chunk(batch, part) for part in (range(0), *parts)]


def agree_once(
    what: str,
    find: Callable[[], int],
    examples: list[CalibrationExample],
    units: list[SiteUnit],
    cache: ScoreCache | None,
) -> int:
    """Return what the first process finds, or found when a run over these began, to all processes.

    A batch of another size gives other last bits, and what is free changes from run to run.

    Args:
        what: Name of what is settled.
        find: Finds it.
        examples: The examples of the run.
        units: The units of the run.
        cache: Remembers what was found.
    """
    process_group = ProcessGroup.current()
    if process_group.rank:
        return process_group.broadcast(0)
    return process_group.broadcast(
        cache.remembered(what, examples, units, find) if cache else find()
    )


class ExactScorer:
    """The losses of one scoring, filled in chunk by chunk.

    Where memory runs out, a chunk is measured in parts: fewer streams at a time, and at last fewer
    examples. The parts stay small for the rest of the run.

    Args:
        view: The model, in evaluation mode.
        units: The units to mask, by rising layer.
        examples: Number of examples.
        cache: Where finished chunks are kept, if anywhere.
        process_group: The processes that share the work.
        torch_compile: Compile the layers that streams pass through whole.
        memory_limit: What an earlier run over the same model found out.

    Attributes:
        intact: Loss per example, nats, float64 `[examples]`; complete after `measure`.
        masked: The same with each unit masked, float64 `[units, examples]`.
    """

    def __init__(
        self,
        view: ModelView,
        units: list[SiteUnit],
        examples: int,
        cache: ScoreCache | None,
        process_group: ProcessGroup,
        torch_compile: bool = False,
        memory_limit: MemoryLimit | None = None,
    ) -> None:
        self.view = view
        self.units = units
        self.cache = cache
        self.process_group = process_group
        self.torch_compile = torch_compile
        self.intact = torch.empty(examples, dtype=torch.float64)
        self.masked = torch.empty(len(units), examples, dtype=torch.float64)
        self._memory_limit = memory_limit or MemoryLimit()

    def measure(self, chunks: list[Chunk]) -> None:
        """Measure the chunks that the cache does not have; those of a batch follow one another.

        Several processes measure a share each, and tell one another.

        Raises:
            ConnectionError: Another process has stopped, or cannot be reached.
        """
        found = {index for index, chunk in enumerate(chunks) if self._recall(chunk)}
        with resume_hint_on_stop(lambda: "scoring was stopped", self.cache):
            known = self.process_group.all_gather(found)
            left = sorted(set(range(len(chunks))).difference(*known))
            share = self.process_group.share([self._work([chunks[index]]) for index in left])
            mine = [left[place] for place in share]
            done = self._work(chunks) - self._work([chunks[index] for index in left])
            self._measure_missing([chunks[index] for index in mine], done)
            # Processes without a common folder may have found different chunks.
            told = [*mine, *found.difference(known[0].intersection(*known))]
            for losses in self.process_group.all_gather(
                {i: self._losses_of(chunks[i]) for i in told}
            ):
                for index, measured in losses.items():
                    self._fill(chunks[index], measured)

    def _measure_missing(self, chunks: list[Chunk], done: int) -> None:
        if self.view.device.type == "cpu" and not is_offloaded(self.view.model):
            keep_freed_memory()
        with logging.tqdm(
            total=done + self._work(chunks),
            initial=done,
            desc="Scoring",
            unit="tok",
            unit_scale=True,
            disable=self.process_group.rank > 0,
        ) as progress:
            for _, own in groupby(chunks, key=lambda chunk: chunk.batch.positions):
                self._measure_batch(list(own), progress)

    def _recall(self, chunk: Chunk) -> bool:
        """Fill in a chunk if the cache has it."""
        if self.cache is None:
            return False
        losses = self.cache.losses(chunk.batch, self._units_of(chunk), self.torch_compile)
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

    def _measure_batch(self, chunks: list[Chunk], progress: Any) -> None:
        """Measure the chunks of one batch, or of its halves where it is too large."""
        batch, left = chunks[0].batch, deque(chunks)
        tokens, splits = batch.input_ids.numel(), len(batch.positions) > 1
        if self._memory_limit.tokens is None or tokens <= self._memory_limit.tokens or not splits:
            try:
                self._measure_at_once(batch, left, progress)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if not splits:
                    raise MemoryError(
                        f"memory ran out with a single example of {tokens} tokens and a single "
                        "unit masked, which no memory_budget makes smaller: free memory, or lower "
                        "max_length"
                    ) from error
            # Not in the handler: until it ends, the error keeps what was recorded alive.
            self._take_less(tokens)
        for half in halves(batch):
            halved = [replace(chunk, batch=half) for chunk in left]
            missing = [chunk for chunk in halved if not self._recall(chunk)]
            progress.update(self._work(halved) - self._work(missing))
            if missing:
                self._measure_batch(missing, progress)

    def _measure_at_once(self, batch: Batch, left: deque[Chunk], progress: Any) -> None:
        """Measure the chunks `left` of a batch; those that are done are taken from it."""
        wavefront = Wavefront(self.view, batch, self.torch_compile)
        while left:
            chunk, units = left[0], self._units_of(left[0])
            losses = (
                self._masked_losses(wavefront, units, batch.input_ids.numel())
                if units
                else wavefront.intact_losses()
            )
            self._fill(chunk, losses)
            if self.cache:
                self.cache.keep(batch, units, losses, self.torch_compile)
            progress.update(self._work([left.popleft()]))

    def _masked_losses(
        self, wavefront: Wavefront, units: list[SiteUnit], tokens: int
    ) -> torch.Tensor:
        """Losses with each unit masked, `[units, examples]`, in steps that fit into memory."""
        while True:
            streams = len(units)
            if self._memory_limit.tokens is not None:
                streams = min(streams, max(1, self._memory_limit.tokens // tokens))
            starts = range(0, len(units), streams)
            try:
                steps = [
                    wavefront.masked_losses(units[start : start + streams]) for start in starts
                ]
                return torch.cat(steps)
            except (RuntimeError, MemoryError) as error:
                if streams == 1 or not is_out_of_memory(error):
                    raise
            self._take_less(streams * tokens)

    def _take_less(self, tokens: int) -> None:
        """Halve what is measured at a time: memory ran out with so many tokens."""
        if self._memory_limit.tokens is None:
            logger.warning(
                f"memory ran out with {tokens} tokens of masked streams at a time: going on with "
                "half of them, and less where it must be; a lower memory_budget starts with less"
            )
        self._memory_limit.tokens = tokens // 2
        clear_device_cache(garbage_collection=True)

    def _units_of(self, chunk: Chunk) -> list[SiteUnit]:
        return [self.units[unit] for unit in chunk.units]

    def _work(self, chunks: list[Chunk]) -> int:
        """Tokens that pass a layer, summed over layers and streams."""
        return sum(map(self._work_of, chunks))

    def _work_of(self, chunk: Chunk) -> int:
        layers = len(self.view.layers)
        passed = sum(layers - site.layer for site, _ in self._units_of(chunk))
        return int(chunk.batch.real.sum()) * (passed if chunk.units else layers)
