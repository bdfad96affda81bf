"""Compaction: what is zero goes, and the smaller model computes what the model does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import half_on_disk, pruned, saved
from helpers.command_line import run_cap
from helpers.every_architecture import small_model
from helpers.tiny_image_models import tiny_image_model
from helpers.tiny_models import SAMPLE, tiny_classifier, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_cap import compact
from optimum_cap.checkpoint import PruningRecord, inspect_checkpoint
from optimum_cap.models import CannotRemoveError, ModelView, Site, call_model
from optimum_cap.pruning import CompactedParts

TOKENS = torch.arange(3, 27).view(2, 12)
MODELS = ["llama", "gpt2", "gemma3", "qwen3_moe"]
OTHERS = [*(each for each in SAMPLE if each not in MODELS), "glm4_moe", "olmoe", "qwen2"]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return call_model(model, TOKENS).logits


def mlps(view: ModelView) -> list[Site]:
    return [site for site in view.sites if not site.mixes_tokens]


def zero_channels(model: PreTrainedModel, count: int = 8) -> None:
    """Zero other columns of the output projection of each MLP and expert."""
    view = ModelView.of(model)
    generator = torch.Generator().manual_seed(0)
    for site in mlps(view):
        columns = torch.randperm(site.width, generator=generator)[:count]
        view.writable_weights(site.output_proj)[:, columns] = 0


def zero_second_half_of_heads(model: PreTrainedModel) -> None:
    view = ModelView.of(model)
    for site in view.sites:
        if site.kind == "attention":
            view.writable_weights(site.output_proj)[:, site.width // 2 :] = 0


def zero_layer(model: PreTrainedModel, layer: int, biases: bool = True) -> None:
    """Zero the output projections of a layer."""
    view = ModelView.of(model)
    for site in view.sites:
        if site.layer == layer:
            view.writable_weights(site.output_proj).zero_()
            name = site.output_proj.parameter.removesuffix("weight") + "bias"
            if biases and name in dict(model.named_parameters()):
                model.get_parameter(name).data.zero_()


def removed(parts: list[CompactedParts]) -> dict[str, int]:
    return {each.part: each.removed for each in parts}


@pytest.mark.parametrize(
    "architecture", MODELS + [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)
def test_logits_stay(architecture: str) -> None:
    model = tiny_model(architecture)
    zero_channels(model)
    zero_second_half_of_heads(model)
    expected, before = logits(model), model.num_parameters()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compaction = compact(model)
    torch.testing.assert_close(logits(compaction.model), expected, atol=1e-5, rtol=1e-4)
    assert compaction.difference < 1e-5
    assert type(compaction.model) is type(model)
    assert compaction.model.num_parameters() < before == model.num_parameters()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    *channels, heads, layers = [each.removed for each in compaction.parts]
    assert layers == 0
    # Numbers that the config derives from others, norms of all heads, and other heads by layer.
    assert (heads > 0) == (architecture not in ("gpt2", "gpt_neox", "opt", "olmoe", "gemma4"))
    # Some MLPs have a number of channels that the config derives from others.
    assert 8 in channels
    assert {*channels} <= {0, 8}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_mode_and_settings_stay(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype).train()
    zero_channels(model)
    model.generation_config.max_new_tokens = 7
    model.name_or_path = "somewhere/else"
    model.lm_head.weight.requires_grad = False
    smaller = compact(model).model
    assert {parameter.dtype for parameter in smaller.parameters()} == {dtype}
    assert smaller.training
    assert model.training
    assert smaller.generation_config.max_new_tokens == 7
    assert smaller.name_or_path == "somewhere/else"
    assert not smaller.lm_head.weight.requires_grad
    assert smaller.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
def test_channels_with_a_zero_input_are_dead(name: str) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        getattr(layer.mlp, name).weight.data[4:8] = 0
    [channels, *_] = compact(model).parts
    assert (channels.before, channels.dead, channels.removed) == (20, (4, 4), 4)
    assert channels.kept["model.layers.0.mlp.down_proj"] == [*range(4), *range(8, 20)]


def test_inputs_of_experts_and_fused_inputs() -> None:
    for architecture in ("mixtral", "phi3"):
        model = tiny_model(architecture)
        for name, parameter in model.named_parameters():
            if "gate_up_proj" in name:
                parameter.data[..., :4, :] = 0  # of the gate
                parameter.data[..., 24:28, :] = 0  # of the values
        expected = logits(model)
        compaction = compact(model)
        assert compaction.parts[0].dead == (8, 8)
        torch.testing.assert_close(logits(compaction.model), expected, atol=1e-5, rtol=1e-4)


def test_biases_keep_channels_alive() -> None:
    model = tiny_model("gpt2")
    for layer in model.transformer.h:
        layer.mlp.c_fc.weight.data[:, :8] = 0
    with pytest.raises(CannotRemoveError, match="no channel of 20 that is all zeros"):
        compact(model)
    for layer in model.transformer.h:
        layer.mlp.c_fc.bias.data[:4] = 0
    [channels, *_] = compact(model).parts
    assert channels.removed == 4


def test_activations_that_make_something_of_zero() -> None:
    model = tiny_model("llama", hidden_act="sigmoid")
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data[:4] = 0
    with pytest.raises(CannotRemoveError, match="no channel of 20 that is all zeros"):
        compact(model)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[8:12] = 0
    assert compact(model).parts[0].dead == (4, 4)


def test_bias_behind_the_channels_stays() -> None:
    model = tiny_model("gpt2")
    for layer in model.transformer.h:
        layer.mlp.c_proj.weight.data.zero_()
    expected = logits(model)
    compaction = compact(model)
    assert compaction.parts[0].reason == "4 of 20 channels have to stay"
    assert compaction.model.config.n_inner == 4
    torch.testing.assert_close(logits(compaction.model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "architecture",
    ["gpt2", "gemma3"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "mixtral", "qwen3_moe")],
)
def test_layers_that_add_nothing(architecture: str) -> None:
    model = tiny_model(architecture)
    zero_layer(model, 0)
    expected = logits(model)
    compaction = compact(model)
    assert removed(compaction.parts)["layers"] == 1
    assert compaction.parts[-1].kept == {"layers": [1, 2]}
    assert compaction.model.config.num_hidden_layers == 2
    torch.testing.assert_close(logits(compaction.model), expected, atol=1e-5, rtol=1e-4)


def test_one_layer_of_each_kind_stays() -> None:
    model = tiny_model("gemma3")
    zero_layer(model, 1)  # the only one with full attention
    with pytest.raises(CannotRemoveError, match="one layer of each of the 2 kinds has to stay"):
        compact(model)


def test_layers_with_biases_or_half_of_their_zeros_stay() -> None:
    model = tiny_model("gpt2")
    zero_layer(model, 1, biases=False)
    with pytest.raises(CannotRemoveError, match="none of the 3 layers adds nothing"):
        compact(model)
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    with pytest.raises(CannotRemoveError, match="none of the 3 layers adds nothing"):
        compact(model)


def test_one_layer_stays() -> None:
    model = tiny_model("llama")
    for layer in range(3):
        zero_layer(model, layer)
    compaction = compact(model)
    assert removed(compaction.parts) == {"channels": 16, "heads": 1, "layers": 2}
    assert compaction.parts[-1].reason == "one of the 3 layers has to stay"
    torch.testing.assert_close(logits(compaction.model), logits(model))


def test_layers_that_receive_features_of_images_stay() -> None:
    model = tiny_image_model("qwen3_vl")
    zero_layer(model, 1)
    with pytest.raises(CannotRemoveError, match="adds features of images to its first layers"):
        compact(model)


def test_every_layer_loses_the_same_number() -> None:
    model = tiny_model("llama", intermediate_size=32)
    for number, layer in zip((8, 20, 31), model.model.layers, strict=True):
        layer.mlp.down_proj.weight.data[:, 32 - number :] = 0
    compaction = compact(model)
    [channels, *_] = compaction.parts
    assert (channels.dead, channels.removed) == ((8, 31), 8)
    assert "every layer must lose the same number of channels, a multiple of 8, and layer 0 has 8 "
    assert "and layer 0 has 8 of 32 that are all zeros" in channels.reason
    assert channels.kept["model.layers.2.mlp.down_proj"] == [0, *range(9, 32)]  # the first ones go
    torch.testing.assert_close(logits(compaction.model), logits(model), atol=1e-5, rtol=1e-4)


def test_refused_if_nothing_can_go() -> None:
    model = tiny_model("llama", intermediate_size=32)
    for number, layer in zip((7, 20, 31), model.model.layers, strict=True):
        layer.mlp.down_proj.weight.data[:, :number] = 0
    with pytest.raises(
        CannotRemoveError,
        match=r"nothing can be removed from this LlamaForCausalLM .*\(every layer must lose the "
        r"same number of channels, a multiple of 8, and layer 0 has 7 of 32 that are all zeros; "
        r"every layer must lose the same number of key/value heads, and layer 0 has no key/value "
        r"head of 2 that is all zeros; none of the 3 layers adds nothing",
    ):
        compact(model)


def test_experts_and_mlps_with_one_number_lose_as_many() -> None:
    model = tiny_model("glm4_moe", first_k_dense_replace=0)
    zero_channels(model, 8)
    compaction = compact(model)
    channels = compaction.parts[0]
    assert (channels.of, channels.before, channels.removed) == ("experts and MLPs", 12, 8)
    assert compaction.model.config.moe_intermediate_size == 4
    torch.testing.assert_close(logits(compaction.model), logits(model), atol=1e-5, rtol=1e-4)


def test_experts_that_return_zeros_stay() -> None:
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data[1] = 0
    with pytest.raises(CannotRemoveError, match="expert 0 of layer 0 has no channel of 20"):
        compact(model)
    zero_second_half_of_heads(model)
    compaction = compact(model)
    assert compaction.silent_experts == 3
    assert compaction.model.config.num_local_experts == 4
    torch.testing.assert_close(logits(compaction.model), logits(model), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_refused_if_it_computes_something_else() -> None:
    model = tiny_model("gemma3n")  # keeps the largest channels, by the deviation of all
    zero_channels(model)
    with pytest.raises(CannotRemoveError, match="channels removed computes something else than"):
        compact(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss", "qwen3_next", "llama4_text", "zamba2"])
def test_other_architectures(kind: str) -> None:
    model = small_model(kind)
    zero_channels(model)
    zero_second_half_of_heads(model)
    tokens = TOKENS % 20
    with torch.no_grad():
        expected = call_model(model, tokens).logits
        try:
            smaller = compact(model).model
        except CannotRemoveError:
            return
        found = call_model(smaller, tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_classifiers() -> None:
    model = tiny_classifier("llama")
    zero_channels(model)
    assert compact(model).model.config.intermediate_size == 12


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_record_says_what_was_removed(architecture: str, tmp_path: Path) -> None:
    model = pruned(architecture)
    zero_channels(model)
    zero_layer(model, 0)
    zeros = sum(int((tensor == 0).sum()) for tensor in model.state_dict().values())
    smaller = compact(model).model
    smaller.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    summary = inspect_checkpoint(tmp_path, verify=True)
    record = summary.record
    assert summary.checkpoint_format == "dense"
    [compacted] = record.compacted
    assert [each["part"] for each in compacted["parts"]] == ["channels", "layers"]
    assert compacted["kept"]["layers"] == [1, 2]
    assert compacted["parameters_before"] == model.num_parameters()
    assert compacted["parameters_after"] == smaller.num_parameters()
    assert not record.removed
    assert {entry.name.split(".")[2] for entry in record.matrices} == {"0", "1"}
    assert record.matrices
    assert record.zeros < zeros
    assert record.total == sum(
        tensor.numel() for name, tensor in smaller.named_parameters() if "proj" in name
    )
    assert not record.lost_zeros
    card = (tmp_path / "README.md").read_text()
    assert "| Compacted | 8 of 20 channels in each layer and 1 of 3 layers; " in card
    assert "It is an ordinary, smaller model" in card
    # Once more: it is added.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    zero_second_half_of_heads(loaded)
    again = compact(loaded).model.pruning_record
    assert [len(each["parts"]) for each in again.compacted] == [2, 1]


def test_damaged_record_of_compacted_parts_is_refused() -> None:
    model = pruned("llama")
    zero_channels(model)
    values = json.loads(json.dumps(compact(model).model.pruning_record.to_dict()))
    assert PruningRecord.from_dict(values).compacted == values["compacted"]
    values["compacted"][0]["kept"] = 3
    with pytest.raises(ValueError, match=r"compacted\[0\]\.kept must be an object of lists"):
        PruningRecord.from_dict(values)
    values["compacted"] = [3]
    with pytest.raises(ValueError, match="compacted must be a list of objects"):
        PruningRecord.from_dict(values)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="compact takes a loaded model, got the name 'folder'"):
        compact("folder")
    offloaded = half_on_disk(saved(tmp_path / "model"), tmp_path / "offloaded")
    with pytest.raises(ValueError, match="weights of this one are offloaded: load it without"):
        compact(offloaded)


@pytest.fixture
def zeroed(tmp_path: Path) -> Path:
    """A checkpoint without a record, with zeros, and what lies beside the weights."""
    folder = tmp_path / "zeroed"
    model = tiny_model("llama")
    zero_channels(model)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    tiny_tokenizer("{{ messages }}").save_pretrained(folder)
    (folder / "README.md").write_text("# Ours\n")
    (folder / "model.gguf").write_bytes(b"GGUF")
    return folder


def test_command(
    zeroed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output = zeroed.parent / "smaller"
    status, out, _ = run_cap(monkeypatch, capfd, ["compact", zeroed, "-o", output])
    assert status == 0
    assert "channels of MLPs      20  8 in each layer        8" in out
    assert "key/value heads stay: every layer must lose the same number of key/value heads" in out
    loaded = AutoModelForCausalLM.from_pretrained(output)
    original = AutoModelForCausalLM.from_pretrained(zeroed)
    assert f"{original.num_parameters():,} -> {loaded.num_parameters():,}" in out
    torch.testing.assert_close(logits(loaded), logits(original), atol=1e-5, rtol=1e-4)
    assert loaded.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(output).chat_template == "{{ messages }}"
    assert {path.name for path in output.iterdir()} == {
        *(path.name for path in zeroed.iterdir()),
    } - {"model.gguf"}
    assert not hasattr(loaded, "pruning_record")

    status, out, err = run_cap(monkeypatch, capfd, ["compact", output, "-o", output / "x"])
    assert status == 1
    assert "error: nothing can be removed from this LlamaForCausalLM" in err
    assert not (output / "x").exists()


def test_command_keeps_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = pruned("llama")
    zero_channels(model)
    model.save_pretrained(tmp_path / "packed")
    tiny_tokenizer().save_pretrained(tmp_path / "packed")
    output = tmp_path / "smaller"
    status, _, _ = run_cap(monkeypatch, capfd, ["compact", tmp_path / "packed", "-o", output])
    assert status == 0
    status, out, _ = run_cap(monkeypatch, capfd, ["inspect", output, "--verify"])
    assert status == 0
    assert "compacted     8 of 20 channels in each layer; " in out
    assert (output / "tokenizer.json").is_file()
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(output)), logits(model), atol=1e-5, rtol=1e-4
    )


WITHOUT_PLUGIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(name.startswith("optimum_cap") for name in sys.modules)
torch.save(model(torch.arange(3, 27).view(2, 12)).logits, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_transformers_loads_it_without_the_plugin(architecture: str, tmp_path: Path) -> None:
    model = pruned(architecture) if architecture == "llama" else tiny_model(architecture)
    zero_channels(model)
    zero_layer(model, 2)
    compact(model).model.save_pretrained(tmp_path / "smaller")
    found = tmp_path / "logits.pt"
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", WITHOUT_PLUGIN, str(tmp_path / "smaller"), str(found)]
    subprocess.run(command, check=True, env=environment)
    torch.testing.assert_close(torch.load(found), logits(model), atol=1e-5, rtol=1e-4)
