"""Removal of columns: the least squares solution for what is kept."""

import pytest
import torch

from optimum_cap.methods import InputStatistics, remove_columns

DAMPING = 0.01


def statistics(inputs: torch.Tensor) -> InputStatistics:
    collected = InputStatistics.empty(inputs.shape[1], inputs.device, gram=True)
    collected.add_(inputs)
    return collected


def correlated(tokens: int = 200, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mixing = torch.eye(width) + 0.2 * torch.randn(width, width)
    return torch.randn(tokens, width) @ mixing, torch.randn(10, width)


def error(weight: torch.Tensor, new: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (weight - new).T).square().sum())


@pytest.mark.parametrize(("size", "count"), [(1, 7), (4, 2)])
def test_kept_columns_are_the_least_squares_solution(size: int, count: int) -> None:
    inputs, weight = correlated()
    groups = torch.arange(24).view(-1, size)
    kept, new = remove_columns(weight, statistics(inputs), groups, count)
    assert int((~kept).sum()) == size * count
    assert not new[:, ~kept].any()
    hessian = inputs.T @ inputs / len(inputs)
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(24)
    expected = weight @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
    torch.testing.assert_close(new[:, kept], expected, atol=1e-4, rtol=1e-4)


def test_first_column_is_the_one_whose_removal_leaves_the_smallest_error() -> None:
    inputs, weight = correlated()
    columns = torch.arange(24).view(-1, 1)
    kept, new = remove_columns(weight, statistics(inputs), columns, 1)
    errors = []
    for column in range(24):
        left = torch.arange(24) != column
        fit = torch.linalg.lstsq(inputs[:, left], inputs @ weight.T).solution.T
        alone = torch.zeros_like(weight)
        alone[:, left] = fit
        errors.append(error(weight, alone, inputs))
    assert int((~kept).nonzero()) == min(range(24), key=errors.__getitem__)
    assert error(weight, new, inputs) == pytest.approx(min(errors), rel=0.2)


def test_redundant_columns_go_first_and_cost_nothing() -> None:
    inputs, weight = correlated()
    inputs[:, 5] = inputs[:, 3] + inputs[:, 4]
    columns = torch.arange(24).view(-1, 1)
    kept, new = remove_columns(weight, statistics(inputs), columns, 1)
    assert int((~kept).nonzero()) in (3, 4, 5)
    assert error(weight, new, inputs) < 1e-2 * error(weight, weight * kept, inputs)


def test_many_columns_are_removed_a_few_at_a_time() -> None:
    inputs, weight = correlated(tokens=600, width=400)
    kept, new = remove_columns(weight, statistics(inputs), torch.arange(400).view(-1, 1), 300)
    assert int(kept.sum()) == 100
    assert new.isfinite().all()


def test_columns_without_tokens_go_by_magnitude() -> None:
    weight = torch.tensor([[3.0, 1.0, 2.0]])
    empty = InputStatistics.empty(3, weight.device, gram=True)
    kept, new = remove_columns(weight, empty, torch.arange(3).view(-1, 1), 1)
    assert kept.tolist() == [True, False, True]
    assert new.tolist() == [[3.0, 0.0, 2.0]]
