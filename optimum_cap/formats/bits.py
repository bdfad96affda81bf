"""Operations on the bits of weights, shared by the packed and the coded format."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Protocol

import numpy as np
import torch

CHUNK = 1 << 17
"""Weights processed at a time, so that index arrays fit in the CPU cache; a multiple of 8."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Stored(Protocol):
    """A tensor, or its entry in the header of a file."""

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


def kept_positions(mask: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of the weights that a mask keeps, in order.

    Args:
        mask: uint8 `[ceil(count / 8)]`, one bit per weight, the first one in the least significant
            bit.
        count: Number of weights.
    """
    keep = np.unpackbits(mask, bitorder="little", count=count)
    return np.flatnonzero(keep.view(bool))  # an index of these is faster than a boolean one


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Return a cached thread pool, because starting threads for hundreds of matrices is slow."""
    return ThreadPoolExecutor(threads, thread_name_prefix="optimum-cap")


if hasattr(os, "register_at_fork"):  # a forked process inherits the pool, but not its threads
    os.register_at_fork(after_in_child=pool.cache_clear)
