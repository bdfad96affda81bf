"""Weights that several decoder layers share: they are pruned once, for all layers that use them."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.calibration import ROWS, examples
from helpers.checkpoints import same_weights
from helpers.every_architecture import small_model
from helpers.observed_inputs import observed_inputs
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.methods.statistics import InputStatistics
from optimum_cap.models import CannotRemoveError, ModelView
from optimum_cap.models.hooks import recorded_calls
from optimum_cap.models.sites import Matrix
from optimum_cap.pruning.activations import LayerwisePass, shared_statistics
from optimum_cap.pruning.allocation import uniform
from optimum_cap.pruning.fisher import WandaApproximation, estimate_sensitivities
from optimum_cap.pruning.refinement import LayerRefiner
from optimum_cap.pruning.sensitivity import measure_sensitivities
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.plain import plain_losses

SETTINGS = CAPConfig(sparsity=0.5, dataset=ROWS, num_samples=6, seed=3)


def tied_llama(**changes: Any) -> PreTrainedModel:
    """A Llama whose last layer has the projections of its first."""
    model = tiny_model("llama", **changes)
    first, last = model.model.layers[0], model.model.layers[2]
    for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        last.get_submodule(path).weight = first.get_submodule(path).weight
    for path in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        last.get_submodule(path).weight = first.get_submodule(path).weight
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tied_llama,
    "zamba2": lambda: small_model("zamba2"),
}


@pytest.fixture(params=["llama", pytest.param("zamba2", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


def test_they_are_matrices_of_the_first_layer(model: PreTrainedModel) -> None:
    view = ModelView.of(model)
    assert view.layers_of_shared
    own = [matrix for matrices in view.matrices_by_layer.values() for matrix in matrices]
    assert len(own) == len(set(own)) == len({id(model.get_parameter(m.parameter)) for m in own})
    for matrix, layers in view.layers_of_shared.items():
        assert len(layers) == 2
        assert matrix in view.matrices_by_layer[layers[0]]
        assert matrix not in view.matrices_by_layer[layers[1]]
        local = view.names_in_layers[layers[1]][matrix.parameter]
        assert model.get_parameter(local) is model.get_parameter(matrix.parameter)


def test_statistics_are_those_of_all_layers(model: PreTrainedModel) -> None:
    rows = examples(5)
    expected = observed_inputs(model, rows)
    view = ModelView.of(model)
    with torch.no_grad():
        found = shared_statistics(LayerwisePass(view, rows), view.layers_of_shared, gram=True)
    assert set(found) == set(view.layers_of_shared)
    for matrix, statistics in found.items():
        inputs = expected[matrix]
        assert statistics.tokens == len(inputs) == 2 * sum(len(row.input_ids) for row in rows)
        torch.testing.assert_close(
            statistics.gram.double(), inputs.T @ inputs, rtol=1e-4, atol=1e-3
        )


def divergence(
    dense: PreTrainedModel, pruned: PreTrainedModel, rows: list[CalibrationExample]
) -> float:
    """The mean over examples of the divergence at positions before scored tokens."""
    means = []
    for row in rows:
        logs = [m(row.input_ids[None]).logits[0, :-1].log_softmax(-1) for m in (dense, pruned)]
        of_tokens = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        means.append(float(of_tokens[row.scored[1:]].mean()))
    return sum(means) / len(means)


def test_a_site_pruned_alone_is_pruned_in_all_layers(model: PreTrainedModel) -> None:
    rows, view = examples(4), ModelView.of(model)

    def halved(matrix: Matrix, inputs: InputStatistics) -> torch.Tensor:
        weight = view.weights(matrix)
        return weight.masked_fill(weight.abs() < weight.abs().median(), 0)

    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for sensitivity in measure_sensitivities(
            view, view.matrices_by_layer, rows, halved, count=4
        ):
            changed = copy.deepcopy(model)
            for matrix in sensitivity.matrices:
                weight = changed.get_parameter(matrix.parameter)
                weight.masked_fill_(weight.abs() < weight.abs().median(), 0)
            expected = divergence(model, changed, rows)
            assert sensitivity.divergence == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_estimates_of_small_changes_are_about_the_divergence() -> None:
    model, rows = tied_llama(initializer_range=0.1), examples(64, longest=12)
    view = ModelView.of(model)
    total = sum(view.oriented(matrix).numel() for matrix in view.matrices)
    zeros = uniform(view, view.matrices_by_layer, round(0.3 * total), rows, SETTINGS)

    def prune(matrix: Matrix, inputs: InputStatistics) -> torch.Tensor:
        rough = WandaApproximation(view, zeros)
        rough.fit({matrix: inputs})
        return rough.pruned(matrix)

    layers = view.matrices_by_layer
    exact = measure_sensitivities(view, layers, rows, prune, count=64)
    found = estimate_sensitivities(view, layers, rows, zeros, count=64).sensitivities
    ratios = [e.divergence / x.divergence for e, x in zip(found, exact, strict=True)]
    assert all(0.5 < ratio < 2 for ratio in ratios), ratios


def test_exact_scores_mask_each_use_by_itself() -> None:
    view = ModelView.of(tied_llama())
    exact, plain = exact_losses(view, examples()), plain_losses(view, examples())
    torch.testing.assert_close(exact.masked, plain.masked, rtol=1e-5, atol=1e-6)
    assert len(view.heads) == 12


@pytest.mark.parametrize(
    "recipe",
    [
        "causal",
        "paper",
        *(
            pytest.param(recipe, marks=pytest.mark.slow)
            for recipe in ("causal_fast", "sparsegpt", "wanda", "owl_wanda")
        ),
    ],
)
def test_recipes_reach_the_sparsity(recipe: str, model: PreTrainedModel, tmp_path: Path) -> None:
    settings = CAPConfig(
        sparsity=0.5, dataset=ROWS, num_samples=6, seed=3, recipe=recipe, resume_dir=tmp_path
    )
    again = copy.deepcopy(model)
    CAPPruner(settings).prune(model, tiny_tokenizer())
    record = model.pruning_record
    matrices = ModelView.of(model).matrices
    assert record.zeros == round(0.5 * record.total)
    assert record.total == sum(model.get_parameter(m.parameter).numel() for m in matrices)
    assert not record.unsupported
    CAPPruner(settings).prune(again, tiny_tokenizer())
    assert same_weights(again, model)


def test_a_stopped_run_resumes_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the layers after the first one, the dense weights are needed too."""
    settings = CAPConfig(sparsity=0.5, dataset=ROWS, num_samples=6, seed=3, resume_dir=tmp_path)
    expected = CAPPruner(settings).prune(tied_llama(), tiny_tokenizer())
    advance = LayerwisePass.advance

    def stop(layerwise: LayerwisePass, index: int) -> None:
        advance(layerwise, index)
        pruned = layerwise.model.get_parameter("model.layers.0.mlp.up_proj.weight")
        if index == 1 and (pruned == 0).any():
            raise KeyboardInterrupt

    other = dataclasses.replace(settings, resume_dir=tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(LayerwisePass, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            CAPPruner(other).prune(tied_llama(), tiny_tokenizer())
    found = CAPPruner(other).prune(tied_llama(), tiny_tokenizer())
    assert same_weights(found, expected)


@pytest.mark.parametrize("entry", ["layers.2.mlp", "layers.0.mlp", "re:.*layers.2.mlp"])
def test_any_of_their_names_leaves_them_dense(entry: str) -> None:
    model = tied_llama()
    before = copy.deepcopy(model.state_dict())
    config = CAPConfig(sparsity=0.5, recipe="magnitude", modules_to_leave_dense=[entry])
    CAPPruner(config).prune(model)
    for name, value in model.state_dict().items():
        is_dense = "mlp" in name and ".1." not in name
        assert torch.equal(value, before[name]) == (is_dense or "proj" not in name), name


@pytest.mark.parametrize("pair", [("gate_proj", "up_proj"), ("up_proj", "gate_proj")])
def test_weights_shared_within_a_layer_are_refused(pair: tuple[str, str]) -> None:
    model = tied_llama()
    for index in (0, 2):
        mlp = model.model.layers[index].mlp
        mlp.get_submodule(pair[0]).weight = mlp.get_submodule(pair[1]).weight
    with pytest.raises(ValueError, match="share one tensor, which cannot be pruned for both"):
        CAPPruner(CAPConfig(sparsity=0.5, recipe="magnitude")).prune(model)


def test_modules_shared_by_layers_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp and model\.layers\.2\.mlp are one module"
    ):
        CAPPruner(CAPConfig(sparsity=0.5, recipe="magnitude")).prune(model)


@pytest.mark.parametrize("pattern", ["heads", "channels"])
def test_parts_of_shared_weights_are_not_removed(pattern: str) -> None:
    settings = CAPConfig(sparsity=0.5, recipe="random", pattern=pattern)
    with pytest.raises(CannotRemoveError, match="runs in several layers"):
        CAPPruner(settings).prune(tied_llama())


def test_targets_of_later_layers_are_those_of_the_dense_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last layer has pruned weights before it is its turn."""
    model, targets = tied_llama(), {}
    dense, begin = copy.deepcopy(model), LayerRefiner.begin

    def recorded(refiner: LayerRefiner, index: int) -> None:
        begin(refiner, index)
        for number, hidden in refiner._dense_hidden.items():
            targets[index, number] = refiner._batches[number].batch.input_ids, hidden

    monkeypatch.setattr(LayerRefiner, "begin", recorded)
    CAPPruner(dataclasses.replace(SETTINGS, refine=1)).prune(model, tiny_tokenizer())
    with torch.no_grad(), recorded_calls({"last": dense.model.layers[2]}) as calls:
        for (index, _), (ids, hidden) in targets.items():
            if index == 2:
                dense(ids)
                torch.testing.assert_close(hidden, calls["last"].output, rtol=1e-4, atol=1e-4)
    assert any(index == 2 for index, _ in targets)


@pytest.mark.slow
def test_zamba_is_saved_and_loaded(tmp_path: Path) -> None:
    for kind in ("zamba", "zamba2"):
        model = small_model(kind)
        CAPPruner(SETTINGS).prune(model, tiny_tokenizer())
        model.save_pretrained(tmp_path / kind)
        loaded = type(model).from_pretrained(tmp_path / kind)
        assert all(
            torch.equal(value, loaded.state_dict()[name])
            for name, value in model.state_dict().items()
        )
        assert loaded.pruning_record == model.pruning_record
