"""Every recipe through `CAPPruner`, on every architecture, against plain re-implementations."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.calibration import ROWS
from helpers.observed_inputs import observed_inputs
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.config import RECIPES, effective
from optimum_cap.data.calibration import CalibrationExample, build_calibration_set
from optimum_cap.methods.allocations import ALLOCATIONS
from optimum_cap.methods.criteria import CRITERIA
from optimum_cap.methods.masks import SMALLER_PATTERNS, split_proportionally
from optimum_cap.methods.reconstruction import sparsegpt
from optimum_cap.methods.statistics import InputStatistics
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.sites import Matrix, matrices_by_layer, oriented
from optimum_cap.pruning.allocation import ALLOCATORS


def config(recipe: str = "paper", **changes: Any) -> CAPConfig:
    values = {"sparsity": 0.5, "dataset": ROWS, "num_samples": 12, "recipe": recipe}
    return CAPConfig(**effective(values, changes))


def pruned(settings: CAPConfig, model: PreTrainedModel) -> PreTrainedModel:
    return CAPPruner(settings).prune(copy.deepcopy(model), tiny_tokenizer())


def calibration(settings: CAPConfig) -> list[CalibrationExample]:
    return build_calibration_set(settings, tiny_tokenizer(), max_length=64).examples


def test_the_names_of_the_config_are_those_of_the_tables() -> None:
    assert set(ALLOCATIONS) == {"global", "interventional", "fisher", *ALLOCATORS}
    for name, criterion in CRITERIA.items():
        if criterion.ranks_weights:
            assert (criterion.importance is None) != (criterion.solve is None), name
        else:  # it chooses parts alone
            assert criterion.parts, name
            assert set(criterion.parts) <= set(SMALLER_PATTERNS), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_are_exactly_the_rounded_target(recipe: str, model: PreTrainedModel) -> None:
    new = pruned(config(recipe, sparsity=0.37), model)
    record = new.pruning_record
    zeros = sum(
        int((oriented(new, matrix) == 0).sum())
        for own in matrices_by_layer(find_sites(new)).values()
        for matrix in own
    )
    assert record.zeros == zeros == round(0.37 * record.total)
    assert bool(record.scores) == (recipe == "paper")
    assert bool(record.sensitivities) == (recipe in ("causal", "causal_fast"))
    assert bool(record.calibration) == RECIPES[recipe].needs_data
    if not CRITERIA[RECIPES[recipe].criterion].updates_weights:
        for before, after in zip(model.parameters(), new.parameters(), strict=True):
            assert ((after == before) | (after == 0)).all()


def test_magnitude_prunes_the_smallest_of_each_matrix(model: PreTrainedModel) -> None:
    new = pruned(config("magnitude"), model)
    for own in matrices_by_layer(find_sites(model)).values():
        for matrix in own:
            before, after = oriented(model, matrix).abs(), oriented(new, matrix)
            if (after == 0).any():
                assert before[after == 0].max() <= before[after != 0].min()
            assert abs(int((after == 0).sum()) - before.numel() / 2) <= 1


def test_magnitude_global_prunes_the_smallest_of_the_model(model: PreTrainedModel) -> None:
    new = pruned(config("magnitude_global"), model)
    matrices = [m for own in matrices_by_layer(find_sites(model)).values() for m in own]
    before = torch.cat([oriented(model, matrix).abs().flatten() for matrix in matrices])
    after = torch.cat([oriented(new, matrix).flatten() for matrix in matrices])
    assert before[after == 0].max() <= before[after != 0].min()


def test_random_depends_on_the_seed_alone(llama: PreTrainedModel) -> None:
    def zeros(seed: int) -> torch.Tensor:
        new = pruned(config("random", seed=seed), llama)
        return new.get_parameter("model.layers.1.mlp.up_proj.weight") == 0

    assert torch.equal(zeros(0), zeros(0))
    # Independent masks of half of the weights agree on half of them.
    assert 0.3 < (zeros(0) == zeros(1)).float().mean() < 0.7


def layer_by_layer(
    model: PreTrainedModel, rows: list[CalibrationExample], prune: Any
) -> PreTrainedModel:
    """Prune each layer by what an ordinary pass through the model, pruned so far, multiplies."""
    model = copy.deepcopy(model)
    layers = matrices_by_layer(find_sites(model))
    for own in layers.values():
        inputs = observed_inputs(model, rows)
        for matrix in own:
            oriented(model, matrix).copy_(prune(matrix, oriented(model, matrix), inputs[matrix]))
    return model


def counts(model: PreTrainedModel, sparsity: float) -> dict[Matrix, int]:
    matrices = [m for own in matrices_by_layer(find_sites(model)).values() for m in own]
    sizes = [oriented(model, matrix).numel() for matrix in matrices]
    return dict(
        zip(matrices, split_proportionally(round(sparsity * sum(sizes)), sizes), strict=True)
    )


def agreement(first: PreTrainedModel, second: PreTrainedModel) -> float:
    same = total = 0
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        same += int(((a == 0) == (b == 0)).sum())
        total += a.numel()
    return same / total


def test_wanda_follows_its_definition(model: PreTrainedModel) -> None:
    zeros = counts(model, 0.5)

    def prune(matrix: Matrix, weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        norm = inputs.norm(dim=0) if len(inputs) else torch.ones(weight.shape[1]).double()
        importance = weight.double().abs() * norm
        new = weight.clone()
        for row, count in enumerate(
            split_proportionally(zeros[matrix], [weight.shape[1]] * len(weight))
        ):
            new[row, importance[row].argsort()[:count]] = 0
        return new

    settings = config("wanda")
    expected = layer_by_layer(model, calibration(settings), prune)
    assert agreement(pruned(settings, model), expected) > 0.9995


def test_sparsegpt_sees_the_layers_before_it_pruned(model: PreTrainedModel) -> None:
    """What it does with a matrix is in test_reconstruction.py."""
    zeros = counts(model, 0.5)

    def prune(matrix: Matrix, weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        statistics = InputStatistics.empty(weight.shape[1], weight.device, gram=True)
        statistics.add_(inputs)
        return sparsegpt(weight, statistics, zeros[matrix])

    settings = config("sparsegpt")
    expected = layer_by_layer(model, calibration(settings), prune)
    found = pruned(settings, model)
    assert agreement(found, expected) > 0.995
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        both = (ours != 0) & (theirs != 0)
        assert ((ours - theirs)[both].abs() < 1e-2).float().mean() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize(
    ("criterion", "pattern"),
    [
        *((name, "2:4") for name, criterion in CRITERIA.items() if criterion.ranks_weights),
        ("alps", "1:4"),
    ],
)
def test_patterns_hold_in_every_row(criterion: str, pattern: str, architecture: str) -> None:
    kept, of = map(int, pattern.split(":"))
    settings = config(criterion=criterion, pattern=pattern, sparsity=1 - kept / of)
    new = pruned(settings, tiny_model(architecture))
    for own in matrices_by_layer(find_sites(new)).values():
        for matrix in own:
            weight = oriented(new, matrix)
            assert ((weight.reshape(len(weight), -1, of) != 0).sum(-1) == kept).all()


def test_a_pattern_that_does_not_fit_is_named(llama: PreTrainedModel) -> None:
    before = copy.deepcopy(llama.state_dict())
    settings = config("wanda", pattern="4:8")
    with pytest.raises(ValueError, match=r"'4:8' does not fit .*down_proj.* has 20 inputs"):
        CAPPruner(settings).prune(llama, tiny_tokenizer())
    assert all(torch.equal(before[name], t) for name, t in llama.state_dict().items())


@pytest.mark.parametrize("recipe", ["magnitude", "magnitude_global", "random"])
def test_what_needs_no_data_needs_no_tokenizer(recipe: str, llama: PreTrainedModel) -> None:
    CAPPruner(CAPConfig(sparsity=0.2, recipe=recipe)).prune(llama)
    assert llama.pruning_record.zeros > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpoints_of_every_recipe_load_and_keep_their_record(
    recipe: str, tmp_path: Path
) -> None:
    model = pruned(config(recipe), tiny_model("qwen3_moe"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    pairs = zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert loaded.pruning_record == model.pruning_record
    assert RECIPES[recipe].criterion in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("recipe", ["wanda", "sparsegpt", "owl_wanda"])
def test_half_precision_is_computed_in_float32(recipe: str) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    new, wide = pruned(config(recipe), model), pruned(config(recipe), model.float())
    assert new.dtype == torch.bfloat16
    for (name, narrow), expected in zip(new.named_parameters(), wide.parameters(), strict=True):
        # SparseGPT calibrates the layers after the first on what is stored, which is rounded.
        if recipe != "sparsegpt" or ".layers." not in name or ".layers.0." in name:
            assert torch.equal(narrow, expected.bfloat16())


def test_modules_left_dense_stay_dense(llama: PreTrainedModel) -> None:
    settings = config("sparsegpt", modules_to_leave_dense=["layers.1", "o_proj"])
    new = pruned(settings, llama)
    for name, weight in new.named_parameters():
        if "layers.1." in name or "o_proj" in name:
            assert torch.equal(weight, llama.get_parameter(name)), name
    assert new.pruning_record.zeros == round(0.5 * new.pruning_record.total)


def test_experts_without_tokens_are_handled_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("mixtral")
    gate = model.get_submodule("model.layers.0.mlp.gate")
    # Every token goes to the first two experts.
    gate.register_forward_hook(
        lambda module, args, output: (*output[:2], torch.tensor([0, 1]).expand_as(output[2]))
    )
    for recipe in ("wanda", "sparsegpt"):
        new = pruned(config(recipe), model)
        tokens = {matrix.name: matrix.tokens for matrix in new.pruning_record.matrices}
        assert tokens["model.layers.0.mlp.experts.down_proj[3]"] == 0
        assert tokens["model.layers.0.mlp.experts.down_proj[0]"] > 0
        few = "matrices saw fewer calibration tokens than they have inputs (model.layers.0.mlp."
        assert few in caplog.text
        assert re.search(r"experts.*\[2\]: 0 tokens, 24 inputs; ", caplog.text)
        assert "at least as many tokens as inputs" in caplog.text
        caplog.clear()
        idle = Matrix("model.layers.0.mlp.experts.down_proj", 3)
        assert int((oriented(new, idle) == 0).sum()) == oriented(new, idle).numel() // 2
        assert new(torch.arange(4, 20)[None]).logits.isfinite().all()


def test_an_interrupt_says_which_layers_are_pruned(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from optimum_cap.pruning.activations import LayerwisePass

    stock = LayerwisePass.statistics

    def interrupted(self: LayerwisePass, index: int, *args: Any, **kwargs: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return stock(self, index, *args, **kwargs)

    monkeypatch.setattr(LayerwisePass, "statistics", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CAPPruner(config("wanda")).prune(llama, tiny_tokenizer())
    assert "pruning stopped in layer 1 of 3" in caplog.text
    assert not hasattr(llama, "pruning_record")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criterion": "magic"}, "criterion must be one of causal_score, magnitude"),
        ({"allocation": "magic"}, "allocation must be one of global, uniform, owl"),
        ({"recipe": "wanda", "allocation": "global"}, "'wanda' prunes layer by layer"),
        ({"pattern": "2:5"}, "keeps 2 of every 5 weights, which is sparsity 0.6, got .* 0.5"),
        ({"pattern": "4:2"}, "keeps N of every M weights"),
        (
            {"recipe": "owl_wanda", "pattern": "2:4"},
            "got allocation 'owl': choose allocation 'uniform'",
        ),
        (
            {"allocation": "global", "pattern": "2:4"},
            "got allocation 'global': choose allocation 'uniform'",
        ),
        ({"owl_bound": 0}, "owl_bound must be a positive number, got 0"),
        ({"owl_outlier_ratio": float("nan")}, "owl_outlier_ratio must be a positive number"),
    ],
)
def test_bad_combinations_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "criterion", "allocation"),
    [
        ({}, "causal_score", "global"),
        ({"allocation": "uniform"}, "causal_score", "uniform"),
        ({"criterion": "wanda"}, "wanda", "uniform"),
        ({"recipe": "owl_wanda", "allocation": "uniform"}, "wanda", "uniform"),
        ({"pattern": "2:4"}, "causal_score", "uniform"),
        ({"criterion": "sparsegpt", "allocation": "owl"}, "sparsegpt", "owl"),
    ],
)
def test_recipes_are_combined_with_what_is_given(
    changes: dict[str, Any], criterion: str, allocation: str
) -> None:
    method = config(**changes).method
    assert (method.criterion, method.allocation) == (criterion, allocation)
    assert CAPConfig.from_dict(config(**changes).to_dict() | {"dataset": "gsm8k"}).method == method
