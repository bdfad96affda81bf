"""Masks: the exact k-th smallest importance of any number of weights, and the patterns of a matrix.

A mask is True where the weight is kept.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

WHOLE_HEADS = "heads"
"""The pattern that takes whole heads out instead of single weights."""

_CHUNK = 1 << 22  # weights looked at together: bounds the extra memory to a few times 16 MB
_BINS = 1 << 16
_INFINITY = 0x7F800000  # bit pattern; only NaNs lie above


@dataclass(frozen=True)
class Threshold:
    """The k-th smallest importance, and how many of its equals are pruned.

    Attributes:
        value: Everything below is pruned, everything above is kept.
        ties: Of the weights exactly at `value`, the first this many are pruned.
    """

    value: float
    ties: int


def kth_smallest(importances: Callable[[], Iterable[torch.Tensor]], k: int) -> Threshold:
    """Find the threshold under which exactly `k` weights are pruned.

    The bit patterns of non-negative floats sort like integers, so two passes with a histogram over
    the upper, then the lower 16 bits give the exact value: no sort, no copy of the importances.

    Args:
        importances: Called once per pass; yields float32 tensors of any shape, the same ones each
            time. Higher means keep.
        k: Number of weights to prune, at least 1.

    Raises:
        ValueError: An importance is negative or NaN, or there are fewer than `k` of them.
    """
    upper = torch.zeros(_BINS, dtype=torch.int64)
    for bits in _bit_patterns(importances()):
        upper += torch.bincount(bits >> 16, minlength=_BINS).cpu()
    total = int(upper.sum())
    if not 1 <= k <= total:
        raise ValueError(f"cannot prune {k} of {total} weights")
    high, below = _bin_of(upper, k)

    lower = torch.zeros(_BINS, dtype=torch.int64)
    for bits in _bit_patterns(importances()):
        inside = bits[(bits >> 16) == high]
        lower += torch.bincount(inside & (_BINS - 1), minlength=_BINS).cpu()
    low, below_inside = _bin_of(lower, k - below)
    pattern = torch.tensor((high << 16) | low, dtype=torch.int32)
    return Threshold(float(pattern.view(torch.float32)), k - below - below_inside)


def keep_masks(importances: Iterable[torch.Tensor], threshold: Threshold) -> Iterator[torch.Tensor]:
    """Yield the mask of each tensor, breaking ties at the threshold by position.

    Args:
        importances: The tensors that the threshold was found on, in the same order.
        threshold: From `kth_smallest`.

    Yields:
        Bool tensors of the same shapes, True where the weight is kept.
    """
    ties = threshold.ties
    for importance in importances:
        keep = importance > threshold.value
        if ties:
            equal = (importance == threshold.value).flatten()
            rank = equal.cumsum(0, dtype=torch.int64)
            keep |= (equal & (rank > ties)).view_as(keep)
            ties = max(0, ties - int(rank[-1]))
        else:
            keep |= importance == threshold.value
        yield keep


def mask_per_matrix(importance: torch.Tensor, zeros: int) -> torch.Tensor:
    """Mask the least important weights of a matrix; ties go by position.

    Args:
        importance: float32 `[out, in]`; higher means keep.
        zeros: Number of weights to prune.

    Returns:
        bool `[out, in]`.
    """
    if zeros == 0:
        return torch.ones_like(importance, dtype=torch.bool)
    threshold = kth_smallest(lambda: (importance,), zeros)
    return next(keep_masks((importance,), threshold))


def mask_per_row(importance: torch.Tensor, zeros: int) -> torch.Tensor:
    """Mask the least important weights of each row, as Wanda does; ties go by position.

    The rows get the same number of zeros if that divides, and numbers that differ by one if not.

    Args:
        importance: float32 `[out, in]`; higher means keep.
        zeros: Number of weights to prune in the whole matrix.
    """
    counts = split_proportionally(zeros, [importance.shape[1]] * len(importance))
    order = importance.argsort(dim=1, stable=True)
    columns = torch.arange(importance.shape[1], device=importance.device)
    pruned = columns < torch.tensor(counts, device=importance.device).unsqueeze(1)
    return torch.empty_like(pruned).scatter_(1, order, ~pruned)


def n_of_m_mask(importance: torch.Tensor, kept: int, of: int) -> torch.Tensor:
    """Keep the `kept` most important of every `of` consecutive weights of a row; ties by position.

    Args:
        importance: float32 `[out, in]`, where `of` divides `in`; higher means keep.
        kept: N of N:M.
        of: M of N:M.
    """
    groups = importance.reshape(-1, of)
    return mask_per_row(groups, len(groups) * (of - kept)).view(importance.shape)


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Return `(N, M)` of a pattern "N:M", N kept of every M; `None` of the other patterns.

    Raises:
        ValueError: Neither `"unstructured"`, nor `"heads"`, nor N:M.
    """
    if pattern in ("unstructured", WHOLE_HEADS):
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match and 0 < int(match[1]) < int(match[2]):
        return int(match[1]), int(match[2])
    raise ValueError(
        'pattern must be "unstructured", "heads", or "N:M" with N weights kept of every M (such as '
        f'"2:4"), got {pattern!r}'
    )


def split_proportionally(zeros: int, sizes: list[int]) -> list[int]:
    """Split a number of zeros over parts by their sizes; each is off its share by less than one."""
    total, before, given = sum(sizes), 0, []
    for size in sizes:
        given.append(zeros * (before + size) // total - zeros * before // total)
        before += size
    return given


def apply_mask_(weight: torch.Tensor, keep: torch.Tensor) -> None:
    """Set `weight` to exactly +0 where `keep` is False, in place."""
    weight.masked_fill_(~keep.to(weight.device), 0)


def _bit_patterns(importances: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the bit patterns of importances as int32, in chunks."""
    for tensor in importances:
        for chunk in tensor.reshape(-1).split(_CHUNK):
            bits = chunk.view(torch.int32)
            if len(bits) and not 0 <= int(bits.min()) <= int(bits.max()) <= _INFINITY:
                raise ValueError("importances must be non-negative, found a negative or NaN")
            yield bits


def _bin_of(histogram: torch.Tensor, k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th smallest entry, and the number of entries before it."""
    cumulative = histogram.cumsum(0)
    index = int(torch.searchsorted(cumulative, k))
    return index, int(cumulative[index - 1]) if index else 0


SELECTIONS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "matrix": mask_per_matrix,
    "row": mask_per_row,
}
