"""A whole pruning in memory: `CAPPruner.prune`."""

import copy
import logging
import re
from typing import Any

import pytest
import torch
from helpers.calibration import ROWS
from helpers.pruning_runs import config
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.data.calibration import build_calibration_set
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.sites import prunable_matrices
from optimum_cap.models.view import ModelView
from optimum_cap.scoring.estimators import ESTIMATORS, Estimator
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.plain import plain_losses
from optimum_cap.scoring.scores import causal_scores


@pytest.mark.parametrize(
    "names",
    [
        ["lm_head"],
        ["embed_tokens", "norm", "model.norm.weight"],
        ["re:.*embed_tokens", "re:lm_head"],
    ],
)
def test_modules_that_are_never_pruned_may_be_named(
    names: list[str], llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = CAPPruner(config()).prune(copy.deepcopy(llama), tokenizer)
    CAPPruner(config(modules_to_leave_dense=names)).prune(llama, tokenizer)
    assert llama.pruning_record.matrices == expected.pruning_record.matrices


def test_the_lm_head_may_be_named_where_it_has_another_name(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model("gpt_neox")  # embed_out
    settings = config(recipe="magnitude", modules_to_leave_dense=["lm_head", "re:.*lm_head"])
    assert CAPPruner(settings).prune(model, tokenizer).pruning_record.zeros > 0


def test_patterns_leave_modules_dense(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    patterns = ["re:.*down_proj", r"re:model\.layers\.[01]\.self_attn"]
    CAPPruner(config(modules_to_leave_dense=patterns)).prune(llama, tokenizer)
    named = {matrix.name for matrix in llama.pruning_record.matrices}
    assert not any("down_proj" in name for name in named)
    assert {name.split(".")[2] for name in named if "self_attn" in name} == {"2"}
    for name, weight in llama.named_parameters():
        if ".layers." in name and name not in named:
            assert weight.all(), name


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("o_porj", r" \(did you mean 'o_proj'.*\?\)$"),
        ("layers.9", r" \(did you mean 'layers.2', 'layers.1' or 'layers.0'\?\)$"),
        ("re:.*dwn_proj$", r" \(did you mean 'down_proj'.*\?\)$"),
        ("re:down_proj", r" \(did you mean 'down_proj'.*\?\)$"),
        ("*.down_proj", ": regular expressions begin with 're:', as in 're:.*down_proj'$"),
        ("xyz", ": use names such as model.layers.0.self_attn.*_proj.weight$"),
    ],
)
def test_a_name_that_matches_nothing_is_refused(
    name: str, advice: str, llama: PreTrainedModel
) -> None:
    message = f"names {re.escape(repr(name))}, which matches no module of the model{advice}"
    with pytest.raises(ValueError, match=message):
        CAPPruner(config(recipe="magnitude", modules_to_leave_dense=[name])).prune(llama)


def test_what_is_no_model_or_no_config_is_refused() -> None:
    for wrong in ({"sparsity": 0.2}, "wanda"):
        with pytest.raises(TypeError, match=r"takes a CAPConfig, .* CAPPruner\(CAPConfig\("):
            CAPPruner(wrong)  # type: ignore[arg-type]
    pruner = CAPPruner(config())
    for call in (pruner.prune, pruner.measure):
        with pytest.raises(TypeError, match=r"a loaded model, got the name 'owner/name': load it"):
            call("owner/name")  # type: ignore[operator]
        with pytest.raises(TypeError, match="a loaded model, got NoneType"):
            call(None)  # type: ignore[operator]


def test_zeros_are_exactly_the_rounded_target(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = copy.deepcopy(model.state_dict())
    pruned = CAPPruner(config()).prune(model, tokenizer)
    assert pruned is model
    record = pruned.pruning_record
    prunable = {matrix.parameter for matrix in prunable_matrices(find_sites(model))}
    zeros = total = 0
    for name, tensor in model.state_dict().items():
        changed = tensor != before[name]
        if name in prunable:
            assert (tensor[changed] == 0).all(), "kept weights are untouched"
            zeros += int((tensor == 0).sum())
            total += tensor.numel()
        else:
            assert not changed.any(), f"{name} is not prunable"
    assert zeros == record.zeros == round(0.3 * total)
    assert total == record.total


def paper_zeros(model: PreTrainedModel, tokenizer: Any, settings: CAPConfig) -> dict[str, Any]:
    """The paper's recipe for a Llama, spelled out: hooked passes, a sort, loops over heads."""
    examples = build_calibration_set(settings, tokenizer).examples
    sites = [site for site in find_sites(model) if site.kind == "attention"]
    scores = causal_scores(plain_losses(ModelView(model, sites), examples), settings.subsets).scores
    low, high = scores.min(), scores.max()
    importance = (1 + 9 * (scores - low) / (high - low)).view(len(model.model.layers), -1)
    weighted = {}
    for layer, heads in zip(model.model.layers, importance, strict=True):
        attention, size = layer.self_attn, layer.self_attn.head_dim
        shared = heads.view(-1, attention.num_key_value_groups).mean(1)
        by_row = {"q_proj": heads, "k_proj": shared, "v_proj": shared}
        for name, values in by_row.items():
            weight = getattr(attention, name).weight
            weighted[weight] = weight.abs() * values.float().repeat_interleave(size)[:, None]
        columns = heads.float().repeat_interleave(size)[None, :]
        weighted[attention.o_proj.weight] = attention.o_proj.weight.abs() * columns
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = getattr(layer.mlp, name).weight
            weighted[weight] = weight.abs() * heads.mean().float()
    flat = torch.cat([value.flatten() for value in weighted.values()])
    threshold = flat.sort().values[round(settings.sparsity * len(flat)) - 1]
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[weight]: value <= threshold for weight, value in weighted.items()}


def test_recipe_paper_is_the_papers() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with torch.no_grad():
        expected = paper_zeros(model, tokenizer, config())
    CAPPruner(config()).prune(model, tokenizer)
    for name, pruned in expected.items():
        assert torch.equal(model.get_parameter(name) == 0, pruned), name


def test_record_says_what_was_done(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    CAPPruner(config(checkpoint_format="dense")).prune(llama, tokenizer)
    record = llama.pruning_record
    assert record.config == config(checkpoint_format="dense").to_dict()
    assert llama.config.pruning_config == record.config
    assert len(record.scores) == 12
    importances = [unit.importance for unit in record.scores]
    assert min(importances) == 1
    assert max(importances) == 10
    assert all(unit.standard_error > 0 for unit in record.scores)
    assert len(record.calibration["digests"]) == 12
    # Which wheel it was (+cu130) is not in the version of the distribution.
    assert record.versions["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert record.intact_loss > 0
    names = [matrix.name for matrix in record.matrices]
    assert len(names) == len(set(names)) == 21


def test_experts_are_recorded_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    model = CAPPruner(config()).prune(tiny_model("mixtral"), tokenizer)
    names = [matrix.name for matrix in model.pruning_record.matrices]
    assert "model.layers.0.mlp.experts.down_proj[3]" in names


def test_same_inputs_give_the_same_bytes(
    architecture: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = CAPPruner(config()).prune(tiny_model(architecture), tokenizer)
    second = CAPPruner(config()).prune(tiny_model(architecture), tokenizer)
    assert first.pruning_record == second.pruning_record
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model("llama", dtype=dtype)
    CAPPruner(config()).prune(model, tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.pruning_record.zeros == round(0.3 * model.pruning_record.total)


def test_modules_can_be_left_dense(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    CAPPruner(config(modules_to_leave_dense=["layers.0", "o_proj"])).prune(llama, tokenizer)
    names = [matrix.name for matrix in llama.pruning_record.matrices]
    assert names
    assert not any("layers.0." in name or "o_proj" in name for name in names)
    assert not (llama.model.layers[0].mlp.up_proj.weight == 0).any()
    assert llama.pruning_record.zeros == round(0.3 * llama.pruning_record.total)


def test_pruning_further(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    CAPPruner(config(sparsity=0.2)).prune(llama, tokenizer)
    CAPPruner(config(sparsity=0.5)).prune(llama, tokenizer)
    assert llama.pruning_record.zeros == round(0.5 * llama.pruning_record.total)


def test_the_dataset_argument_replaces_the_configs(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    CAPPruner(config(dataset="gsm8k")).prune(llama, tokenizer, dataset=ROWS)
    assert llama.pruning_record.calibration["sources"][0]["name"] == "in-memory"
    assert llama.pruning_record.config["dataset"].startswith("in-memory, 81 rows")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_quantized_weights(dtype: torch.dtype, llama: PreTrainedModel) -> None:
    weight = llama.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    weight.data = weight.data.to(dtype)
    message = rf"up_proj\.weight has dtype {dtype}.*: prune the model before you quantize it"
    with pytest.raises(ValueError, match=message):
        CAPPruner(CAPConfig(0.5, recipe="magnitude")).prune(llama)


def _broken(model: PreTrainedModel, value: float) -> PreTrainedModel:
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights(
    value: float, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
        CAPPruner(config()).prune(_broken(llama, value), tokenizer)


def test_a_head_that_overflows_is_survived(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(*args: Any) -> Any:
        losses = exact_losses(*args)
        losses.masked[5] = float("inf")
        return losses

    monkeypatch.setitem(ESTIMATORS, "exact", Estimator(overflowing))
    CAPPruner(config()).prune(llama, tokenizer)
    unit = llama.pruning_record.scores[5]
    assert unit.score is None
    assert unit.importance == 10
    assert unit.nonfinite == 12


def test_an_example_is_logged_when_debugging(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(recipe="wanda", dataset=[("what?", "so")], num_samples=1)
    for level, count in ((logging.INFO, 0), (logging.DEBUG, 1)):
        with caplog.at_level(level, logger="optimum_cap.pruner"):
            CAPPruner(settings).prune(llama, tiny_tokenizer())
        shown = "row 0 of in-memory: 9 tokens, 3 scored (between ⟦ and ⟧)\nwhat?\n⟦so</s>⟧"
        assert caplog.text.count(shown) == count


def test_no_tokenizer(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        CAPPruner(config()).prune(llama)


def test_a_name_that_covers_nothing(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="modules_to_leave_dense names 'z_proj'"):
        CAPPruner(config(modules_to_leave_dense=["z_proj"])).prune(llama, tokenizer)


def test_everything_left_dense(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="leaves nothing to prune"):
        CAPPruner(config(modules_to_leave_dense=["layers"])).prune(llama, tokenizer)


def test_weights_on_the_meta_device(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="is on the meta device without offloaded values"):
        CAPPruner(config()).prune(tiny_model("llama").to("meta"), tokenizer)


def test_an_error_leaves_the_model_as_it_was(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = copy.deepcopy(llama.state_dict())
    with pytest.raises(ValueError, match="lower num_samples"):
        CAPPruner(config(num_samples=1000)).prune(llama, tokenizer)
    assert all(torch.equal(before[name], t) for name, t in llama.state_dict().items())
    assert not hasattr(llama, "pruning_record")


@pytest.mark.parametrize("sparsity", [1e-9, 1 - 1e-9])
def test_a_sparsity_that_prunes_nothing_or_all_is_refused_before_scoring(
    sparsity: float, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ESTIMATORS, "exact", Estimator(lambda *a: pytest.fail("scored")))
    with pytest.raises(ValueError, match=f"sparsity {sparsity} of .* weights is .* zeros"):
        CAPPruner(config(sparsity=sparsity)).prune(llama, tiny_tokenizer())


def test_losses_are_measured_once_for_several_sparsities(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    losses = CAPPruner(config()).measure(tiny_model("mixtral"), tokenizer)
    expected = [
        CAPPruner(config(sparsity=sparsity)).prune(tiny_model("mixtral"), tokenizer)
        for sparsity in (0.2, 0.4)
    ]
    monkeypatch.setitem(ESTIMATORS, "exact", Estimator(lambda *a: pytest.fail("measured again")))
    for sparsity, other in zip((0.2, 0.4), expected, strict=True):
        model = tiny_model("mixtral")
        CAPPruner(config(sparsity=sparsity)).prune(model, tokenizer, losses=losses)
        assert model.pruning_record == other.pruning_record
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_losses_of_something_else_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    losses = CAPPruner(config()).measure(tiny_model("llama"), tokenizer)
    with pytest.raises(ValueError, match=r"12 units and 12 examples, .* 13 examples: measure them"):
        CAPPruner(config(num_samples=13)).prune(tiny_model("llama"), tokenizer, losses=losses)
    with pytest.raises(
        ValueError, match=r"losses are for criterion 'causal_score', .* criterion 'alps'"
    ):
        CAPPruner(config(recipe="causal")).prune(tiny_model("llama"), tokenizer, losses=losses)
    with pytest.raises(ValueError, match="losses are of 12 units"):
        CAPPruner(config()).prune(tiny_model("gpt2"), tokenizer, losses=losses)


@pytest.mark.parametrize(("name", "kinds"), [("llama", 2), ("mixtral", 2), ("qwen3_moe", 3)])
def test_all_units_are_scored_and_rank_their_own_weights(name: str, kinds: int) -> None:
    settings = config(scored_units="all", mlp_unit_size=8, num_samples=6)
    model = tiny_model(name)
    sites = find_sites(model, mlp_unit_size=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = CAPPruner(settings).prune(model, tiny_tokenizer())
    record = pruned.pruning_record
    units = [(site.name, unit.index) for site in sites for unit in site.units]
    assert [(score.site, score.unit) for score in record.scores] == units
    assert len({score.kind for score in record.scores}) == kinds
    importances = [score.importance for score in record.scores]
    assert (min(importances), max(importances)) == (1, 10)
    # One threshold on |W| times the importance of the unit that a row or column belongs to.
    own = dict(zip(units, importances, strict=True))
    for site in sites:
        for unit in site.units if site.kind != "attention" else ():
            for block in unit.region:
                weight = block.of(before[block.parameter]).abs()
                kept = block.of(pruned.get_parameter(block.parameter)) != 0
                importance = weight.float() * torch.tensor(own[site.name, unit.index])
                assert torch.equal(kept, importance > record.threshold)


def test_losses_of_other_groups_of_channels_are_refused() -> None:
    losses = CAPPruner(config(scored_units="all", mlp_unit_size=8, num_samples=6)).measure(
        tiny_model("llama"), tiny_tokenizer()
    )
    pruner = CAPPruner(config(scored_units="all", mlp_unit_size=7, num_samples=6))
    with pytest.raises(ValueError, match=r"losses are of 21 units .* scores 21 units of this mod"):
        pruner.prune(tiny_model("llama"), tiny_tokenizer(), losses=losses)


def test_heads_alone_score_the_same_as_among_all_units() -> None:
    """`scored_units="heads"` measures no MLP, and the heads among all units score the same."""
    heads, every = (
        CAPPruner(config(num_samples=6, **units)).measure(tiny_model("mixtral"), tiny_tokenizer())
        for units in ({}, {"scored_units": "all"})
    )
    of_heads = [index for index, (site, _) in enumerate(every.units) if site.kind == "attention"]
    assert len(heads.units) == len(of_heads) == 12
    torch.testing.assert_close(every.masked[of_heads], heads.masked, rtol=1e-6, atol=0)


def test_a_model_sparser_than_asked_is_refused(llama: PreTrainedModel) -> None:
    pruned = CAPPruner(config(recipe="wanda", sparsity=0.5)).prune(llama, tiny_tokenizer())
    zeros = pruned.pruning_record.zeros
    with pytest.raises(ValueError, match=rf"{zeros:,} of the weights to prune are zero already"):
        CAPPruner(config(recipe="causal", sparsity=0.3)).prune(pruned, tiny_tokenizer())
    assert pruned.pruning_record.zeros == zeros


@pytest.mark.parametrize("recipe", ["causal", "sparsegpt", "wanda", "magnitude_global", "paper"])
def test_pruning_further_counts_all_zeros(
    recipe: str, llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    CAPPruner(config(recipe="wanda", sparsity=0.25)).prune(llama, tiny_tokenizer())
    before = llama.pruning_record.zeros
    CAPPruner(config(recipe=recipe, sparsity=0.5)).prune(llama, tiny_tokenizer())
    record = llama.pruning_record
    assert record.zeros_before == before
    assert record.zeros == record.zeros_after == record.total // 2
    assert f"pruned before, and {before:,} of the weights to prune are zero" in caplog.text


def test_zeros_beyond_the_share_of_a_row_are_reported(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[:5] = 0
    inputs = llama.model.layers[1].mlp.up_proj.in_features
    record = CAPPruner(config(recipe="wanda", sparsity=0.5)).prune(llama, tiny_tokenizer())
    record = llama.pruning_record
    more = record.zeros - record.total // 2
    assert more == 5 * inputs // 2
    assert f"{more:,} more than sparsity 0.5 asks for: the model had {5 * inputs:,}" in caplog.text
