"""Encoding and decoding of single weights: pure functions from tensors to tensors.

The packed form of `x.weight` is three ordinary tensors: `x.weight` holds the kept values in row
order (one dimension), `x.weight_mask` one bit per weight (1 = kept, first weight in the least
significant bit of the first byte) and `x.weight_shape` the shape. Every weight whose bits are not
all zero is kept, so decoding restores any tensor bit for bit, including negative zeros and NaNs.

The one-dimensional tensor is named `x.weight` on purpose: without this plugin, transformers raises
an error about its size, instead of finding no `x.weight` and initialising it at random.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import prod
from typing import Any, Protocol

import numpy as np
import torch

FORMAT_VERSION = 1
"""Version of the files on disk. Files of a newer version raise an error."""

_CHUNK = 1 << 17  # weights at a time, so that index arrays fit in the CPU cache; a multiple of 8
_COMPANIONS = (".weight_mask", ".weight_shape")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Split a weight into kept values, bit mask and shape.

    Args:
        weight: Tensor of any shape and dtype.

    Returns:
        `weight`: the kept values `[kept]`, same dtype; `weight_mask`: uint8 `[ceil(n / 8)]`;
        `weight_shape`: int64 `[dimensions]`. On the CPU.
    """
    bits = _as_bits(weight.detach().cpu().contiguous())
    mask = np.empty(-(-len(bits) // 8), dtype=np.uint8)
    values = np.empty(int(np.count_nonzero(bits)), dtype=bits.dtype)
    done = 0
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK]
        keep = chunk != 0
        mask[start // 8 : (start + _CHUNK) // 8] = np.packbits(keep, bitorder="little")
        positions = np.flatnonzero(keep)
        values[done : done + len(positions)] = chunk[positions]
        done += len(positions)
    return {
        "weight": torch.from_numpy(values).view(weight.dtype),
        "weight_mask": torch.from_numpy(mask),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def unpack(
    values: torch.Tensor, mask: torch.Tensor, shape: torch.Tensor, name: str = "weight"
) -> torch.Tensor:
    """Restore a packed weight.

    Args:
        values: Kept values `[kept]`.
        mask: uint8 `[ceil(n / 8)]`.
        shape: int64 `[dimensions]`.
        name: Name of the weight, for the error message.

    Returns:
        The weight of shape `shape`, on the device and in the dtype of `values`.

    Raises:
        ValueError: `values`, `mask` and `shape` are inconsistent, so the file is damaged.
    """
    size = _check_layout(mask, shape, name)
    count = prod(size)
    packed = mask.cpu().numpy()
    # One part per thread; numpy releases the GIL in the operations below.
    threads = max(1, min(torch.get_num_threads(), count // (4 * _CHUNK)))
    bounds = [count * part // threads // _CHUNK * _CHUNK for part in range(threads)] + [count]
    starts, stops = bounds[:-1], bounds[1:]
    kept_before = list(
        accumulate(
            (
                int(np.bitwise_count(packed[start // 8 : -(-stop // 8)]).sum(dtype=np.int64))
                for start, stop in zip(starts, stops, strict=True)
            ),
            initial=0,
        )
    )
    kept_count = kept_before[-1]
    if not values.is_floating_point():
        raise ValueError(f"{name} is damaged: its values are {values.dtype}, not floats")
    if values.ndim != 1 or kept_count != len(values):
        raise ValueError(
            f"{name} is damaged: its mask keeps {kept_count} weights, but values of shape "
            f"{tuple(values.shape)} are stored"
        )
    if count % 8 and packed[-1] >> (count % 8):
        raise ValueError(f"{name} is damaged: its mask keeps weights beyond shape {size}")
    source = _as_bits(values.detach().cpu().contiguous())
    weight = np.zeros(count, dtype=source.dtype)

    def fill(first: int, stop: int, done: int) -> None:
        for start in range(first, stop, _CHUNK):
            chunk = weight[start : min(start + _CHUNK, stop)]
            keep = np.unpackbits(
                packed[start // 8 : (start + _CHUNK) // 8], bitorder="little", count=len(chunk)
            )
            positions = np.flatnonzero(keep.view(bool))
            chunk[positions] = source[done : done + len(positions)]
            done += len(positions)

    if threads == 1:
        fill(0, count, 0)
    else:
        list(_pool(threads).map(fill, starts, stops, kept_before))
    return torch.from_numpy(weight).view(values.dtype).view(size).to(values.device)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return a cached thread pool: starting threads for each of hundreds of matrices is slow."""
    return ThreadPoolExecutor(threads, thread_name_prefix="optimum-cap")


if hasattr(os, "register_at_fork"):  # a forked process inherits the pool, but not its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def is_packable(name: str, weight: torch.Tensor) -> bool:
    """Whether a tensor is a weight matrix, which the packed format may store packed."""
    return name.endswith(".weight") and weight.ndim >= 2 and weight.is_floating_point()


def encode_packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors to store for `name`: packed if that is smaller, else unchanged."""
    if is_packable(name, weight):
        parts = pack(weight)
        if sum(part.nbytes for part in parts.values()) < weight.nbytes:
            base = name.removesuffix("weight")
            return {base + part: tensor for part, tensor in parts.items()}
    return {name: weight}


def encode_dense(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensor unchanged, zeros included."""
    return {name: weight}


def decode(
    names: Iterable[str], read: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(name, weight)` for every weight of a file, unpacked, sorted by name.

    Args:
        names: Names of all tensors in the file.
        read: Reads a tensor by name.

    Raises:
        ValueError: The parts of a packed weight are inconsistent.
    """
    names = sorted(names)
    known = set(names)
    for name in names:
        if name.endswith(_COMPANIONS):
            continue
        weight = read(name)
        if f"{name}_mask" in known:
            weight = unpack(weight, read(f"{name}_mask"), read(f"{name}_shape"), name)
        yield name, weight


class Stored(Protocol):
    """A tensor, or what the header of a file says of one."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype; `None` if torch has none."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""


def check_parts(stored: Mapping[str, Stored], read: Callable[[str], torch.Tensor]) -> None:
    """Check the packed weights of a file, without reading their values.

    Args:
        stored: Dtype and shape of each tensor in the file by name.
        read: Reads a tensor by name.

    Raises:
        ValueError: A part is missing (transformers would initialise the weight at random), a weight
            with a mask is not a list of float values, or mask and shape are inconsistent.
    """
    for name in sorted({name.rpartition("_")[0] for name in stored if name.endswith(_COMPANIONS)}):
        parts = (name, f"{name}_mask", f"{name}_shape")
        if missing := [part for part in parts if part not in stored]:
            raise ValueError(f"{name} is damaged: {', '.join(missing)} is missing")
        dtype, dimensions = stored[name].dtype, len(stored[name].shape)
        if dimensions != 1 or dtype is None or not dtype.is_floating_point:
            raise ValueError(
                f"{name} is damaged: it has a mask, so its values must be floats in one "
                f"dimension, found {dimensions} dimensions of {dtype}"
            )
        _check_layout(read(f"{name}_mask"), read(f"{name}_shape"), name)


def _check_layout(mask: torch.Tensor, shape: torch.Tensor, name: str) -> tuple[int, ...]:
    """Return the shape of a packed weight, after checking it and the size of the mask."""
    if shape.dtype != torch.int64 or shape.ndim != 1 or bool((shape < 0).any()):
        raise ValueError(
            f"{name} is damaged: its shape must be a list of sizes in int64, found "
            f"{shape.tolist()} of {shape.dtype}"
        )
    size = tuple(shape.tolist())
    mask_bytes = -(-prod(size) // 8)
    if mask.dtype != torch.uint8 or mask.shape != (mask_bytes,):
        raise ValueError(
            f"{name} is damaged: shape {size} needs a mask of {mask_bytes} bytes, found "
            f"{tuple(mask.shape)} of {mask.dtype}"
        )
    return size


def check_format_version(version: Any, name: str) -> None:
    """Raise a `ValueError` if checkpoint `name` has a version that this package cannot read."""
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{name} has checkpoint format version {version!r}, but this optimum-cap "
            f"reads up to {FORMAT_VERSION}: upgrade optimum-cap"
        )


def _as_bits(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a flat array of integers of the same element size."""
    return tensor.flatten().view(_BITS[tensor.element_size()]).numpy()


@dataclass(frozen=True)
class Format:
    """A form of weights on disk.

    Attributes:
        encode: Takes the name and the value of a tensor, and returns the tensors to store by name.
        needs_plugin: Whether transformers needs this plugin to load it.
    """

    encode: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
    needs_plugin: bool


FORMATS: dict[str, Format] = {
    "packed": Format(encode_packed, needs_plugin=True),
    "dense": Format(encode_dense, needs_plugin=False),
}
