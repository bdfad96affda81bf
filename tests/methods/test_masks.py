"""The exact k-th value and the masks made from it."""

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_cap.methods.masks import (
    Threshold,
    apply_mask_,
    keep_masks,
    kth_smallest,
    mask_per_matrix,
    mask_per_row,
    n_of_m_mask,
    parse_pattern,
    split_proportionally,
)


def source(*tensors: torch.Tensor) -> Callable[[], Iterable[torch.Tensor]]:
    return lambda: iter(tensors)


@pytest.mark.parametrize("seed", range(5))
def test_equals_sorting(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Rounded, so that there are many ties; spread over many exponents; with zeros.
    values = torch.randn(3000, generator=generator).mul(3).exp().mul(4).round() / 4
    parts = values[:1000].view(10, 100), values[1000:1007], values[1007:]
    for k in (1, 2, 7, 1499, 1500, 2999, 3000):
        threshold = kth_smallest(source(*parts), k)
        assert threshold.value == float(values.sort().values[k - 1])
        masks = list(keep_masks(parts, threshold))
        assert [mask.shape for mask in masks] == [part.shape for part in parts]
        kept = torch.cat([mask.flatten() for mask in masks])
        expected = torch.ones(3000, dtype=torch.bool)
        expected[values.sort(stable=True).indices[:k]] = False  # stable: ties by position
        assert torch.equal(kept, expected)


def test_a_tensor_of_many_weights_is_looked_at_in_chunks() -> None:
    """With the result for the same weights in tensors that are smaller than a chunk."""
    values = torch.rand((1 << 22) + 1000, generator=torch.Generator().manual_seed(0))
    whole = kth_smallest(source(values), 3_000_000)
    assert kth_smallest(source(*values.split(1_000_001)), 3_000_000) == whole


def test_all_equal_prunes_the_first() -> None:
    parts = torch.ones(4), torch.ones(3)
    threshold = kth_smallest(source(*parts), 5)
    assert threshold == Threshold(1.0, 5)
    masks = list(keep_masks(parts, threshold))
    assert masks[0].tolist() == [False] * 4
    assert masks[1].tolist() == [False, True, True]


def test_subnormal_and_infinite_importances() -> None:
    values = torch.tensor([float("inf"), 1e-45, 0.0, 3e38])
    assert [kth_smallest(source(values), k).value for k in (1, 2, 3, 4)] == [
        0.0,
        float(values[1]),
        float(values[3]),
        float("inf"),
    ]


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_negative_or_nan_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="negative or NaN"):
        kth_smallest(source(torch.tensor([1.0, bad])), 1)


@pytest.mark.parametrize("k", [0, 3])
def test_impossible_count_is_an_error(k: int) -> None:
    with pytest.raises(ValueError, match=f"cannot prune {k} of 2 weights"):
        kth_smallest(source(torch.ones(2)), k)


def test_apply_mask_gives_positive_zero() -> None:
    weight = torch.tensor([-1.0, -2.0, 3.0])
    apply_mask_(weight, torch.tensor([False, True, True]))
    assert weight.tolist() == [0.0, -2.0, 3.0]
    assert not weight[0].signbit()


# Patterns of one matrix


def by_rows(importance: torch.Tensor, counts: list[int]) -> list[list[bool]]:
    """The definition, one row after the other: the lowest go, of equals the first."""
    kept = []
    for row, count in zip(importance.tolist(), counts, strict=True):
        order = sorted(range(len(row)), key=lambda column: (row[column], column))
        kept.append([column not in order[:count] for column in range(len(row))])
    return kept


# Few distinct values: there are many ties.
matrices = st.integers(0, 10_000).map(
    lambda seed: torch.randint(0, 6, (5, 12), generator=torch.Generator().manual_seed(seed)).float()
)


@given(matrices, st.integers(0, 60))
def test_mask_per_matrix(importance: torch.Tensor, zeros: int) -> None:
    (expected,) = by_rows(importance.reshape(1, -1), [zeros])
    assert mask_per_matrix(importance, zeros).flatten().tolist() == expected


@given(matrices, st.integers(0, 60))
def test_mask_per_row(importance: torch.Tensor, zeros: int) -> None:
    counts = [zeros * (row + 1) // 5 - zeros * row // 5 for row in range(5)]
    assert sum(counts) == zeros
    assert mask_per_row(importance, zeros).tolist() == by_rows(importance, counts)


@given(matrices, st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 6), (1, 2), (1, 12)]))
def test_n_of_m_mask(importance: torch.Tensor, pattern: tuple[int, int]) -> None:
    kept, of = pattern
    groups = importance.view(-1, of)
    expected = torch.tensor(by_rows(groups, [of - kept] * len(groups))).view(5, 12)
    assert torch.equal(n_of_m_mask(importance, kept, of), expected)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.floats(0, 1))
def test_split_proportionally_adds_up(sizes: list[int], fraction: float) -> None:
    zeros = round(fraction * sum(sizes))
    parts = split_proportionally(zeros, sizes)
    assert sum(parts) == zeros
    for part, size in zip(parts, sizes, strict=True):
        assert 0 <= part <= size
        assert abs(part - zeros * size / sum(sizes)) < 1 + 1e-9


def test_patterns_are_parsed() -> None:
    assert parse_pattern("unstructured") is None
    assert parse_pattern("2:4") == (2, 4)


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "4:4", "2/4", "", None, 2])
def test_what_is_no_pattern_is_refused(pattern: object) -> None:
    with pytest.raises(ValueError, match=f'"N:M", which keeps N of .* got {pattern!r}'):
        parse_pattern(pattern)
