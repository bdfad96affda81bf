"""Removal of experts, channels and layers by `CAPPruner`: what is left, saved and loaded."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.calibration import ROWS
from helpers.every_architecture import small_model
from helpers.tiny_models import tiny_classifier, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.checkpoint import PruningRecord
from optimum_cap.methods import REMOVED_PARTS
from optimum_cap.models import CannotRemoveError, ModelView, call_model, masked_unit
from optimum_cap.pruning import PartRemoval
from optimum_cap.runtime import ALONE
from optimum_cap.scoring import causal_scores

DATA = [{"prompt": prompt, "completion": answer} for prompt, answer in ROWS[:16]]
TOKENS = torch.arange(3, 27).view(2, 12)


def removed_from(model: PreTrainedModel, pattern: str, sparsity: float, **fields: Any) -> None:
    if fields.get("recipe") != "random" and fields.get("criterion") not in ("random", "magnitude"):
        fields = {"dataset": DATA, "num_samples": 12, **fields}
    config = CAPConfig(sparsity, pattern=pattern, **fields)
    CAPPruner(config).prune(model, tiny_tokenizer())


@pytest.mark.parametrize(
    ("architecture", "pattern", "sparsity", "number", "left"),
    [
        ("mixtral", "experts", 0.5, "num_local_experts", 2),
        ("llama", "channels", 0.4, "intermediate_size", 12),
        pytest.param("llama", "layers", 0.3, "num_hidden_layers", 2, marks=pytest.mark.slow),
    ],
)
def test_stock_model_is_left(
    architecture: str, pattern: str, sparsity: float, number: str, left: int, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    before = model.num_parameters()
    removed_from(model, pattern, sparsity)
    assert getattr(model.config, number) == left
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config[number] == left
    assert "quantization_config" not in config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    removed = loaded.pruning_record.removed
    assert removed["parameters_before"] == before
    assert removed["parameters_after"] == loaded.num_parameters() < before
    [part] = removed["parts"]
    assert part["before"] - part["after"] > 0
    card = (tmp_path / "README.md").read_text()
    assert f"of {part['before']} {pattern}" in card
    assert "Zeros per projection" not in card


# Latent attention, hybrids, state spaces, groups of experts, biases and sinks, shared weights.
OTHERS = (
    "deepseek_v3",
    "qwen3_next",
    "gpt_oss",
    "falcon_h1",
    "llama4_text",
    "zamba2",
)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", REMOVED_PARTS)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_lose_parts_or_are_refused(kind: str, pattern: str) -> None:
    model = small_model(kind)
    before = model.num_parameters()
    with suppress(CannotRemoveError):
        removed_from(model, pattern, 0.4, recipe="random")
        assert model.num_parameters() < before
        with torch.no_grad():
            assert call_model(model, TOKENS % 20).logits.isfinite().all()


WITHOUT_PLUGIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(name.startswith("optimum_cap") for name in sys.modules)
torch.save(model(torch.arange(3, 27).view(2, 12)).logits, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "pattern"),
    [("mixtral", "experts"), ("llama", "heads"), ("gpt2", "channels"), ("qwen3_moe", "layers")],
)
def test_transformers_loads_it_without_the_plugin(
    architecture: str, pattern: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture).eval()
    removed_from(model, pattern, 0.4, recipe="random")
    model.save_pretrained(tmp_path)
    logits = tmp_path / "logits.pt"
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", WITHOUT_PLUGIN, str(tmp_path), str(logits)]
    subprocess.run(command, check=True, env=environment)
    with torch.no_grad():
        assert torch.equal(torch.load(logits), model(TOKENS).logits)


@pytest.mark.parametrize(
    "criterion", ["causal_score", pytest.param("magnitude", marks=pytest.mark.slow)]
)
def test_removed_heads_are_masked_heads(criterion: str) -> None:
    dense, model = tiny_model("qwen3_moe").eval(), tiny_model("qwen3_moe")
    removed_from(model, "heads", 0.5, criterion=criterion)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    kept = model.pruning_record.removed["kept"]
    with ExitStack() as stack, torch.no_grad():
        for site, unit in ModelView.of(dense).heads:
            if unit.channels[0] not in kept[site.name]:
                stack.enter_context(masked_unit(dense, site, unit))
        expected = dense(TOKENS).logits
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-4)
    assert bool(model.pruning_record.scores) == (criterion == "causal_score")


def test_heads_with_the_lowest_scores_go() -> None:
    model = tiny_model("llama")
    pruner = CAPPruner(
        CAPConfig(0.5, pattern="heads", recipe="paper", dataset=DATA, num_samples=12)
    )
    losses = pruner.measure(model, tiny_tokenizer())
    scores = causal_scores(losses).scores.view(3, 2, 2).mean(dim=2)  # layers, groups, heads
    pruner.prune(model, tiny_tokenizer(), losses=losses)
    for channels, of_layer in zip(
        model.pruning_record.removed["kept"].values(), scores, strict=True
    ):
        assert channels[0] // 16 == int(of_layer.argmax())


@pytest.mark.parametrize(
    ("architecture", "pattern", "fields"),
    [
        ("mixtral", "experts", {"criterion": "reap"}),
        ("qwen3_moe", "experts", {"recipe": "causal_fast"}),
        ("qwen3_moe", "channels", {}),
        ("gpt2", "channels", {}),
        ("gpt2", "layers", {}),
        ("llama", "heads", {}),
        ("phi3", "heads", {"criterion": "wanda", "refine": 1}),
        ("phi3", "channels", {"criterion": "wanda", "refine": 1}),
        ("llama", "layers", {"criterion": "block_influence"}),
        ("llama", "channels", {"criterion": "magnitude"}),
        ("llama", "layers", {"recipe": "random"}),
    ],
)
@pytest.mark.slow
def test_every_criterion_runs(architecture: str, pattern: str, fields: dict[str, Any]) -> None:
    model = tiny_model(architecture)
    before = model.num_parameters()
    removed_from(model, pattern, 0.4, **fields)
    assert model.num_parameters() < before
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.slow
def test_dtype_stays_and_runs_repeat(dtype: torch.dtype) -> None:
    models = [tiny_model("llama").to(dtype) for _ in range(2)]
    for model in models:
        removed_from(model, "channels", 0.4)
    states = [model.state_dict() for model in models]
    assert {tensor.dtype for tensor in states[0].values()} == {dtype}
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.slow
def test_refinement_brings_hidden_states_closer() -> None:
    def difference(refine: int) -> float:
        dense, model = tiny_model("mixtral").eval(), tiny_model("mixtral")
        removed_from(model, "experts", 0.5, criterion="routed_error", refine=refine)
        inputs = torch.tensor(tiny_tokenizer()(ROWS[0][0] + ROWS[0][1])["input_ids"])[None]
        with torch.no_grad():
            return float((model(inputs).logits - dense(inputs).logits).square().mean())

    assert difference(8) < difference(0)


@pytest.mark.slow
def test_interrupted_run_resumes_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimum_cap.pruning import removal, smaller_refinement

    whole = tiny_model("mixtral")
    removed_from(whole, "experts", 0.5)
    calls = []

    class Interrupted(smaller_refinement.LayerRefiner):
        def refine_(self, index, matrices):
            calls.append(index)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return super().refine_(index, matrices)

    model = tiny_model("mixtral")
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(smaller_refinement, "LayerRefiner", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        removed_from(model, "experts", 0.5, resume_dir=tmp_path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in dense.items())
    monkeypatch.setattr(
        removal, "experts_to_remove", lambda *args: pytest.fail("the choice was not stored")
    )
    removed_from(model, "experts", 0.5, resume_dir=tmp_path)
    assert calls == [0, 1, 1, 2]
    expected = whole.state_dict()
    assert all(torch.equal(expected[name], each) for name, each in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.rglob("layers/*/*"))


def test_smaller_model_can_be_pruned_again() -> None:
    model = tiny_model("llama")
    removed_from(model, "channels", 0.4, criterion="magnitude")
    CAPPruner(CAPConfig(0.5, recipe="magnitude")).prune(model)
    assert model.pruning_record.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("architecture", "pattern", "sparsity", "message"),
    [
        ("llama", "experts", 0.5, "no experts that CAP knows"),
        ("mixtral", "experts", 0.1, "0.1 of 4 experts is 0 experts"),
        ("mixtral", "experts", 0.75, "leaves 1 of 4 experts, fewer than the 2"),
        ("olmoe", "heads", 0.5, "computes something of all heads"),
        ("gpt2", "heads", 0.5, "no config of GPT2LMHeadModel"),
        ("gemma3n", "channels", 0.4, "computes something else than without them"),
        ("gemma4", "layers", 0.25, "no config of Gemma4ForCausalLM"),
    ],
)
def test_refused_before_anything_is_measured(
    architecture: str, pattern: str, sparsity: float, message: str
) -> None:
    model = tiny_model(architecture)
    config = CAPConfig(sparsity, pattern=pattern, recipe="random")
    with pytest.raises(ValueError, match=message):
        CAPPruner(config).prune(model)


@pytest.mark.parametrize(
    ("experts", "groups", "chosen", "per_token", "sparsity", "message"),
    [
        (
            16,
            4,
            2,
            4,
            0.75,
            r"1 of 4 experts in each group \(n_group 4\) .*, which compares groups",
        ),
        (16, 4, 1, 3, 0.5, r"2 of 4 .* \(topk_group 1\) have 2 together, fewer than the 3 experts"),
        (16, 4, 2, 6, 0.5, r"2 of 4 .* \(topk_group 2\) have 4 together, fewer than the 6 experts"),
        (16, 4, 2, 4, 0.4, "has 4 groups of experts of one size, but sparsity 0.4 removes 6 of 16"),
        (4, 1, 1, 1, 0.75, r"1 of 4 experts in each group \(n_group 1\) of the router of Glm4Moe"),
    ],
)
def test_groups_of_experts_that_would_be_too_small(
    experts: int, groups: int, chosen: int, per_token: int, sparsity: float, message: str
) -> None:
    model = tiny_model(
        "glm4_moe",
        n_routed_experts=experts,
        n_group=groups,
        topk_group=chosen,
        num_experts_per_tok=per_token,
    )
    config = CAPConfig(sparsity, pattern="experts", recipe="random")
    with pytest.raises(CannotRemoveError, match=message):
        PartRemoval(model, config, ALONE)


def test_groups_of_experts_become_as_small_as_the_router_allows() -> None:
    model = tiny_model(
        "glm4_moe", n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4
    )
    removed_from(model, "experts", 0.5, recipe="random")
    assert model.config.n_routed_experts == 8
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


def test_classifiers_lose_what_needs_no_predictions() -> None:
    model = tiny_classifier("llama")
    removed_from(model, "channels", 0.4, refine=0)
    assert model.config.intermediate_size == 12
    with pytest.raises(
        ValueError,
        match="criterion 'divergence' measures predictions of tokens: choose criterion 'random' or "
        "'block_influence'",
    ):
        removed_from(model, "layers", 0.4)


def test_damaged_record_of_removed_parts_is_refused() -> None:
    model = tiny_model("mixtral")
    removed_from(model, "experts", 0.5, recipe="random")
    values = json.loads(json.dumps(model.pruning_record.to_dict()))
    assert PruningRecord.from_dict(values).removed == model.pruning_record.removed
    values["removed"]["kept"] = [1]
    with pytest.raises(ValueError, match=r"removed\.kept must be an object"):
        PruningRecord.from_dict(values)
    values["removed"]["parts"] = [{"part": "experts", "before": -1, "after": 1}]
    with pytest.raises(ValueError, match=r"removed\.parts must be a list of objects"):
        PruningRecord.from_dict(values)
    values["removed"] = {"parameters_before": -1}
    with pytest.raises(ValueError, match=r"removed\.parameters_before must be a count"):
        PruningRecord.from_dict(values)
