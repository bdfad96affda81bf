"""Zeros of a pruned model stay zeros while it is trained, with any optimizer and in any wrapper."""

import copy
import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, disk_offload
from helpers.checkpoints import pruned
from helpers.processes import ranks
from helpers.tiny_models import tiny_model
from helpers.training import IDS, needs_trainer, rows, same_masks, trainer, zero_masks
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from optimum_cap.training import KeepSparsity, SparsityKeeper, keep_sparsity
from optimum_cap.training.sparsity import pack_bits, unpack_bits

OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "adafactor": lambda weights: torch.optim.Adafactor(weights, lr=1e-2),
    # Its update of a weight depends on the gradients of others, so zeros alone would not last.
    "mixing": lambda weights: Mixing(weights),
}


class Mixing(torch.optim.SGD):
    """An optimizer whose update of every weight is the mean of the gradients of its matrix."""

    def __init__(self, weights: Any) -> None:
        super().__init__(weights, lr=0.1)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.grad.add_(weight.grad.mean() + 0.1)
        super().step(closure)


def train(model: PreTrainedModel, optimizer: Any, steps: int = 3, accumulate: int = 2) -> None:
    for step in range(steps):
        for part in range(accumulate):
            ids = IDS[4 * (step + part) :][:4]
            model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@given(count=st.integers(1, 70), seed=st.integers(0, 9))
def test_bits_come_back(count: int, seed: int) -> None:
    mask = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.numel() == -(-count // 8)
    assert torch.equal(unpack_bits(packed, count), mask)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_through_any_optimizer(optimizer: str) -> None:
    model = pruned()
    before = zero_masks(model)
    values = [weight.detach().clone() for weight in model.parameters()]
    stepping = OPTIMIZERS[optimizer](model.parameters())
    with keep_sparsity(model, stepping):
        train(model, stepping)
    assert same_masks(before, zero_masks(model))
    assert all(
        not torch.equal(new, old) for new, old in zip(model.parameters(), values, strict=True)
    )


def test_without_it_they_are_lost() -> None:
    model = pruned()
    before = zero_masks(model)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert not same_masks(before, zero_masks(model))


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "gemma4"])
def test_transposed_weights_and_experts(name: str) -> None:
    model = pruned(name)
    before = zero_masks(model)
    assert before
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with keep_sparsity(model, optimizer):
        train(model, optimizer, steps=1)
    assert same_masks(before, zero_masks(model))


def test_momentum_of_before_does_not_fill_zeros() -> None:
    model = pruned()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    weights = [weight.detach().clone() for weight in model.parameters()]
    train(model, optimizer, steps=1)
    with torch.no_grad():
        for weight, old in zip(model.parameters(), weights, strict=True):
            weight.copy_(old)
    before = zero_masks(model)
    with keep_sparsity(model, optimizer):
        train(model, optimizer)
    assert same_masks(before, zero_masks(model))


def test_gradients_are_those_of_the_kept_weights_before_they_are_clipped() -> None:
    model, other = pruned(), pruned()
    keeper = SparsityKeeper(model)
    for each in (model, other):
        each(input_ids=IDS, labels=IDS).loss.backward()
    masks = zero_masks(model)
    for (name, weight), (_, unmasked) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        mask = masks.get(name, torch.zeros_like(weight, dtype=torch.bool))
        assert torch.equal(weight.grad, unmasked.grad.masked_fill(mask, 0))
    keeper.remove()


def test_an_infinite_gradient_leaves_no_nan() -> None:
    model = pruned()
    keeper = SparsityKeeper(model)
    loss = model(input_ids=IDS[:2], labels=IDS[:2]).loss * torch.inf
    loss.backward()
    for name, mask in zero_masks(model).items():
        assert (model.get_parameter(name).grad[mask] == 0).all()
    keeper.remove()


def test_remove_ends_it() -> None:
    model = pruned()
    before = zero_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    keep_sparsity(model, optimizer).remove()
    train(model, optimizer)
    assert not same_masks(before, zero_masks(model))


def test_masks_take_one_bit_per_weight() -> None:
    keeper = SparsityKeeper(pruned())
    weights = sum(mask.parameter.numel() for mask in keeper._masks)
    assert sum(mask._bits.numel() for mask in keeper._masks) == pytest.approx(weights / 8, rel=0.01)
    assert keeper.zeros == pytest.approx(0.3 * weights, rel=0.05)


def test_frozen_weights_need_no_mask() -> None:
    model = pruned()
    trained = model.model.layers[1].mlp.up_proj.weight
    for weight in model.parameters():
        weight.requires_grad = weight is trained
    assert [mask.parameter for mask in SparsityKeeper(model)._masks] == [trained]


def test_models_without_a_record_keep_their_zeros() -> None:
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data[torch.rand(weight.shape) < 0.5] = 0
    before = weight.detach() == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with keep_sparsity(model, optimizer):
        train(model, optimizer)
    assert torch.equal(weight == 0, before)


def test_accelerate_and_compiled_models(torch_that_compiles: None) -> None:
    accelerator = Accelerator(cpu=True)
    base = pruned()
    before = zero_masks(base)
    model, optimizer = accelerator.prepare(base, torch.optim.AdamW(base.parameters(), lr=1e-2))
    compiled = torch.compile(model, backend="eager")
    with keep_sparsity(compiled, optimizer):
        for _ in range(2):
            accelerator.backward(compiled(input_ids=IDS[:4], labels=IDS[:4]).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert same_masks(before, zero_masks(base))


@needs_trainer
@pytest.mark.parametrize("bf16", [False, True])
def test_the_callback_keeps_zeros_and_saves_a_sparse_checkpoint(bf16: bool, tmp_path: Path) -> None:
    model = pruned()
    before = zero_masks(model)
    training = trainer(
        model,
        tmp_path,
        bf16=bf16,
        gradient_accumulation_steps=2,
        callbacks=[KeepSparsity()],
        save_strategy="steps",
        save_steps=2,
    )
    training.train()
    assert same_masks(before, zero_masks(model))
    training.save_model(str(tmp_path / "tuned"))
    for folder in (tmp_path / "tuned", tmp_path / "checkpoint-2"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert same_masks(before, zero_masks(loaded))
        assert loaded.pruning_record.zeros == sum(int(mask.sum()) for mask in before.values())


@needs_trainer
@pytest.mark.slow
def test_the_callback_works_twice(tmp_path: Path) -> None:
    model = pruned()
    before = zero_masks(model)
    training = trainer(model, tmp_path, callbacks=[KeepSparsity()])
    training.train()
    training.train()
    assert same_masks(before, zero_masks(model))


@needs_trainer
@pytest.mark.parametrize("checkpoint_format", ["packed", "coded", "dense"])
def test_a_training_resumes_from_its_checkpoint(checkpoint_format: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = pruned(checkpoint_format=checkpoint_format)
    trainer(whole, tmp_path / "whole", callbacks=[KeepSparsity()], **options).train()
    resumed = pruned(checkpoint_format=checkpoint_format)
    training = trainer(resumed, tmp_path / "resumed", callbacks=[KeepSparsity()], **options)
    training.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert training.state.global_step == 4
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, resumed.get_parameter(name)), name


@needs_trainer
@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = pruned()
    before = zero_masks(model)
    training = trainer(
        model,
        tmp_path,
        callbacks=[KeepSparsity()],
        eval_dataset=rows()[:4],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        learning_rate=1.0,  # so that the first step is the best one
    )
    training.train()
    best = training.state.best_model_checkpoint
    assert best != str(tmp_path / "checkpoint-4")
    loaded = AutoModelForCausalLM.from_pretrained(best)
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    assert same_masks(before, zero_masks(model))


def test_weights_with_other_names_in_the_file_are_refused(tmp_path: Path) -> None:
    model = pruned("mixtral")
    model.save_pretrained(tmp_path)
    state_dict = load_file(tmp_path / "model.safetensors")
    before = model.get_parameter("model.layers.0.self_attn.q_proj.weight").clone()
    with pytest.raises(ValueError, match=r"other packed or coded weights have other names in Mix"):
        model.load_state_dict(state_dict, strict=False)
    assert torch.equal(model.get_parameter("model.layers.0.self_attn.q_proj.weight"), before)


@pytest.mark.parametrize("copied", [False, True])
def test_packed_weights_load_into_pruned_models(copied: bool, tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(pruned(seed=1)) if copied else pruned(seed=1)
    holder = torch.nn.ModuleDict({"inside": other})
    file = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("_mask") for name in file)
    holder.load_state_dict({f"inside.{name}": tensor for name, tensor in file.items()})
    for name, weight in model.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name


SCRIPT = """
import os, sys, torch
sys.path.insert(0, {tests!r})
import torch.distributed as dist
from helpers.checkpoints import pruned
from helpers.training import IDS, zero_masks
from optimum_cap.training import keep_sparsity

torch.set_num_threads(1)
dist.init_process_group("gloo")
model = pruned()
before = zero_masks(model)
if sys.argv[1] == "ddp":
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    wrapped = fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
with keep_sparsity(wrapped, optimizer):
    for step in range(3):
        ids = IDS[8 * step + 4 * dist.get_rank():][:4]
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
weights = {{
    name: weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    for name, weight in model.named_parameters()
}}
same = all(torch.equal(weights[name] == 0, mask) for name, mask in before.items())
print(same, float(weights["model.layers.1.mlp.up_proj.weight"].abs().sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_processes(wrapper: str) -> None:
    outputs = [process.stdout.split() for process in ranks(wrapper, script=SCRIPT)]
    assert outputs[0] == outputs[1]
    assert outputs[0][0] == "True"


@needs_trainer
def test_an_interrupted_training_leaves_no_hooks(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model = pruned()
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, callbacks=[KeepSparsity(), Interrupt()]).train()
    gc.collect()
    assert not any(weight._post_accumulate_grad_hooks for weight in model.parameters())


def test_it_lasts_as_long_as_the_optimizer() -> None:
    model = pruned()
    before = zero_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    keep_sparsity(model, optimizer)
    gc.collect()
    train(model, optimizer)
    assert same_masks(before, zero_masks(model))


def test_layers_that_start_at_zero_are_trained() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[:5] = 0
    gate = torch.nn.init.zeros_(model.model.layers[1].mlp.gate_proj.weight)
    keeper = SparsityKeeper(model)
    assert [mask.parameter for mask in keeper._masks] == [model.model.layers[0].mlp.up_proj.weight]
    assert gate.requires_grad


@needs_trainer
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    model = pruned()
    before = zero_masks(model)
    kwargs = {"use_reentrant": reentrant}
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    trainer(model, tmp_path, callbacks=[KeepSparsity()], **options).train()
    assert same_masks(before, zero_masks(model))


def test_other_tensors_of_a_state_dict_stay(tmp_path: Path) -> None:
    model = pruned()
    layer = model.model.layers[0].mlp.up_proj
    prune.l1_unstructured(layer, "weight", amount=0.5)  # has a buffer weight_mask of its own
    state_dict = {name: value.clone() for name, value in model.state_dict().items()}
    layer.weight_mask.zero_()
    model.load_state_dict(state_dict)
    assert layer.weight_mask.any()


def test_what_is_refused() -> None:
    dense = tiny_model("llama")
    with pytest.raises(ValueError, match="this LlamaForCausalLM has no zeros to keep: prune it"):
        keep_sparsity(dense, torch.optim.AdamW(dense.parameters()))
    frozen = pruned().requires_grad_(False)
    with pytest.raises(ValueError, match="all pruned weights of this LlamaForCausalLM are frozen"):
        SparsityKeeper(frozen)
    model = pruned()
    with pytest.raises(TypeError, match=r"needs a torch\.optim\.Optimizer, got a str"):
        keep_sparsity(model, "adamw")
    record = model.pruning_record
    model.pruning_record = dataclasses.replace(record, zeros_after=record.zeros)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1)
    with pytest.raises(ValueError, match=r"of the .* zeros of this LlamaForCausalLM have been fil"):
        SparsityKeeper(model)
    adapted = get_peft_model(pruned(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"has PEFT adapters, .* SparseLoraConfig"):
        SparsityKeeper(adapted)


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    model = pruned()
    disk_offload(model, tmp_path)
    with pytest.raises(ValueError, match="are offloaded, and such weights cannot be trained"):
        SparsityKeeper(model)
