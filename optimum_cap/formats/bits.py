"""The bits of weights: what the packed and the coded form have in common."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Protocol

import numpy as np
import torch

CHUNK = 1 << 17
"""Weights at a time, so that index arrays fit in the CPU cache; a multiple of 8."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Stored(Protocol):
    """A tensor, or what the header of a file says of one."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype; `None` if torch has none."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""


def as_bits(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a flat array of integers of the same element size, on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.flatten().view(_BITS[tensor.element_size()]).numpy()


def scatter(weights: np.ndarray, mask: np.ndarray, values: np.ndarray) -> int:
    """Write values to the places that a mask keeps.

    Args:
        weights: Zeros `[n]`, changed in place.
        mask: uint8 `[ceil(n / 8)]`, one bit per weight, the first one in the least significant bit.
        values: The kept values in order; it may continue after those of these weights.

    Returns:
        How many values were written.
    """
    keep = np.unpackbits(mask, bitorder="little", count=len(weights))
    positions = np.flatnonzero(keep.view(bool))  # faster than a boolean index
    weights[positions] = values[: len(positions)]
    return len(positions)


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Return a cached thread pool: starting threads for each of hundreds of matrices is slow."""
    return ThreadPoolExecutor(threads, thread_name_prefix="optimum-cap")


if hasattr(os, "register_at_fork"):  # a forked process inherits the pool, but not its threads
    os.register_at_fork(after_in_child=pool.cache_clear)
