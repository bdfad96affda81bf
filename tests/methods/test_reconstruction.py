"""SparseGPT and ALPS against their definitions, inverse by inverse and row by row."""

import pytest
import torch

from optimum_cap.methods import reconstruction
from optimum_cap.methods.criteria import CriterionInputs, wanda
from optimum_cap.methods.masks import mask_per_row
from optimum_cap.methods.reconstruction import (
    Reconstruction,
    alps,
    correct_toward_dense,
    sparsegpt,
)
from optimum_cap.methods.statistics import InputStatistics

both = pytest.mark.parametrize("prune", [alps, sparsegpt])


def correlated(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    output_proj = torch.randn(columns, columns, generator=generator)
    scale = torch.rand(columns, generator=generator) + 0.1
    return torch.randn(tokens, columns, generator=generator) @ output_proj * scale


def matrix(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics.empty(inputs.shape[1], inputs.device, gram=True)
    statistics.add_(inputs)
    return statistics


def by_definition(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    zeros: int,
    pattern: tuple[int, int] | None,
    width: int,
) -> torch.Tensor:
    """Column by column with an inverse of its own for each, in float64.

    Removing weight j of a row changes the columns after it by -w_j / [H_j^-1]_00 * [H_j^-1]_0, and
    the output by w_j^2 / [H_j^-1]_00, where H_j is the Hessian of the columns from j on.
    """
    weight, columns = weight.double().clone(), weight.shape[1]
    hessian = inputs.double().T @ inputs.double() / len(inputs)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns).double()
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    size, before = len(weight), 0
    keep = torch.ones_like(weight, dtype=torch.bool)
    for j in range(columns):
        group = pattern[1] if pattern else width
        if j % group == 0:
            stop = min(j + group, columns)
            losses = torch.stack([weight[:, c] ** 2 / inverses[c][0, 0] for c in range(j, stop)], 1)
            if pattern:
                for row in range(size):
                    for c in losses[row].argsort()[: pattern[1] - pattern[0]].tolist():
                        keep[row, j + c] = False
            else:
                share = zeros * size * stop // weight.numel() - before
                before += share
                flat = losses.flatten().argsort()[:share]
                keep[flat // (stop - j), j + flat % (stop - j)] = False
        removed = weight[:, j].masked_fill(keep[:, j], 0)
        weight[:, j:] -= removed[:, None] / inverses[j][0, 0] * inverses[j][0]
        weight[:, j] *= keep[:, j]
    return weight


@pytest.mark.parametrize(
    ("zeros", "pattern"), [(300, None), (77, None), (0, None), (0, (2, 4)), (0, (4, 8))]
)
@pytest.mark.parametrize("width", [8, 128])
def test_follows_the_definition(
    zeros: int, pattern: tuple[int, int] | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruction, "BLOCK", width)
    inputs, weight = correlated(400, 40), matrix(12, 40)
    new = sparsegpt(weight, statistics_of(inputs), zeros, pattern)
    expected = by_definition(weight, inputs, zeros, pattern, width)
    torch.testing.assert_close(new.double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(new == 0, expected == 0)
    wanted = zeros if pattern is None else 12 * 40 * (pattern[1] - pattern[0]) // pattern[1]
    assert int((new == 0).sum()) == wanted


@pytest.mark.parametrize("columns", [40, 300])
def test_output_stays_closer_than_with_the_masks_of_wanda(columns: int) -> None:
    inputs, weight = correlated(1000, columns), matrix(24, columns)
    statistics, zeros = statistics_of(inputs), weight.numel() // 2
    updated = sparsegpt(weight, statistics, zeros)
    masked = weight * mask_per_row(wanda(weight, CriterionInputs("", statistics=statistics)), zeros)
    errors = [(inputs @ (weight - new).T).square().sum() for new in (updated, masked)]
    assert int((updated == 0).sum()) == zeros
    assert errors[0] < 0.85 * errors[1]


@both
def test_the_weight_is_not_changed(prune: Reconstruction) -> None:
    weight = matrix(6, 16)
    before = weight.clone()
    prune(weight, statistics_of(correlated(50, 16)), 48, None, "")
    assert torch.equal(weight, before)


@both
def test_channels_without_input_go_first_and_only_as_far_as_asked(prune: Reconstruction) -> None:
    inputs, weight = correlated(50, 16), matrix(6, 16)
    inputs[:, [3, 8]] = 0
    all_dead = prune(weight, statistics_of(inputs), 12, None, "")
    assert (all_dead[:, [3, 8]] == 0).all()
    assert int((all_dead == 0).sum()) == 12
    assert int((prune(weight, statistics_of(inputs), 5, None, "") == 0).sum()) == 5


@both
def test_a_channel_without_input_changes_nothing_about_the_others(prune: Reconstruction) -> None:
    inputs, weight = 1e-4 * correlated(50, 16), matrix(6, 16)
    dead = torch.cat([inputs, torch.zeros(50, 2)], dim=1)
    wider = prune(torch.cat([weight, matrix(6, 2)], dim=1), statistics_of(dead), 60, None, "")
    torch.testing.assert_close(wider[:, :16], prune(weight, statistics_of(inputs), 48, None, ""))


@both
def test_without_tokens_the_magnitude_decides_and_nothing_is_updated(
    prune: Reconstruction,
) -> None:
    weight = matrix(6, 16)
    new = prune(weight, InputStatistics.empty(16, weight.device, gram=True), 40, None, "")
    smallest = weight.abs().flatten().argsort()[:40]
    expected = weight.flatten().index_fill(0, smallest, 0).view_as(weight)
    assert torch.equal(new, expected)


@both
def test_fewer_tokens_than_channels_work(prune: Reconstruction) -> None:
    new = prune(matrix(6, 64), statistics_of(correlated(5, 64)), 192, None, "")
    assert new.isfinite().all()
    assert int((new == 0).sum()) == 192


def test_more_damping_is_tried_and_said(caplog: pytest.LogCaptureFixture) -> None:
    statistics = statistics_of(correlated(50, 16))
    # Rounding can leave a Hessian with a negative eigenvalue; here it is made to.
    vector = torch.ones(16) / 4
    statistics.gram -= vector.outer(vector) * float(vector @ statistics.gram @ vector)
    statistics.gram -= 0.05 * statistics.gram.diagonal().mean() * vector.outer(vector)
    new = sparsegpt(matrix(6, 16), statistics, 48, name="layers.3.q_proj")
    assert new.isfinite().all()
    assert "layers.3.q_proj: a damping of 0.01 is not enough, trying 0.1" in caplog.text


def test_inputs_that_are_not_finite_are_an_error() -> None:
    inputs = correlated(50, 16)
    inputs[3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.3\.q_proj: the Hessian .* not finite"):
        sparsegpt(matrix(6, 16), statistics_of(inputs), 48, name="layers.3.q_proj")


def test_statistics_without_gram_are_an_error() -> None:
    statistics = InputStatistics.empty(16, torch.device("cpu"), gram=False)
    with pytest.raises(ValueError, match="the input statistics have no gram"):
        sparsegpt(matrix(6, 16), statistics, 48)


@pytest.mark.parametrize("zeros", [0, 1, 77, 240, 479])
def test_alps_leaves_exactly_so_many_zeros(zeros: int) -> None:
    new = alps(matrix(12, 40), statistics_of(correlated(400, 40)), zeros)
    assert int((new == 0).sum()) == zeros


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_patterns_of_alps_hold_in_every_row(pattern: tuple[int, int]) -> None:
    new = alps(matrix(12, 40), statistics_of(correlated(400, 40)), 0, pattern)
    assert ((new.reshape(12, -1, pattern[1]) != 0).sum(-1) == pattern[0]).all()


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_output_of_alps_stays_closer_than_that_of_sparsegpt(
    sparsity: float, pattern: tuple[int, int] | None
) -> None:
    inputs, weight = correlated(2000, 96), matrix(48, 96)
    statistics, zeros = statistics_of(inputs), round(sparsity * weight.numel())
    errors = [
        (inputs @ (weight - prune(weight, statistics, zeros, pattern)).T).square().sum()
        for prune in (alps, sparsegpt)
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("zeros", [100, 240, 400])
def test_what_alps_keeps_is_the_least_squares_solution(
    zeros: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruction, "FITTING_STEPS", 200)
    inputs, weight = correlated(400, 40), matrix(12, 40)
    new = alps(weight, statistics_of(inputs), zeros)
    hessian = inputs.double().T @ inputs.double() / len(inputs)
    hessian += 0.05 * hessian.diagonal().mean() * torch.eye(40)
    expected = torch.zeros(12, 40, dtype=torch.float64)
    for row, kept in enumerate(new != 0):
        wanted = hessian[kept] @ weight[row].double()
        expected[row, kept] = torch.linalg.solve(hessian[kept][:, kept], wanted)
    torch.testing.assert_close(new.double(), expected, rtol=1e-3, atol=1e-3)


def test_alps_gives_the_same_bytes_twice() -> None:
    statistics = statistics_of(correlated(400, 40))
    first, second = (alps(matrix(12, 40), statistics, 240) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_alps_takes_weights_however_they_are_stored_and_leaves_them(
    pattern: tuple[int, int] | None,
) -> None:
    statistics, by_rows = statistics_of(correlated(900, 300)), matrix(80, 300)
    gram, by_columns = statistics.gram, by_rows.T.contiguous().T
    assert gram is not None
    before = gram.clone()
    first, second = (alps(w, statistics, 12_000, pattern) for w in (by_rows, by_columns))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert torch.equal(by_rows, matrix(80, 300))
    assert torch.equal(by_columns, by_rows)
    assert torch.equal(gram, before)


def test_inverse_with_a_penalty() -> None:
    inputs = correlated(400, 40).double()
    hessian = inputs.T @ inputs / 400
    before = hessian.clone()
    found = reconstruction._inverse(hessian, 0.03)
    expected = torch.linalg.inv(hessian + 0.03 * torch.eye(40).double())
    torch.testing.assert_close(found, expected)
    assert torch.equal(hessian, before)


def test_corrected_is_three_quarters_of_the_way_to_a_ridge_regression() -> None:
    """Of the dense model's outputs on the inputs that there are, held to the dense weights."""
    inputs, weight = correlated(400, 40), matrix(12, 40)
    expected_outputs = (inputs + 0.3 * correlated(400, 40, seed=2)) @ weight.T
    statistics = statistics_of(inputs)
    statistics.output_error_moment = (expected_outputs - inputs @ weight.T).T @ inputs
    ridge = (0.01 * statistics.squares.mean()).sqrt() * torch.eye(40)
    solution = torch.linalg.lstsq(
        torch.cat([inputs, ridge]).double(),
        torch.cat([expected_outputs, ridge @ weight.T]).double(),
    ).solution.T
    corrected = correct_toward_dense(weight, statistics)
    whole = weight + (corrected - weight) / 0.75
    torch.testing.assert_close(whole.double(), solution, rtol=1e-3, atol=1e-3)


def test_nothing_is_corrected_where_nothing_is_known() -> None:
    weight = matrix(6, 16)
    assert correct_toward_dense(weight, statistics_of(correlated(50, 16))) is weight
    unseen = InputStatistics.empty(16, weight.device, gram=True)
    unseen.output_error_moment = torch.zeros(6, 16)
    assert correct_toward_dense(weight, unseen) is weight


def test_outputs_that_miss_what_is_not_finite_are_an_error() -> None:
    statistics = statistics_of(correlated(50, 16))
    statistics.output_error_moment = torch.full((6, 16), torch.nan)
    with pytest.raises(ValueError, match=r"layers\.3\.q_proj: .* not finite, .*'local'"):
        correct_toward_dense(matrix(6, 16), statistics, "layers.3.q_proj")


def test_alps_is_not_led_by_a_single_unusual_channel() -> None:
    inputs, weight = correlated(1000, 64), matrix(4096, 64)
    weight[:, 0] *= 30
    statistics, zeros = statistics_of(inputs), round(0.6 * weight.numel())
    errors = [
        float(((solve(weight, statistics, zeros) - weight) @ inputs.T).square().sum())
        for solve in (alps, sparsegpt)
    ]
    assert errors[0] < 0.8 * errors[1]
