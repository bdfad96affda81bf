"""The packed format: kept values and a bit mask.

A packed `x.weight` consists of three ordinary tensors: `x.weight` contains the kept values in row
order (one dimension), `x.weight_mask` one bit per weight (1 = kept, first weight in the least
significant bit of the first byte) and `x.weight_shape` the shape. Every weight whose bits are not
all zero is kept, so decoding restores any tensor bit for bit, including negative zeros and NaNs.
"""

from itertools import accumulate
from math import prod

import numpy as np
import torch

from optimum_cap.formats.bits import CHUNK, as_bits, kept_positions, pool

COMPANIONS = (".weight_mask", ".weight_shape")


def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Split a weight into its kept values, bit mask and shape.

    Args:
        weight: Tensor of any shape and dtype.

    Returns:
        `weight`: the kept values `[kept]`, same dtype; `weight_mask`: uint8 `[ceil(n / 8)]`;
        `weight_shape`: int64 `[dimensions]`. On the CPU.
    """
    bits = as_bits(weight)
    mask = np.empty(-(-len(bits) // 8), dtype=np.uint8)
    values = np.empty(int(np.count_nonzero(bits)), dtype=bits.dtype)
    done = 0
    for start in range(0, len(bits), CHUNK):
        chunk = bits[start : start + CHUNK]
        keep = chunk != 0
        mask[start // 8 : (start + CHUNK) // 8] = np.packbits(keep, bitorder="little")
        positions = np.flatnonzero(keep)
        values[done : done + len(positions)] = chunk.take(positions)
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
        ValueError: `values`, `mask` and `shape` are inconsistent, which means the file is damaged.
    """
    size = check_layout(mask, shape, name)
    count = prod(size)
    packed = mask.cpu().numpy()
    # One part per thread; numpy releases the GIL in the operations below.
    threads = max(1, min(torch.get_num_threads(), count // (4 * CHUNK)))
    bounds = [count * part // threads // CHUNK * CHUNK for part in range(threads)] + [count]
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
    source = as_bits(values)
    weight = np.zeros(count, dtype=source.dtype)

    def fill(first: int, stop: int, done: int) -> None:
        for start in range(first, stop, CHUNK):
            chunk = weight[start : min(start + CHUNK, stop)]
            positions = kept_positions(packed[start // 8 : (start + CHUNK) // 8], len(chunk))
            chunk[positions] = source[done : done + len(positions)]
            done += len(positions)

    if threads == 1:
        fill(0, count, 0)
    else:
        list(pool(threads).map(fill, starts, stops, kept_before))
    return torch.from_numpy(weight).view(values.dtype).view(size).to(values.device)


def check_layout(mask: torch.Tensor, shape: torch.Tensor, name: str) -> tuple[int, ...]:
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
