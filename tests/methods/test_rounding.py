"""Rounding of matrices to 4 bits."""

import pytest
import torch

from optimum_cap.methods import InputStatistics, RoundedMatrix, round_columns


def statistics(tokens: int = 400, columns: int = 128) -> InputStatistics:
    """Statistics of correlated inputs."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    mixing += 8 * mixing.mean(dim=1, keepdim=True)
    result = InputStatistics.empty(columns, torch.device("cpu"), gram=True)
    result.add_(torch.randn(tokens, columns, generator=generator) @ mixing)
    return result


def sparse_weight(rows: int = 24, columns: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) < 0.5)


def to_nearest(weight: torch.Tensor, group: int) -> torch.Tensor:
    groups = weight.unflatten(1, (-1, group))
    scales = groups.abs().amax(dim=2, keepdim=True) / 7
    return (groups / scales).round().mul(scales).flatten(1)


def output_error(weight: torch.Tensor, other: torch.Tensor, inputs: InputStatistics) -> float:
    assert inputs.gram is not None
    difference = weight - other
    return float((difference @ inputs.gram * difference).sum())


@pytest.mark.parametrize("group", [32, 64])
def test_rounding_keeps_zeros_and_lowers_the_output_error(group: int) -> None:
    weight, inputs = sparse_weight(), statistics()
    before = weight.clone()
    rounded = round_columns(weight, inputs, group)
    assert torch.equal(weight, before)
    assert rounded.codes.dtype == torch.int8
    assert rounded.codes.abs().max() == 7
    assert rounded.scales.shape == (24, 128 // group)
    assert (rounded.weight[weight == 0] == 0).all()
    nearest = to_nearest(weight, group)
    assert output_error(weight, rounded.weight, inputs) < 0.7 * output_error(
        weight, nearest, inputs
    )


def test_without_tokens_weights_are_rounded_to_the_nearest() -> None:
    weight = sparse_weight()
    inputs = InputStatistics.empty(128, torch.device("cpu"), gram=True)
    torch.testing.assert_close(round_columns(weight, inputs, 64).weight, to_nearest(weight, 64))


def test_a_group_of_zeros_stays_zero() -> None:
    weight = sparse_weight()
    weight[3, 64:] = 0
    rounded = round_columns(weight, statistics(), 64)
    assert (rounded.weight[3, 64:] == 0).all()
    assert rounded.weight.isfinite().all()


def test_scales_have_the_dtype_of_the_checkpoint() -> None:
    rounded = round_columns(sparse_weight(), statistics(), 64, torch.bfloat16)
    assert rounded.weight.dtype == rounded.scales.dtype == torch.bfloat16
    assert rounded.codes.abs().max() <= 7


def test_weights_on_the_grid_stay_there() -> None:
    codes = torch.randint(-7, 8, (8, 64), dtype=torch.int8)
    codes[:, ::64] = 7
    weight = RoundedMatrix(codes, torch.full((8, 1), 0.25)).weight
    assert torch.equal(round_columns(weight, statistics(columns=64), 64).codes, codes)


def test_inputs_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="q_proj has 96 inputs, which do not divide into groups"):
        round_columns(torch.randn(8, 96), statistics(columns=96), 64, name="q_proj")
