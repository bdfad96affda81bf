"""Sensitivities of sites against the definition of the divergence, and the sparsity they give."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.calibration import examples
from helpers.checkpoints import on_disk, saved
from helpers.tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_cap import CAPConfig
from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.methods.statistics import InputStatistics
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.hooks import hidden_states_of
from optimum_cap.models.modes import evaluation_mode, without_parameter_grads
from optimum_cap.models.sites import Matrix, Site, matrices_by_layer, oriented, prunable_matrices
from optimum_cap.models.view import ModelView
from optimum_cap.pruning import fisher as engine
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.allocation import interventional, uniform
from optimum_cap.pruning.cache import SensitivityStore
from optimum_cap.pruning.fisher import WandaApproximation, estimate_sensitivities
from optimum_cap.pruning.sensitivity import (
    Sensitivity,
    examples_to_measure,
    measure_sensitivities,
)
from optimum_cap.runtime.files import TensorFiles

SETTINGS = CAPConfig(sparsity=0.5)


def halved(model: PreTrainedModel, factor: float = 0.5) -> Any:
    """Prunes by scaling: no statistics are needed to say what it does."""
    return lambda matrix, inputs: factor * oriented(model, matrix)


def measured_sensitivities(
    model: PreTrainedModel, rows: list[CalibrationExample], **options: Any
) -> list[Sensitivity]:
    sites = find_sites(model)
    return measure_sensitivities(
        ModelView(model, sites), matrices_by_layer(sites), rows, halved(model), **options
    )


def divergences_by_definition(
    dense: PreTrainedModel, changed: PreTrainedModel, rows: list[CalibrationExample]
) -> torch.Tensor:
    """Mean over the scored tokens of each example, `[examples]`, token by token."""
    means = []
    for row in rows:
        with torch.no_grad():
            expected, given = (
                model(input_ids=row.input_ids[None]).logits[0].double().log_softmax(-1)
                for model in (dense, changed)
            )
        positions = row.scored.nonzero()[:, 0] - 1
        each = (expected.exp() * (expected - given)).sum(-1)[positions]
        means.append(each.mean())
    return torch.stack(means)


def test_divergence_is_that_of_two_full_passes(model: PreTrainedModel) -> None:
    rows = examples(5)
    measured = measured_sensitivities(model, rows)
    assert [sensitivity.site for sensitivity in measured] == find_sites(model)
    for sensitivity in measured[:: max(1, len(measured) // 6)]:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for matrix in sensitivity.matrices:
                oriented(changed, matrix).mul_(0.5)
        expected = divergences_by_definition(model, changed, rows)
        assert sensitivity.divergence == pytest.approx(float(expected.mean()), rel=2e-3, abs=1e-6)
        error = float(expected.std()) / 5**0.5
        assert sensitivity.standard_error == pytest.approx(error, rel=2e-3, abs=1e-6)
        sizes = [oriented(model, matrix).numel() for matrix in sensitivity.matrices]
        assert list(sensitivity.sizes) == sizes
        assert sensitivity.weights == sum(sizes)
    # Far above what `approx` tolerates: where norms follow the blocks, scaling changes little.
    assert max(sensitivity.divergence for sensitivity in measured) > 1e-3


def test_all_examples_give_statistics_and_the_first_ones_are_measured(
    llama: PreTrainedModel,
) -> None:
    rows, sites = examples(6), find_sites(llama)
    tokens = set()

    def prune(matrix: Matrix, inputs: InputStatistics) -> torch.Tensor:
        tokens.add(inputs.tokens)
        assert inputs.gram is not None
        return 0.5 * oriented(llama, matrix)

    few = measure_sensitivities(
        ModelView(llama, sites), matrices_by_layer(sites), rows, prune, count=2
    )
    assert tokens == {sum(len(row.input_ids) for row in rows)}
    for ours, expected in zip(
        few, measured_sensitivities(llama, rows[:2], gram=False), strict=True
    ):
        assert ours.divergence == pytest.approx(expected.divergence, rel=1e-4)


def test_answers_weigh_more_in_the_statistics(llama: PreTrainedModel) -> None:
    rows, sites = examples(4), find_sites(llama)
    seen: dict[Matrix, InputStatistics] = {}

    def prune(matrix: Matrix, inputs: InputStatistics) -> torch.Tensor:
        seen[matrix] = inputs
        return oriented(llama, matrix)

    layers = matrices_by_layer(sites)
    measure_sensitivities(ModelView(llama, sites), layers, rows, prune, answer_weight=3)
    with evaluation_mode(llama):
        expected = LayerwisePass(ModelView(llama, sites), rows, answer_weight=3).statistics(
            0, layers[0]
        )
    for matrix, statistics in expected.items():
        torch.testing.assert_close(seen[matrix].squares, statistics.squares)


def test_a_single_example_has_no_standard_error(llama: PreTrainedModel) -> None:
    assert all(
        r.standard_error != r.standard_error for r in measured_sensitivities(llama, examples(1))
    )


def test_a_site_that_breaks_the_model_is_said(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    sites = find_sites(llama)
    broken = sites[1].name

    def prune(matrix: Matrix, inputs: InputStatistics) -> torch.Tensor:
        return oriented(llama, matrix) * (torch.inf if matrix == sites[1].output_proj else 0.5)

    found = measure_sensitivities(
        ModelView(llama, sites), matrices_by_layer(sites), examples(3), prune
    )
    assert [r.site.name for r in found if not r.divergence < torch.inf] == [broken]
    assert f"pruning {broken} alone gives predictions that are not finite" in caplog.text
    total = sum(sensitivity.weights for sensitivity in found)
    given = interventional(found, total // 2, 0.1)
    lowest = min(sparsities(found, given))
    assert sparsities(found, given)[1] == pytest.approx(lowest, abs=2 / found[1].weights)


def interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_comes_back_as_it_was(interrupted: bool, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype).train()
    before = copy.deepcopy(model.state_dict())
    if interrupted:
        passed = iter(range(9))

        def stop(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            if next(passed) == 2:
                raise KeyboardInterrupt

        handle = model.model.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            measured_sensitivities(model, examples(3))
        handle.remove()
    else:
        measured_sensitivities(model, examples(3))
    assert_untouched(model, before)


def test_an_interrupt_while_a_site_is_pruned_restores_it(llama: PreTrainedModel) -> None:
    before = copy.deepcopy(llama.state_dict())
    weight = llama.model.layers[1].mlp.down_proj.weight
    original = weight.clone()

    def stop(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.equal(weight, original):
            raise KeyboardInterrupt

    handle = llama.model.layers[1].mlp.down_proj.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        measured_sensitivities(llama, examples(3))
    handle.remove()
    assert_untouched(llama.train(), before)


def test_an_interrupt_between_two_sites_restores_the_model(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16).train()
    before = copy.deepcopy(model.state_dict())
    store = SensitivityStore(TensorFiles(tmp_path), "sensitivities")
    store.put_measured = interrupt
    with pytest.raises(KeyboardInterrupt) as error:
        measured_sensitivities(model, examples(3), store=store)
    assert error.tb is not None, "the frames are still alive"
    assert_untouched(model, before)


def assert_untouched(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert {t.dtype for t in after.values()} == {t.dtype for t in before.values()}
    for module in model.modules():
        assert module.training
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_sensitivities_of_an_offloaded_model_are_the_same(name: str, tmp_path: Path) -> None:
    folder, rows = saved(tmp_path / "model", name), examples(4)
    found = []
    for model in (
        AutoModelForCausalLM.from_pretrained(folder),
        on_disk(folder, tmp_path / "offload"),
    ):
        weights = AutoModelForCausalLM.from_pretrained(folder)
        sites = find_sites(model)
        layers = matrices_by_layer(sites)
        found.append(measure_sensitivities(ModelView(model, sites), layers, rows, halved(weights)))
    assert found[0] == found[1]


def test_measuring_costs_about_a_pass_over_the_examples() -> None:
    # 4 layers of 2 sites: 8 + 6 + 4 + 2 = 20 passes through a layer, of 4 that a whole pass takes.
    assert examples_to_measure([2, 2, 2, 2], 200) == 40
    assert examples_to_measure([2, 2, 2, 2], 60) == 16
    assert examples_to_measure([2, 2, 2, 2], 9) == 9
    assert examples_to_measure([1], 100) == 100
    assert examples_to_measure([0, 0], 100) == 100


# Estimated


def estimates(
    model: PreTrainedModel, rows: list[CalibrationExample], sparsity: float = 0.5, **options: Any
) -> list[Sensitivity]:
    sites, layers = find_sites(model), matrices_by_layer(find_sites(model))
    total = sum(oriented(model, matrix).numel() for own in layers.values() for matrix in own)
    uniform_zeros = uniform(
        ModelView(model, sites), layers, round(sparsity * total), rows, SETTINGS
    )
    view = ModelView(model, sites)
    return estimate_sensitivities(view, layers, rows, uniform_zeros, **options).sensitivities


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral", "gemma2"])
def test_estimates_are_positive_and_the_same_twice(name: str) -> None:
    model = tiny_model(name)
    before = copy.deepcopy(model.state_dict())
    first, second = (estimates(model, examples(6)) for _ in range(2))
    assert first == second
    assert [sensitivity.site for sensitivity in first] == find_sites(model)
    assert all(
        sensitivity.divergence > 0 for sensitivity in first if sensitivity.site.kind != "expert"
    )
    assert estimates(model, examples(6), seed=1) != first
    assert_untouched(model.train(), before)


def test_estimates_of_small_changes_are_about_the_divergence() -> None:
    model, rows = tiny_model("llama", initializer_range=0.1), examples(64, longest=12)
    sites, layers = find_sites(model), matrices_by_layer(find_sites(model))
    total = sum(oriented(model, matrix).numel() for own in layers.values() for matrix in own)
    uniform_zeros = uniform(ModelView(model, sites), layers, round(0.3 * total), rows, SETTINGS)
    estimated = estimate_sensitivities(
        ModelView(model, sites), layers, rows, uniform_zeros, count=64
    ).sensitivities

    def prune(matrix: Matrix, inputs: InputStatistics) -> torch.Tensor:
        rough = WandaApproximation(ModelView(model, sites), uniform_zeros)
        rough.fit({matrix: inputs})
        return rough.pruned(matrix)

    exact = measure_sensitivities(ModelView(model, sites), layers, rows, prune, count=64)
    assert max(sensitivity.divergence for sensitivity in exact) < 0.05
    ratios = [e.divergence / x.divergence for e, x in zip(estimated, exact, strict=True)]
    assert all(0.5 < ratio < 2 for ratio in ratios), ratios


def test_estimates_use_every_eighth_example_and_at_least_16(llama: PreTrainedModel) -> None:
    rows = examples(20, longest=9)
    assert estimates(llama, rows) == estimates(llama, rows, count=16)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_estimates_are_those_of_examples_one_by_one(name: str) -> None:
    model, rows = tiny_model(name), examples(6)
    alone = estimates(model, rows, memory_budget=1)
    for one, other in zip(alone, estimates(model, rows), strict=True):
        assert one.divergence == pytest.approx(other.divergence, rel=1e-3, abs=1e-9)
        assert one.standard_error == pytest.approx(other.standard_error, rel=1e-3, abs=1e-9)


def whole_backward(
    model: PreTrainedModel, rows: list[CalibrationExample], seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients at output modules, and sums of squares at matrices, by autograd of the model.

    All rows have the same length and scored tokens.
    """
    sites = find_sites(model)
    modules = {site.output_module: model.get_submodule(site.output_module) for site in sites}
    matrices = [matrix for matrix in prunable_matrices(sites) if matrix.expert is None]
    linears = {matrix.name: model.get_submodule(matrix.module) for matrix in matrices}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = hidden_states_of(output)
            hidden.requires_grad_() if hidden.is_leaf else hidden.retain_grad()
            outputs[name] = hidden

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in {**linears, **modules}.items()]
    embedding = model.get_input_embeddings()
    handles.append(embedding.register_forward_hook(lambda m, a, o: o.requires_grad_()))
    ids = torch.stack([row.input_ids for row in rows])
    before = rows[0].scored.nonzero().flatten() - 1
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, before]
        draws = [
            engine.fisher_draw(of_row.detach().softmax(dim=-1), engine._generator(seed, index))
            for index, of_row in enumerate(logits)
        ]
        ((logits * torch.stack(draws)).sum() / len(before) ** 0.5).backward()
    for handle in handles:
        handle.remove()
    squares = {
        name: outputs[name].grad.reshape(-1, outputs[name].shape[-1]).square().sum(dim=0)
        for name in linears
    }
    return {name: outputs[name].grad for name in modules}, squares


def test_the_backward_pass_is_that_of_the_whole_model(every_architecture: str) -> None:
    model, rows = tiny_model(every_architecture), examples(5, longest=7)
    view = ModelView.of(model)
    found, weights = {}, {}
    with evaluation_mode(model), without_parameter_grads(model):
        expected, squares = whole_backward(model, rows, 3)
        layerwise = LayerwisePass(view, rows)
        backward = engine.BackwardPass(view, layerwise, 3)
        for layer in range(len(view.layers)):
            backward.record(layer)
            layerwise.advance(layer)
        backward.begin()
        for layer in reversed(range(len(view.layers))):
            sites = [site for site in view.sites if site.layer == layer]
            groups = [(site, prunable_matrices([site])) for site in sites]
            backward.run(layer, 0, groups, weights)
            found |= backward._of_outputs
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)
    assert {matrix.name for matrix in weights} == squares.keys()
    for matrix, weight in weights.items():
        torch.testing.assert_close(weight, squares[matrix.name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mixtral", "opt"])
def test_products_are_those_of_changed_outputs(name: str) -> None:
    model, rows = tiny_model(name), examples(4)
    view = ModelView.of(model)
    site = next(site for site in view.sites if site.layer == 1 and site.kind != "attention")
    with evaluation_mode(model), without_parameter_grads(model):
        layerwise = LayerwisePass(view, rows)
        backward = engine.BackwardPass(view, layerwise, 0)
        for layer in range(len(view.layers)):
            backward.record(layer)
            layerwise.advance(layer)
        backward.begin()
        inputs = copy.copy(backward._inputs[1])
        for layer in reversed(range(1, len(view.layers))):
            sites = [other for other in view.sites if other.layer == layer]
            gradients = copy.copy(backward._gradients)
            backward.run(layer, 0, [(other, prunable_matrices([other])) for other in sites], {})
        pruned = {matrix: 0.9 * oriented(model, matrix) for matrix in prunable_matrices([site])}
        found = backward.product_with_change(site, pruned, 0)
        dense = layerwise.run(1, layerwise.batches[0], inputs[0])
        for matrix, weight in pruned.items():
            oriented(model, matrix).copy_(weight)
        change = layerwise.run(1, layerwise.batches[0], inputs[0]) - dense
    # A small change of the output of the block is one of the layer, to first order.
    expected = (gradients[0] * change).sum(dim=(1, 2)).double()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=1e-4 * float(expected.abs().max()))
    assert (found != 0).any()


def test_draws_have_the_moments_of_the_likelihoods_gradient() -> None:
    probabilities = torch.tensor([0.5, 0.1, 0.38, 0.02])
    generator = torch.Generator().manual_seed(3)
    draw = engine.fisher_draw(probabilities.expand(50_000, 4), generator)
    torch.testing.assert_close(draw.mean(dim=0), torch.zeros(4), atol=0.01, rtol=0)
    covariance = probabilities.diag() - probabilities.outer(probabilities)
    torch.testing.assert_close(draw.T @ draw / 50_000, covariance, atol=0.005, rtol=0)


def test_offloaded_weights_give_the_same_estimates(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "model"))
    expected = estimates(model, examples(3))
    found = estimates(on_disk(tmp_path / "model", tmp_path / "offload"), examples(3))
    assert [each.divergence for each in found] == [each.divergence for each in expected]


# Sparsities


def sensitivity(layer: int, divergence: float, *sizes: int) -> Sensitivity:
    name = f"model.layers.{layer}.mlp.down_proj"
    site = Site(name, "mlp", layer, f"model.layers.{layer}", f"model.layers.{layer}.mlp", 8, ())
    matrices = tuple(Matrix(f"{name}.{index}") for index in range(len(sizes)))
    return Sensitivity(site, matrices, sizes, divergence, 0.0)


def sparsities(found: list[Sensitivity], given: dict[Matrix, int]) -> list[float]:
    return [sum(given[matrix] for matrix in r.matrices) / r.weights for r in found]


@pytest.mark.parametrize("zeros", [1, 77, 1500, 2999, 3000, 5000, 5999])
@pytest.mark.parametrize("bound", [0.05, 0.1, 0.6])
def test_shares_add_up_within_the_bound(zeros: int, bound: float) -> None:
    found = [
        sensitivity(0, 3.0, 500, 700),
        sensitivity(1, 0.01, 800),
        sensitivity(2, 1e-9, 1000, 1500),
        sensitivity(3, 0.4, 1500),
    ]
    given = interventional(found, zeros, bound)
    assert sum(given.values()) == zeros
    overall = zeros / 6000
    low, high = overall - min(bound, overall / 2), overall + min(bound, (1 - overall) / 2)
    for each, sparsity in zip(found, sparsities(found, given), strict=True):
        assert low - 1 / each.weights <= sparsity <= high + 1 / each.weights
        for matrix, size in zip(each.matrices, each.sizes, strict=True):
            assert 0 <= given[matrix] <= size
            assert abs(given[matrix] - sparsity * size) <= 1


def test_a_site_e_times_as_fragile_gets_a_tenth_less() -> None:
    found = [sensitivity(0, 1.0, 100_000), sensitivity(1, 2.718281828, 100_000)]
    first, second = sparsities(found, interventional(found, 100_000, 0.3))
    assert first - second == pytest.approx(0.1, abs=1e-4)


def test_equal_sensitivities_per_weight_give_equal_sparsity() -> None:
    found = [sensitivity(0, 0.2, 1000), sensitivity(1, 0.6, 1000, 2000), sensitivity(2, 0.1, 500)]
    given = interventional(found, 2250, 0.1)
    assert sparsities(found, given) == [0.5, 0.5, 0.5]


def test_nothing_that_is_known_moves_nothing() -> None:
    found = [sensitivity(0, float("nan"), 1000), sensitivity(1, float("inf"), 1000)]
    assert sparsities(found, interventional(found, 800, 0.1)) == [0.4, 0.4]


def test_no_change_at_all_moves_nothing() -> None:
    found = [sensitivity(0, 0.0, 1000), sensitivity(1, 0.0, 3000)]
    assert sparsities(found, interventional(found, 1600, 0.1)) == [0.4, 0.4]


def test_of_sites_that_change_nothing_only_one_that_breaks_the_model_is_spared() -> None:
    found = [
        sensitivity(0, 0.0, 1000),
        sensitivity(1, 0.0, 3000),
        sensitivity(2, float("inf"), 1000),
    ]
    first, second, broken = sparsities(found, interventional(found, 2500, 0.1))
    assert first == second > 0.5
    assert broken == 0.4


def test_most_sites_without_any_change_do_not_decide_by_their_size() -> None:
    found = [sensitivity(0, 0.0, 1000), sensitivity(1, 0.0, 1000), sensitivity(2, 0.1, 1000)]
    found += [sensitivity(3, 0.1, 1000), sensitivity(4, 0.0, 1000)]
    spared = sparsities(found, interventional(found, 2500, 0.1))
    assert spared == pytest.approx([0.567, 0.567, 0.4, 0.4, 0.567], abs=2e-3)
