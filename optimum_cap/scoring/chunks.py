"""Chunks of exact scoring: a batch of examples, with some of the units masked one by one."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from accelerate.utils.memory import clear_device_cache
from transformers.utils import logging

from optimum_cap.data import Batch
from optimum_cap.models import ModelView, SiteUnit
from optimum_cap.runtime import MemoryLimit, halves, is_out_of_memory
from optimum_cap.scoring.wavefront import Wavefront

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Chunk:
    """A batch of examples and the units to mask in it, one by one.

    Attributes:
        batch: The examples.
        units: Positions of these units among all units; empty for the intact model.
    """

    batch: Batch
    units: range

    def select(self, units: list[SiteUnit]) -> list[SiteUnit]:
        """Return the units of the chunk from the list of all units."""
        return [units[index] for index in self.units]


def chunks_of(batch: Batch, units: int, streams: int) -> list[Chunk]:
    """Return the chunks of a batch: the intact model, then up to `streams` units at a time."""
    starts = range(0, units, streams)
    parts = [range(start, min(start + streams, units)) for start in starts]
    return [Chunk(batch, part) for part in (range(0), *parts)]


def cost_of(chunk: Chunk, units: list[SiteUnit], layers: int) -> int:
    """Return the number of tokens that run through a layer, summed over layers and streams."""
    passed = sum(layers - unit.site.layer for unit in chunk.select(units))
    return int(chunk.batch.real.sum()) * (passed if chunk.units else layers)


def out_of_memory_at_smallest_step(tokens: int) -> MemoryError:
    """Return the error for a single example of this length with a single masked unit."""
    return MemoryError(
        f"memory ran out with a single example of {tokens} tokens and a single masked unit, the "
        "smallest step that a memory_budget can lead to: free memory, or lower max_length"
    )


class ChunkMeasurer:
    """Measures chunks, splitting them into smaller parts when memory runs out.

    First the number of streams at a time is halved, then the number of examples. The parts stay
    small for the rest of the run.

    Args:
        view: The model, in evaluation mode.
        units: The units that chunks refer to.
        torch_compile: Compile the layers in which no stream starts.
        memory_limit: The limit found by an earlier run over the same model; `None` if there was
            none.
    """

    def __init__(
        self,
        view: ModelView,
        units: list[SiteUnit],
        torch_compile: bool = False,
        memory_limit: MemoryLimit | None = None,
    ) -> None:
        self._view = view
        self._units = units
        self._torch_compile = torch_compile
        self._memory_limit = memory_limit or MemoryLimit()

    def measure(
        self, chunks: list[Chunk], without_cached: Callable[[list[Chunk]], list[Chunk]]
    ) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """Yield the losses of the chunks of one batch, or of its halves if the batch is too large.

        Args:
            chunks: Chunks with the same batch.
            without_cached: Removes the halves of chunks whose losses are cached.

        Raises:
            MemoryError: Memory runs out with a single example and a single unit.
        """
        batch, left = chunks[0].batch, deque(chunks)
        limit, tokens = self._memory_limit.tokens, batch.input_ids.numel()
        splits = len(batch.positions) > 1
        if limit is None or tokens <= limit or not splits:
            try:
                yield from self._measure_at_once(batch, left)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if not splits:
                    raise out_of_memory_at_smallest_step(tokens) from error
            # After the handler, because the error keeps the recorded tensors in memory until it
            # ends.
            self._halve_limit(tokens)
        for half in halves(batch):
            if missing := without_cached([replace(chunk, batch=half) for chunk in left]):
                yield from self.measure(missing, without_cached)

    def _measure_at_once(
        self, batch: Batch, left: deque[Chunk]
    ) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """Yield the losses of the chunks of a batch, and remove finished chunks from `left`."""
        wavefront = Wavefront(self._view, batch, self._torch_compile)
        while left:
            units = left[0].select(self._units)
            losses = (
                self._masked_losses(wavefront, units, batch.input_ids.numel())
                if units
                else wavefront.intact_losses()
            )
            yield left.popleft(), losses

    def _masked_losses(
        self, wavefront: Wavefront, units: list[SiteUnit], tokens: int
    ) -> torch.Tensor:
        """Return the losses with each unit masked, `[units, examples]`, in steps that fit."""
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
            self._halve_limit(streams * tokens)

    def _halve_limit(self, tokens: int) -> None:
        """Limit steps to half of the tokens at which memory ran out."""
        if self._memory_limit.tokens is None:
            logger.warning(
                f"memory ran out with {tokens} tokens in masked passes at a time: continuing with "
                "half as many, and fewer if needed; a lower memory_budget starts with fewer"
            )
        self._memory_limit.tokens = tokens // 2
        clear_device_cache(garbage_collection=True)
