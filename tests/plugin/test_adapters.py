"""PEFT adapters: refused where they would be lost, and recorded with the pruned model."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.calibration import ROWS
from helpers.checkpoints import pruned
from helpers.tiny_models import tiny_model, tiny_tokenizer
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.plugin.adapters import register

IDS = torch.arange(4, 24)[None]


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)


def config() -> CAPConfig:
    return CAPConfig(sparsity=0.3, recipe="wanda", dataset=ROWS, num_samples=12)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def zeros(model: PreTrainedModel) -> int:
    return sum(int((weight == 0).sum()) for weight in model.state_dict().values())


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize("embedded", [False, True], ids=["adapter folder", "model with adapter"])
def test_an_adapter_folder_is_refused_before_the_model_is_loaded(
    loader: Any, embedded: bool, base: Path, tmp_path: Path
) -> None:
    folder = base if embedded else tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, lora()).save_pretrained(folder)
    if not embedded:
        (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has a PEFT adapter, .*merge_and_unload\(\)"):
        loader.from_pretrained(folder, pruning_config=config())


@pytest.mark.parametrize("loader", [AutoPeftModel, AutoPeftModelForCausalLM])
def test_the_base_model_of_an_adapter_is_not_pruned_alone(
    loader: Any, base: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, lora()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="would prune only the base model of the adapter"):
        loader.from_pretrained(tmp_path / "adapter", pruning_config=config())
    loaded = loader.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded, PeftModel)


def test_models_with_adapters_are_refused_before_pruning() -> None:
    model = tiny_model("llama")
    before = zeros(model)
    wrapped = get_peft_model(model, lora())
    for call in (CAPPruner(config()).prune, CAPPruner(config()).measure):
        with pytest.raises(TypeError, match="got a PeftModel, whose adapters are not merged"):
            call(wrapped, tiny_tokenizer())
    with pytest.raises(ValueError, match="has PEFT adapters, which are not merged"):
        CAPPruner(config()).prune(model, tiny_tokenizer())
    assert zeros(model) == before
    merged = CAPPruner(config()).prune(wrapped.merge_and_unload(), tiny_tokenizer())
    assert merged.pruning_record.sparsity == pytest.approx(0.3, abs=1e-3)


def test_an_adapter_records_the_pruned_model(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, pruning_config=config())
    model.save_pretrained(tmp_path / "pruned")
    adapted = get_peft_model(model, lora())
    adapted.save_pretrained(tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(tmp_path / "pruned")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, adapted(input_ids=IDS).logits)


def test_an_adapter_from_before_the_save_records_the_pruned_model_too(
    base: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, pruning_config=config())
    adapted = get_peft_model(model, lora())
    assert adapted.peft_config["default"].base_model_name_or_path == str(base)
    adapted.unload().save_pretrained(tmp_path / "pruned")
    again = PeftModel(model, adapted.peft_config["default"])
    again.save_pretrained(tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(tmp_path / "pruned")


def test_an_adapter_of_a_loaded_checkpoint_keeps_its_revision(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, pruning_config=config())
    model.save_pretrained(tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    get_peft_model(loaded, lora(), revision="v1").save_pretrained(tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(tmp_path / "pruned")
    assert values["revision"] == "v1"


def test_an_adapter_of_a_pruned_model_that_was_not_saved_warns(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, pruning_config=config())
    get_peft_model(model, lora()).save_pretrained(tmp_path / "adapter")
    assert f"records {str(base)!r} as its base model, which is dense" in caplog.text


def test_other_adapters_are_saved_without_a_word(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    register()
    assert not hasattr(peft.PeftModel.save_pretrained.__wrapped__, "__wrapped__")
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, lora()).save_pretrained(tmp_path / "adapter")
    assert "base model" not in caplog.text


def test_a_model_inside_a_peft_model_is_not_saved(tmp_path: Path) -> None:
    model = pruned()
    adapted = get_peft_model(model, lora())
    with pytest.raises(ValueError, match="this model has the layers of a PeftModel"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    adapted.unload().save_pretrained(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").pruning_record.zeros > 0
