"""SparseGPT against the definition of optimal brain surgeon, inverse by inverse."""

import pytest
import torch

from optimum_cap import reconstruction
from optimum_cap.activations import InputStatistics
from optimum_cap.criteria import Evidence, wanda
from optimum_cap.masking import lowest_in_rows
from optimum_cap.reconstruction import sparsegpt


def correlated(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    scale = torch.rand(columns, generator=generator) + 0.1
    return torch.randn(tokens, columns, generator=generator) @ mixing * scale


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
    masked = weight * lowest_in_rows(wanda(weight, Evidence("", inputs=statistics)), zeros)
    errors = [(inputs @ (weight - new).T).square().sum() for new in (updated, masked)]
    assert int((updated == 0).sum()) == zeros
    assert errors[0] < 0.85 * errors[1]


def test_the_weight_is_not_changed() -> None:
    weight = matrix(6, 16)
    before = weight.clone()
    sparsegpt(weight, statistics_of(correlated(50, 16)), 48)
    assert torch.equal(weight, before)


def test_channels_without_input_go_first_and_only_as_far_as_asked() -> None:
    inputs, weight = correlated(50, 16), matrix(6, 16)
    inputs[:, [3, 8]] = 0
    all_dead = sparsegpt(weight, statistics_of(inputs), 12)
    assert (all_dead[:, [3, 8]] == 0).all()
    assert int((all_dead == 0).sum()) == 12
    assert int((sparsegpt(weight, statistics_of(inputs), 5) == 0).sum()) == 5


def test_without_tokens_the_magnitude_decides_and_nothing_is_updated() -> None:
    weight = matrix(6, 16)
    new = sparsegpt(weight, InputStatistics.empty(16, weight.device, gram=True), 40)
    smallest = weight.abs().flatten().argsort()[:40]
    expected = weight.flatten().index_fill(0, smallest, 0).view_as(weight)
    assert torch.equal(new, expected)


def test_fewer_tokens_than_channels_work() -> None:
    new = sparsegpt(matrix(6, 64), statistics_of(correlated(5, 64)), 192)
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
    assert "layers.3.q_proj: a damping of 0.01 does not suffice; trying 0.1" in caplog.text


def test_inputs_that_are_not_finite_are_an_error() -> None:
    inputs = correlated(50, 16)
    inputs[3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.3\.q_proj: the Hessian .* not finite"):
        sparsegpt(matrix(6, 16), statistics_of(inputs), 48, name="layers.3.q_proj")


def test_statistics_without_gram_are_an_error() -> None:
    statistics = InputStatistics.empty(16, torch.device("cpu"), gram=False)
    with pytest.raises(ValueError, match="the statistics x_i x_j of its inputs are needed"):
        sparsegpt(matrix(6, 16), statistics, 48)
