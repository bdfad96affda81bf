"""Masks: exact thresholds over any number of weights, and sparsity patterns of a matrix.

A mask is True where the weight is kept.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

REMOVED_PARTS = ("experts", "heads", "channels", "layers")
"""The patterns that remove parts of one kind, the same number from every layer."""

SMALLER_PATTERNS = (*REMOVED_PARTS, "structured")
"""The patterns that make the model smaller."""

_CHUNK = 1 << 22  # weights per step, which limits the extra memory to a few times 16 MB
_BINS = 1 << 16
_INFINITY = 0x7F800000  # bit pattern of infinity; only NaNs have larger ones


@dataclass(frozen=True)
class Threshold:
    """The k-th smallest importance, and the number of ties to prune.

    Attributes:
        value: Weights with a lower importance are pruned, weights with a higher one are kept.
        ties: Number of weights with exactly this importance to prune, starting with the first by
            position.
    """

    value: float
    ties: int


def kth_smallest(importances: Callable[[], Iterable[torch.Tensor]], k: int) -> Threshold:
    """Return the threshold that prunes exactly `k` weights.

    The bit patterns of non-negative floats are ordered like integers, so two passes with a
    histogram of the upper, then the lower 16 bits give the exact value without sorting or copying
    the importances.

    Args:
        importances: Called once per pass; yields float32 tensors of any shape, the same each time.
            Weights with higher importances are kept.
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
    """Yield the mask of each tensor; ties at the threshold are broken by position.

    Args:
        importances: The tensors passed to `kth_smallest`, in the same order.
        threshold: The result of `kth_smallest`.

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
    """Return a mask that prunes the least important weights of a matrix; ties by position.

    Args:
        importance: float32 `[out, in]`; higher means keep.
        zeros: Number of weights to prune.

    Returns:
        bool `[out, in]`, True where the weight is kept.
    """
    if zeros == 0:
        return torch.ones_like(importance, dtype=torch.bool)
    threshold = kth_smallest(lambda: (importance,), zeros)
    return next(keep_masks((importance,), threshold))


def mask_per_row(importance: torch.Tensor, zeros: int) -> torch.Tensor:
    """Return a mask that prunes the least important weights of each row; ties by position.

    As in Wanda, all rows get the same number of zeros, up to a difference of one if `zeros` is not
    divisible by the number of rows.

    Args:
        importance: float32 `[out, in]`; higher means keep.
        zeros: Number of weights to prune in the whole matrix.

    Returns:
        bool `[out, in]`, True where the weight is kept.
    """
    counts = split_proportionally(zeros, [importance.shape[1]] * len(importance))
    order = importance.argsort(dim=1, stable=True)
    columns = torch.arange(importance.shape[1], device=importance.device)
    pruned = columns < torch.tensor(counts, device=importance.device).unsqueeze(1)
    return torch.empty_like(pruned).scatter_(1, order, ~pruned)


def n_of_m_mask(importance: torch.Tensor, kept: int, of: int) -> torch.Tensor:
    """Return a mask that keeps the `kept` most important of every `of` weights; ties by position.

    Args:
        importance: float32 `[out, in]`, where `of` divides `in`; higher means keep.
        kept: N of N:M.
        of: M of N:M: consecutive weights of a row.

    Returns:
        bool `[out, in]`, True where the weight is kept.
    """
    groups = importance.reshape(-1, of)
    return mask_per_row(groups, len(groups) * (of - kept)).view(importance.shape)


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Return `(N, M)` for a pattern "N:M", which keeps N of every M weights; `None` for others.

    Raises:
        ValueError: `pattern` is not a pattern.
    """
    if pattern in ("unstructured", *SMALLER_PATTERNS):
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match and 0 < int(match[1]) < int(match[2]):
        return int(match[1]), int(match[2])
    raise ValueError(
        'pattern must be "unstructured", "experts", "heads", "channels", "layers", "structured", '
        f'or "N:M", which keeps N of every M weights (such as "2:4"), got {pattern!r}'
    )


def split_proportionally(zeros: int, sizes: list[int]) -> list[int]:
    """Split `zeros` over parts in proportion to `sizes`, each rounded up or down to an integer."""
    total, before, counts = sum(sizes), 0, []
    for size in sizes:
        counts.append(zeros * (before + size) // total - zeros * before // total)
        before += size
    return counts


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
    """Return the bin with the k-th smallest entry, and the number of entries in lower bins."""
    cumulative = histogram.cumsum(0)
    index = int(torch.searchsorted(cumulative, k))
    return index, int(cumulative[index - 1]) if index else 0


SELECTIONS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "matrix": mask_per_matrix,
    "row": mask_per_row,
}
