"""Estimators: gradients against finite differences, unbiasedness by enumeration, coverage."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.calibration import examples
from helpers.out_of_memory import OUT_OF_MEMORY, limit_gradients, limit_memory
from helpers.tiny_models import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from optimum_cap import config
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.sites import Site, SiteUnit, Unit
from optimum_cap.models.view import ModelView
from optimum_cap.scoring import sampling
from optimum_cap.scoring.estimators import ESTIMATORS
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.first_order import first_order_losses
from optimum_cap.scoring.plain import example_losses, plain_losses
from optimum_cap.scoring.sampling import (
    SampledLosses,
    adaptive_losses,
    chances_in_blocks,
    chances_of_drawing,
    control_variate_losses,
    draw_blocks,
    draw_examples,
)
from optimum_cap.scoring.scores import UnitLosses, causal_scores
from optimum_cap.scoring.settings import ScoringSettings


def names(losses: UnitLosses) -> list[tuple[str, int]]:
    return [(site.name, unit.index) for site, unit in losses.units]


def test_the_config_names_all_estimators() -> None:
    assert set(config.ESTIMATOR_NAMES) == set(ESTIMATORS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_config_knows_which_fields_an_estimator_uses(name: str) -> None:
    estimator = ESTIMATORS[name]
    used = set(estimator.fields) - {"seed"}  # which every calibration set uses
    used |= {"resume_dir"} if estimator.resumes else set()
    used |= {"torch_compile"} if estimator.compiles else set()
    assert set(config.ESTIMATOR_FIELDS[name]) == used


def scaled_losses(model: PreTrainedModel, site: Site, unit: Unit, factor: float) -> torch.Tensor:
    """Losses with one unit scaled by its columns in the projection, `[examples]`."""
    columns = unit.region[0].of(model.get_parameter(unit.region[0].parameter).data)
    saved = columns.clone()
    columns.mul_(factor)
    losses = example_losses(model, examples())
    columns.copy_(saved)
    return losses


def test_first_order_is_the_derivative(model: PreTrainedModel) -> None:
    """Central differences of the loss in the scale of a unit, on every architecture."""
    sites = find_sites(model, mlp_unit_size=8)
    found = first_order_losses(ModelView(model, sites), examples())
    assert names(found) == names(plain_losses(ModelView(model, sites), examples(2)))
    torch.testing.assert_close(found.intact, example_losses(model, examples()), rtol=1e-5, atol=0)
    errors = []
    for index in range(0, len(found.units), 5):
        up, down = (scaled_losses(model, *found.units[index], factor) for factor in (1.01, 0.99))
        errors.append(found.masked[index] - found.intact - (down - up) / 0.02)
    # A router that chooses other experts, or a ReLU at its kink, has no derivative.
    assert torch.cat(errors).abs().quantile(0.8) < 2e-3
    assert (found.masked - found.intact).abs().quantile(0.9) > 5e-2


@pytest.mark.parametrize("name", ["mixtral", "glm4_moe"])
def test_first_order_of_experts_is_the_gradient_in_their_columns(name: str) -> None:
    """By autograd in a factor on the columns of each unit, on whole examples one at a time."""
    model, rows = tiny_model(name), examples(3)
    sites = [site for site in find_sites(model, mlp_unit_size=8) if site.kind == "expert"]
    found = first_order_losses(ModelView(model, sites), rows)
    assert len(found.units) >= 16
    model.requires_grad_(False)
    for index, (_, unit) in enumerate(found.units):
        name, factor = unit.region[0].parameter, torch.ones((), requires_grad=True)
        weight = model.get_parameter(name).clone()
        columns = unit.region[0].of(weight)
        columns.mul_(factor)
        for place, row in enumerate(rows):
            logits = functional_call(model, {name: weight}, row.input_ids[None]).logits[0]
            targets = row.scored.nonzero().flatten()
            loss = nn.functional.cross_entropy(logits[targets - 1], row.input_ids[targets])
            [gradient] = torch.autograd.grad(loss, factor, retain_graph=True)
            effect = found.masked[index, place] - found.intact[place]
            torch.testing.assert_close(-effect.float(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_channels_add_up_to_their_group(name: str) -> None:
    model, rows = tiny_model(name), examples(4)
    channels, groups = (
        first_order_losses(
            ModelView(model, [s for s in find_sites(model, size) if s.kind != "attention"]), rows
        )
        for size in (1, 5)
    )
    assert len(channels.units) == 5 * len(groups.units)
    sums = (channels.masked - channels.intact).view(-1, 5, 4).sum(dim=1)
    torch.testing.assert_close(sums, groups.masked - groups.intact, rtol=1e-5, atol=1e-9)


def test_first_order_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    model.train()
    learning = [parameter.requires_grad for parameter in model.parameters()]
    first_order_losses(ModelView.of(model), examples(3))
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_small_budget_gives_the_same_first_order(llama: PreTrainedModel) -> None:
    sites = find_sites(llama)
    torch.testing.assert_close(
        first_order_losses(
            ModelView(llama, sites), examples(), settings=ScoringSettings(memory_budget=20_000)
        ).masked,
        first_order_losses(ModelView(llama, sites), examples()).masked,
        rtol=1e-5,
        atol=1e-6,
    )


def test_first_order_continues_in_smaller_batches_where_memory_runs_out(
    llama: PreTrainedModel,
) -> None:
    sites, rows = find_sites(llama), examples()
    expected = first_order_losses(ModelView(llama, sites), rows)
    sizes = limit_gradients(llama, 2)
    losses = first_order_losses(ModelView(llama, sites), rows)
    torch.testing.assert_close(losses.masked, expected.masked, rtol=1e-4, atol=1e-6)
    assert max(sizes) > 2
    assert set(sizes[2:]) <= {1, 2, sizes[0] // 2, sizes[0] - sizes[0] // 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_first_order_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    sites = find_sites(model)
    narrow = first_order_losses(ModelView(model, sites), examples())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    wide = first_order_losses(ModelView(model.float(), sites), examples())
    torch.testing.assert_close(narrow.masked, wide.masked, rtol=1e-6, atol=0)


def all_draws(chances: torch.Tensor) -> list[tuple[float, float]]:
    """A start of each possible draw, and the probability of that draw.

    The draw changes where a point passes from one example to the next.
    """
    cuts = sorted({0.0, 1.0, *(chances.where(chances < 1, 0.0).cumsum(0) % 1).tolist()})
    pairs = itertools.pairwise(cuts)
    return [((low + high) / 2, high - low) for low, high in pairs if high - low > 1e-12]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_control_variate_is_unbiased(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all possible draws is the exact loss, of every unit and every example."""
    model, rows = tiny_model(name), examples(7)
    sites = [site for site in find_sites(model) if site.kind == "attention"]
    first_order = first_order_losses(ModelView(model, sites), rows)
    chances = chances_of_drawing(first_order, 2)
    assert chances.unique().numel() == 7
    estimates, probabilities = [], []
    for start, probability in all_draws(chances):
        drawn = draw_examples(chances, start)
        monkeypatch.setattr(sampling, "draw_examples", lambda *args, drawn=drawn, **_: drawn)
        estimates.append(
            control_variate_losses(ModelView(model, sites), rows, exact_examples=2).masked
        )
        probabilities.append(probability)
    assert len(estimates) >= 6
    exact = plain_losses(ModelView(model, sites), rows).masked
    mean = torch.einsum("d,due->ue", torch.tensor(probabilities).double(), torch.stack(estimates))
    torch.testing.assert_close(mean, exact, rtol=1e-5, atol=1e-6)
    # The agreement means something: one draw, and the first-order losses, are off by far more.
    assert (first_order.masked - exact).abs().max() > 1e-2
    assert (estimates[0] - exact).abs().max() > 1e-2


def effects_of(sizes: torch.Tensor) -> UnitLosses:
    """First-order losses of three units, with effects in proportion to `sizes`, and without."""
    intact = torch.full_like(sizes, 2.0)
    unit = Unit(0, (0, 1), ())
    site = Site("layer.o_proj", "attention", 0, "layer", "layer", 1, (unit,))
    masked = torch.stack([intact - sizes / 4, intact + 3 * sizes, intact])
    return UnitLosses([SiteUnit(site, unit)] * 3, intact, masked)


def estimated(
    first_order: UnitLosses, exact: torch.Tensor, drawn: list[int], chances: torch.Tensor
) -> UnitLosses:
    """The estimate with the exact losses of drawn examples, `[units, drawn]`."""
    losses = SampledLosses(first_order)
    losses.record(range(len(exact)), drawn, exact, chances)
    return losses.losses()


def overflowing(
    method: Callable[..., UnitLosses], unit: int, example: int
) -> Callable[..., UnitLosses]:
    """The method, with a masked loss that is not finite."""

    def losses_of(*args: Any) -> UnitLosses:
        losses = method(*args)
        losses.masked[unit, example] = math.inf
        return losses

    return losses_of


@given(
    sizes=st.lists(st.floats(0, 1e6), min_size=2, max_size=40),
    share=st.floats(0, 1),
)
def test_chances_of_drawing(sizes: list[float], share: float) -> None:
    examples, count = len(sizes), max(2, round(share * len(sizes)))
    chances = chances_of_drawing(effects_of(torch.tensor(sizes).double()), count)
    assert chances.sum() == pytest.approx(count)
    assert chances.max() <= 1
    assert chances.min() >= 0.75 * count / examples * (1 - 1e-9)
    for start in (0.0, 0.3, 1 - 2**-53):
        assert len(set(draw_examples(chances, start))) == count


def test_a_quarter_of_a_chance_is_in_proportion_to_the_effects() -> None:
    sizes = torch.tensor([1.0, 2.0, 3.0, 0.0, 4.0]).double()
    chances = chances_of_drawing(effects_of(sizes), 2)
    torch.testing.assert_close(chances, 0.3 + 0.05 * sizes)
    # 3 (3/4 1/5 + 1/4 96/100) is more than 1: the last is certain, the others share two draws.
    sizes = torch.tensor([1.0, 1.0, 1.0, 1.0, 96.0]).double()
    expected = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0]).double()
    torch.testing.assert_close(chances_of_drawing(effects_of(sizes), 3), expected)
    equal = torch.full((5,), 0.4).double()
    torch.testing.assert_close(chances_of_drawing(effects_of(0 * sizes), 2), equal)
    # What overflows has no size.
    sizes[4] = math.inf
    torch.testing.assert_close(
        chances_of_drawing(effects_of(sizes), 2),
        torch.tensor([0.425, 0.425, 0.425, 0.425, 0.3]).double(),
    )


def test_every_unit_has_the_same_say_in_the_chances() -> None:
    """A unit with small effects counts as much as one with large effects."""
    large, small = torch.tensor([9.0, 1.0, 0.0]).double(), torch.tensor([0.0, 1.0, 9.0]).double()
    losses = effects_of(large)
    losses.masked[0], losses.masked[1] = losses.intact + large, losses.intact + small / 1000
    chances = chances_of_drawing(losses, 2)
    torch.testing.assert_close(
        chances, 2 * (0.25 + 0.25 * torch.tensor([0.45, 0.1, 0.45])).double()
    )


@given(
    sizes=st.lists(st.floats(0.1, 100), min_size=4, max_size=30),
    count=st.integers(2, 4),
    part=st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_draws_have_their_chances(sizes: list[float], count: int, part: tuple[int, int]) -> None:
    """Over all draws, and each run of consecutive examples has its share in each of them."""
    chances = chances_of_drawing(effects_of(torch.tensor(sizes).double()), count)
    drawn = torch.zeros_like(chances)
    low, high = sorted(part)
    share = float(chances[low:high].sum())
    for start, probability in all_draws(chances):
        positions = draw_examples(chances, start)
        assert len(positions) == count
        drawn[positions] += probability
        assert abs(sum(low <= position < high for position in positions) - share) < 1 + 1e-9
    torch.testing.assert_close(drawn, chances, rtol=1e-6, atol=1e-9)


def test_drawing_by_effects_lowers_the_error() -> None:
    """Where few examples have large effects, and first-order errors go with them."""
    random = torch.Generator().manual_seed(0)
    sizes = torch.randn(64, generator=random).double().mul(2).exp()
    first_order = effects_of(sizes)
    noise = torch.randn(3, 64, generator=random).double()
    exact = first_order.masked + sizes * noise
    truth = exact.mean(dim=1)

    def squared_error(drawn: list[int], chances: torch.Tensor) -> torch.Tensor:
        losses = estimated(first_order, exact[:, drawn], drawn, chances)
        return (losses.masked.mean(dim=1) - truth).square().mean()

    chances = chances_of_drawing(first_order, 8)
    by_effects = sum(
        probability * squared_error(draw_examples(chances, start), chances)
        for start, probability in all_draws(chances)
    )
    draws = [draw_blocks(64, 8, seed) for seed in range(200)]
    equal = [squared_error([b[0] for b in draw], chances_in_blocks(draw, 1)) for draw in draws]
    assert by_effects < 0.3 * torch.stack(equal).mean()


def test_the_draw_takes_one_of_each_block_with_equal_chance() -> None:
    counts = np.zeros(7)
    for seed in range(600):
        blocks = draw_blocks(7, 2, seed)
        assert [sorted(block) for block in blocks] == [[0, 1, 2, 3], [4, 5, 6]]
        counts[[block[0] for block in blocks]] += 1
    assert np.allclose(counts[:4], 150, atol=45)
    assert np.allclose(counts[4:], 200, atol=50)
    assert draw_blocks(7, 2, 3) == draw_blocks(7, 2, 3)


def test_all_examples_drawn_is_exact(llama: PreTrainedModel) -> None:
    sites, rows = find_sites(llama), examples(6)
    exact = exact_losses(ModelView(llama, sites), rows)
    for losses in (
        control_variate_losses(ModelView(llama, sites), rows, exact_examples=6),
        adaptive_losses(ModelView(llama, sites), rows, exact_examples=2, precision=1e-9),
    ):
        torch.testing.assert_close(losses.masked, exact.masked, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            causal_scores(losses).standard_errors,
            causal_scores(exact).standard_errors,
            rtol=1e-4,
            atol=1e-7,
        )


def test_more_exact_examples_than_examples(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="exact_examples is 8, but there are only 7"):
        control_variate_losses(ModelView.of(llama), examples(7), exact_examples=8)
    with pytest.raises(ValueError, match="exact_examples is 1, but a standard error takes"):
        adaptive_losses(ModelView.of(llama), examples(7), exact_examples=1)


def sampled(
    exact: UnitLosses, first_order: UnitLosses, rows: np.ndarray, count: int, start: float
) -> UnitLosses:
    """The control variate on some examples of losses that are known already."""
    own = UnitLosses(exact.units, first_order.intact[rows], first_order.masked[:, rows])
    chances = chances_of_drawing(own, count)
    drawn = draw_examples(chances, start)
    return estimated(own, exact.masked[:, rows[drawn]], drawn, chances)


def known_losses(exact: list[float], chances: list[float]) -> UnitLosses:
    """The estimate where intact and first-order losses are 0, from exact ones, NaN if not drawn.

    Of three units that are the same.
    """
    zeros = torch.zeros(3, len(exact)).double()
    first_order = UnitLosses(effects_of(zeros[0]).units, zeros[0], zeros)
    drawn = [place for place, loss in enumerate(exact) if not math.isnan(loss)]
    losses = torch.tensor(exact).double()[drawn].expand(3, -1)
    return estimated(first_order, losses, drawn, torch.tensor(chances).double())


def test_standard_errors_by_hand() -> None:
    """Of a mean over six examples."""
    nan = math.nan
    # Equal chances: s^2 / N + s^2 (1/n - 1/N) = s^2 / n, with s^2 = 4.
    losses = known_losses([1, nan, 3, nan, 5, nan], [0.5] * 6)
    assert losses.standard_errors is not None
    assert losses.standard_errors[0] ** 2 == pytest.approx(4 / 3)
    # A certain example takes no part in what the draw leaves open, and is what was measured.
    some = known_losses([9, 1, nan, 3, nan, nan], [1, 0.4, 0.4, 0.4, 0.4, 0.4])
    assert some.masked[0].tolist() == pytest.approx([9, 2.5, 0, 7.5, 0, 0])
    weights = np.array([1, 2.5, 2.5]) / 6
    mean = weights @ [9, 1, 3]
    of_examples = weights @ (np.array([9, 1, 3]) - mean) ** 2 / (1 - weights @ weights) / 6
    of_draw = 2 * 0.6 * ((7.5 - 2.5) / 2) ** 2 * 2 / 6**2  # s^2 of 2 values, times 1 - chance
    assert some.standard_errors is not None
    assert some.standard_errors[0] ** 2 == pytest.approx(of_examples + of_draw)
    # One example that was not certain says nothing about what the others might have been.
    one = known_losses([9, 1, nan, nan, nan, nan], [1, 0.2, 0.2, 0.2, 0.2, 0.2]).standard_errors
    assert one is not None
    assert one.isnan().all()


def test_a_certain_example_is_what_was_measured_whatever_the_first_order_says(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = overflowing(first_order_losses, unit=1, example=3)
    monkeypatch.setattr(sampling, "first_order_losses", broken)
    sites, rows = find_sites(llama), examples(6)
    losses = control_variate_losses(ModelView(llama, sites), rows, exact_examples=6)
    exact = exact_losses(ModelView(llama, sites), rows)
    torch.testing.assert_close(losses.masked, exact.masked, rtol=0, atol=1e-6)
    assert losses.standard_errors is not None
    assert losses.standard_errors.isfinite().all()


def test_standard_errors_of_the_control_variate_cover() -> None:
    """Of the mean over all examples there are, about 95 % of the intervals hold it."""
    model, rows = tiny_model("llama"), examples(300)
    sites = [site for site in find_sites(model) if site.kind == "attention"]
    exact, first_order = (
        method(ModelView(model, sites), rows) for method in (exact_losses, first_order_losses)
    )
    truth = (exact.masked - exact.intact).mean(dim=1)
    random = np.random.default_rng(0)
    covered, widths, errors = [], [], []
    for _ in range(300):
        chosen = random.integers(300, size=64)
        losses = sampled(exact, first_order, chosen, 16, float(random.random()))
        error = (losses.masked - losses.intact).mean(dim=1) - truth
        assert losses.standard_errors is not None
        covered.append(error.abs() <= 1.96 * losses.standard_errors)
        widths.append(losses.standard_errors)
        errors.append(error)
    share = torch.stack(covered).double().mean(dim=0)
    assert 0.88 < float(share.mean()) < 0.98
    assert (share > 0.82).all()
    ratio = torch.stack(widths).square().mean(0).sqrt() / torch.stack(errors).std(0)
    assert 0.85 < float(ratio.mean()) < 1.15


def test_adaptive_spends_where_the_interval_is_wide(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, int]] = []

    def counting(*args: Any) -> UnitLosses:
        losses = exact_losses(*args)
        measured.append(losses.masked.shape)
        return losses

    monkeypatch.setattr(sampling, "exact_losses", counting)
    sites = [site for site in find_sites(llama) if site.kind == "attention"]
    rows = examples(24)
    loose = adaptive_losses(ModelView(llama, sites), rows, exact_examples=4, precision=0.2)
    units = [units for units, _ in measured]
    assert units == sorted(units, reverse=True)
    assert units[0] == 12
    assert len(units) > 1
    assert sum(math.prod(shape) for shape in measured) < 12 * 24
    scores = causal_scores(loose, 1, "mean").scores
    exact = causal_scores(exact_losses(ModelView(llama, sites), rows), 1, "mean").scores
    assert (scores - exact).abs().max() < 2 * 0.2 * (exact.max() - exact.min())

    measured.clear()
    adaptive_losses(ModelView(llama, sites), rows, exact_examples=4, precision=1e9)
    assert measured == [(12, 4)], "one round is the least"


@pytest.mark.slow
def test_adaptive_meets_a_lack_of_memory_once(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = limit_memory(monkeypatch, 100, OUT_OF_MEMORY["cuda"])
    rows = examples(24)
    adaptive_losses(ModelView.of(llama), rows, exact_examples=4, precision=1e-9)
    assert [message for message in caplog.messages if "memory ran out" in message] == (
        caplog.messages
    )
    assert len(caplog.messages) == 1
    assert max(tried[20:]) <= 100


def test_an_exact_loss_that_overflows_is_left_out(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = overflowing(exact_losses, unit=2, example=0)
    monkeypatch.setattr(sampling, "exact_losses", broken)
    rows = examples(12)
    losses = control_variate_losses(ModelView.of(llama), rows, exact_examples=4)
    scores = causal_scores(losses)
    assert scores.nonfinite.tolist() == [0, 0, 1, *[0] * (len(scores.units) - 3)]
    assert scores.scores.isfinite().all()
    assert scores.standard_errors.isfinite().all()
