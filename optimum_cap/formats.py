"""Pure encode and decode of one weight: tensors in, tensors out, the input untouched.

The packed form of `x.weight` is three ordinary tensors: `x.weight` holds the kept values in row
order (one dimension), `x.weight_mask` one bit per weight (1 = kept, first weight in the least
significant bit of the first byte) and `x.weight_shape` the shape. "Kept" is every weight whose bits
are not all zero, so any tensor survives bit for bit, negative zeros and NaNs included.

The name `x.weight` for a one-dimensional tensor is on purpose: where this plugin is not imported,
transformers stops at the size mismatch, instead of finding no `x.weight` and making one up.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch

FORMAT_VERSION = 1
"""Version of the files on disk. A reader refuses a newer one."""

_CHUNK = 1 << 16  # weights at a time, so that index arrays stay in the cache; a multiple of 8
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)
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
        kept = np.flatnonzero(keep)
        values[done : done + len(kept)] = chunk[kept]
        done += len(kept)
    return {
        "weight": torch.from_numpy(values).view(weight.dtype),
        "weight_mask": torch.from_numpy(mask),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def unpack(
    values: torch.Tensor, mask: torch.Tensor, shape: torch.Tensor, name: str = "weight"
) -> torch.Tensor:
    """Put a packed weight together again.

    Args:
        values: Kept values `[kept]`.
        mask: uint8 `[ceil(n / 8)]`.
        shape: int64 `[dimensions]`.
        name: Name of the weight, for the error message.

    Returns:
        The weight, on the device of `values`.

    Raises:
        ValueError: The three disagree, so the file is damaged.
    """
    size = tuple(shape.tolist())
    count = prod(size)
    packed = mask.cpu().numpy()
    if mask.dtype != torch.uint8 or len(packed) != -(-count // 8):
        raise ValueError(
            f"{name} is damaged: shape {size} needs a mask of {-(-count // 8)} bytes, found "
            f"{tuple(mask.shape)} of {mask.dtype}"
        )
    kept = int(_ONES[packed].sum(dtype=np.int64))
    if values.ndim != 1 or kept != len(values):
        raise ValueError(
            f"{name} is damaged: its mask keeps {kept} weights, but {tuple(values.shape)} values "
            "are stored"
        )
    if count % 8 and packed[-1] >> (count % 8):
        raise ValueError(f"{name} is damaged: its mask keeps weights beyond shape {size}")
    source = _as_bits(values.detach().cpu().contiguous())
    weight = np.zeros(count, dtype=source.dtype)
    done = 0
    for start in range(0, count, _CHUNK):
        chunk = weight[start : start + _CHUNK]
        keep = np.unpackbits(
            packed[start // 8 : (start + _CHUNK) // 8], bitorder="little", count=len(chunk)
        )
        positions = np.flatnonzero(keep.view(bool))
        chunk[positions] = source[done : done + len(positions)]
        done += len(positions)
    return torch.from_numpy(weight).view(values.dtype).view(size).to(values.device)


def is_packable(name: str, weight: torch.Tensor) -> bool:
    """Whether a tensor is a matrix of weights, which the packed format may store packed."""
    return name.endswith(".weight") and weight.ndim >= 2 and weight.is_floating_point()


def encode_packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors to store for `name`: packed where that is smaller, else as it is."""
    if is_packable(name, weight):
        parts = pack(weight)
        if sum(part.nbytes for part in parts.values()) < weight.nbytes:
            base = name.removesuffix("weight")
            return {base + part: tensor for part, tensor in parts.items()}
    return {name: weight}


def encode_dense(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensor as it is, zeros and all."""
    return {name: weight}


def check_format_version(version: Any, name: str) -> None:
    """Raise ValueError if the files of checkpoint `name` are of a newer version than known here."""
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{name} has checkpoint format version {version!r}, but this optimum-cap reads up to "
            f"{FORMAT_VERSION}: upgrade optimum-cap"
        )


def _as_bits(tensor: torch.Tensor) -> np.ndarray:
    """View a tensor as a flat array of integers of the same size."""
    return tensor.flatten().view(_BITS[tensor.element_size()]).numpy()


FORMATS: dict[str, Callable[[str, torch.Tensor], dict[str, torch.Tensor]]] = {
    "packed": encode_packed,
    "dense": encode_dense,
}
