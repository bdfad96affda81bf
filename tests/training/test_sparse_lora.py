"""LoRA on a pruned model: adapters that keep zeros, and merges that drop what would fill them."""

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import disk_offload
from helpers.checkpoints import pruned
from helpers.tiny_models import tiny_model
from helpers.training import IDS, needs_trainer, same_masks, trainer, zero_masks
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_cap.training import SparseLoraConfig, merge_and_keep_sparsity

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def adapter(**options: object) -> SparseLoraConfig:
    options = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **options}
    return SparseLoraConfig(**options)  # type: ignore[arg-type]


def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS[:2]).logits


@pytest.mark.parametrize(
    ("name", "targets"), [("llama", TARGETS), ("gpt2", ["c_attn", "c_fc", "c_proj"])]
)
def test_a_merge_is_as_sparse_and_computes_the_same(name: str, targets: list[str]) -> None:
    model = pruned(name) if name == "llama" else sparse_gpt2()
    before = zero_masks(model)
    dense = logits(model)
    config = adapter(target_modules=targets, fan_in_fan_out=name == "gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = get_peft_model(model, config)
    expected = logits(adapted)
    assert not torch.allclose(expected, dense, atol=1e-2)
    merged = adapted.merge_and_unload()
    assert same_masks(before, zero_masks(merged))
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def sparse_gpt2() -> PreTrainedModel:
    model = tiny_model("gpt2")
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and ("attn.c_attn" in name or "mlp.c_" in name):
            weight.data[torch.rand(weight.shape) < 0.5] = 0
    return model


def test_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(pruned(), adapter(target_modules=["up_proj"], lora_dropout=0.0))
    layer = adapted.base_model.model.model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 5, a.shape[1], requires_grad=True)
    output = layer(x)
    direction = torch.randn_like(output)
    gradients = torch.autograd.grad((output * direction).sum(), (x, a, b))
    weight = layer.base_layer.weight
    update = (b @ a * layer.scaling["default"]).masked_fill(weight == 0, 0)
    expected = torch.autograd.grad(((x @ (weight + update).T) * direction).sum(), (x, a, b))
    torch.testing.assert_close(gradients, expected, atol=1e-4, rtol=1e-4)


@needs_trainer
@pytest.mark.parametrize("bf16", [False, True])
def test_training_changes_the_adapter_alone_and_no_zero(bf16: bool, tmp_path: Path) -> None:
    model = pruned()
    before = zero_masks(model)
    adapted = get_peft_model(model, adapter(init_lora_weights=True, lora_dropout=0.1))
    trainer(adapted, tmp_path, bf16=bf16).train()
    b = adapted.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight
    assert b.abs().sum() > 0
    expected = logits(adapted)
    merged, lost = merge_and_keep_sparsity(adapted)
    assert lost == 0
    assert same_masks(before, zero_masks(merged))
    tolerance = 0.05 if bf16 else 1e-5  # the Trainer leaves autocast on
    torch.testing.assert_close(logits(merged), expected, atol=tolerance, rtol=tolerance)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.pruning_record.zeros == sum(int(mask.sum()) for mask in before.values())


def test_a_saved_adapter_is_masked_again(tmp_path: Path) -> None:
    base = pruned()
    base.save_pretrained(tmp_path / "pruned")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), adapter())
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["keep_sparsity"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = [
            PeftModel.from_pretrained(base, tmp_path / "adapter"),
            AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        ]
    for each in loaded:
        torch.testing.assert_close(logits(each), expected)


def test_layers_without_zeros_get_an_ordinary_adapter() -> None:
    model = pruned()
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight.data)
    adapted = get_peft_model(model, adapter(target_modules=["up_proj"]))
    first, *others = [layer.mlp.up_proj.lora_variant for layer in adapted.model.model.layers]
    assert not first
    assert all(others)


def test_adapters_can_be_merged_and_taken_out_again() -> None:
    model = pruned()
    dense = logits(model)
    adapted = get_peft_model(model, adapter())
    expected = logits(adapted)
    for safe in (False, True):
        adapted.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)
        adapted.unmerge_adapter()
        torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), dense, atol=1e-5, rtol=1e-5)


def test_an_ordinary_adapter_loses_what_falls_on_zeros() -> None:
    model = pruned()
    before = zero_masks(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    original = weight.detach().clone()
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False)
    )
    layers = [layer.mlp.up_proj for layer in adapted.base_model.model.model.layers]
    updates = [layer.get_delta_weight("default").detach() for layer in layers]
    zeros = [layer.base_layer.weight == 0 for layer in layers]
    merged, lost = merge_and_keep_sparsity(adapted)
    assert same_masks(before, zero_masks(merged))
    dropped = sum(
        float(update[mask].square().sum()) for update, mask in zip(updates, zeros, strict=True)
    )
    assert lost == pytest.approx(dropped / sum(float(each.square().sum()) for each in updates))
    assert 0.2 < lost < 0.4
    torch.testing.assert_close(
        merged.model.layers[1].mlp.up_proj.weight, original + updates[1].masked_fill(zeros[1], 0)
    )
    assert not hasattr(merged, "peft_config")


def test_adapters_of_experts_are_merged() -> None:
    model = pruned("mixtral")
    before = zero_masks(model)
    parameters = [name for name in before if "experts" in name]
    config = LoraConfig(r=2, target_modules=[], target_parameters=parameters)
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    merged, lost = merge_and_keep_sparsity(adapted)
    assert same_masks(before, zero_masks(merged))
    assert 0.2 < lost < 0.4


@pytest.mark.parametrize("sparse_first", [False, True])
def test_adapters_with_and_without_a_mask_on_one_model(sparse_first: bool) -> None:
    dense_config = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    configs = {"sparse": adapter(target_modules=["up_proj"]), "plain": dense_config}
    names = ["sparse", "plain"] if sparse_first else ["plain", "sparse"]
    model = pruned()
    before = zero_masks(model)
    adapted = get_peft_model(model, configs[names[0]], names[0])
    adapted.add_adapter(names[1], configs[names[1]])
    layer = adapted.model.model.layers[1].mlp.up_proj
    assert list(layer.lora_variant) == ["sparse"]
    adapted.add_adapter("dora", LoraConfig(r=2, target_modules=["up_proj"], use_dora=True))
    assert type(layer.lora_variant["dora"]).__name__ == "DoraLinearVariant"
    adapted.set_adapter("sparse")
    expected = logits(adapted)
    merged, lost = merge_and_keep_sparsity(adapted, ["sparse"])
    assert lost == 0
    assert same_masks(before, zero_masks(merged))
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


@needs_trainer
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        adapted = get_peft_model(pruned(), adapter())
        trainer(
            adapted,
            tmp_path,
            max_steps=2,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
        ).train()
        results.append(logits(adapted))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(target_modules=["up_proj"], r=2, init_weights=False),
        peft.OFTConfig(target_modules=["up_proj"], r=0, oft_block_size=4),
        LoraConfig(target_modules=["up_proj"], r=2, use_dora=True, init_lora_weights=False),
        LoraConfig(target_modules=["up_proj"], r=2, modules_to_save=["down_proj"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapters_of_other_methods_are_merged(config: Any) -> None:
    model = pruned()
    before = zero_masks(model)
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    whole = copy.deepcopy(adapted).merge_and_unload()
    merged, lost = merge_and_keep_sparsity(adapted)
    assert same_masks(before, zero_masks(merged))
    assert 0 <= lost < 0.5
    for name, mask in before.items():
        expected = whole.get_parameter(name).masked_fill(mask, 0)
        torch.testing.assert_close(merged.get_parameter(name), expected, msg=name)
    assert type(config) is not LoraConfig or lost > 0


def test_what_was_merged_before_is_taken_out_first() -> None:
    model = pruned()
    before = zero_masks(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    adapted.merge_adapter()
    merged, lost = merge_and_keep_sparsity(adapted)
    assert same_masks(before, zero_masks(merged))
    assert lost > 0.1


@pytest.mark.parametrize("method", ["pissa", "olora", "loftq", "corda", "lora_ga"])
def test_initialisations_that_change_the_base_model_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=f"init_lora_weights='{method}' changes the weights"):
        adapter(init_lora_weights=method)


def test_zeros_that_were_lost_before_are_noticed() -> None:
    model = pruned()
    record = model.pruning_record
    model.pruning_record = dataclasses.replace(record, zeros_after=record.zeros)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights="pissa")
    )
    with pytest.raises(ValueError, match=r"zeros of this LlamaForCausalLM have been filled"):
        merge_and_keep_sparsity(adapted)


def test_layers_that_cannot_have_a_mask_are_refused(tmp_path: Path) -> None:
    model = pruned()
    model.model.embed_tokens.weight.data[:8] = 0
    with pytest.raises(ValueError, match="a Embedding with zeros cannot have a sparse adapter"):
        get_peft_model(model, adapter(target_modules=["embed_tokens"]))
    model = pruned()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.requires_grad = False
    weight.data = weight.data.to(torch.int8)
    with pytest.raises(ValueError, match=r"quantized \(Parameter, torch.int8\)"):
        get_peft_model(model, adapter())
    adapted = get_peft_model(pruned(), LoraConfig(target_modules=["q_proj"]))
    weight = adapted.model.model.layers[0].mlp.up_proj.weight
    weight.requires_grad = False
    weight.data = weight.data.to(torch.int8)
    with pytest.raises(ValueError, match=r"up_proj.weight is quantized \(torch.int8\)"):
        merge_and_keep_sparsity(adapted)
    offloaded = pruned()
    disk_offload(offloaded, tmp_path)
    with pytest.raises(ValueError, match="are offloaded, so their zeros cannot be seen"):
        get_peft_model(offloaded, adapter())


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="keep_sparsity of a SparseLoraConfig must be True"):
        adapter(keep_sparsity=False)
    with pytest.raises(ValueError, match="cannot adapt parameters of experts"):
        adapter(target_parameters=["experts.down_proj"])
    with pytest.raises(ValueError, match="cannot be combined with DoraLinearVariant"):
        get_peft_model(pruned(), adapter(use_dora=True))
    with pytest.raises(TypeError, match=r"needs a PeftModel.*got a LlamaForCausalLM"):
        merge_and_keep_sparsity(pruned())  # type: ignore[arg-type]
    dense = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has no zeros to keep: use merge_and_unload"):
        merge_and_keep_sparsity(dense)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="cannot be merged"):
        merge_and_keep_sparsity(get_peft_model(pruned(), prompts))
