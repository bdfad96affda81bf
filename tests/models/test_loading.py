"""The Auto class that loads a model with all of its parts."""

from pathlib import Path

import pytest
import torch
import transformers
from helpers.checkpoints import same_weights, saved
from helpers.tiny_image_models import IMAGE_MODELS, tiny_image_model
from helpers.tiny_models import tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from optimum_cap.models.loading import auto_class, is_language_model, load_model, sees_images


def config_of(name: str, **values: object) -> transformers.PreTrainedConfig:
    return getattr(transformers, f"{name}Config")(**values)


@pytest.mark.parametrize("name", ["Llava", "Mistral3", "Qwen2_5_VL", "Qwen3VL", "InternVL"])
def test_models_that_the_causal_class_does_not_know(name: str) -> None:
    assert auto_class(config_of(name)) is AutoModelForImageTextToText
    assert is_language_model(config_of(name))


@pytest.mark.parametrize("name", ["Qwen3_5", "Qwen3_5Moe", "Llama4", "Emu3"])
def test_models_of_which_the_causal_class_knows_the_language_part(name: str) -> None:
    config = config_of(name)
    assert auto_class(config) is AutoModelForImageTextToText
    config.architectures = [f"{name}ForCausalLM"]  # a checkpoint of the language part
    assert auto_class(config) is AutoModelForCausalLM
    assert auto_class(config.get_text_config(decoder=True)) is AutoModelForCausalLM


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma3", "Gemma3Text", "Gemma3n", "Gemma4"])
def test_models_that_the_causal_class_loads_whole(name: str) -> None:
    assert auto_class(config_of(name)) is AutoModelForCausalLM
    assert is_language_model(config_of(name))


def test_code_of_the_repository_comes_first_if_it_may_run() -> None:
    config = config_of("Llava")
    config.auto_map = {"AutoModelForCausalLM": "modeling.Own"}
    assert auto_class(config, trust_remote_code=True) is AutoModelForCausalLM
    assert auto_class(config, trust_remote_code=False) is AutoModelForImageTextToText
    config.auto_map = {"AutoModelForImageTextToText": "modeling.Own"}
    assert auto_class(config, trust_remote_code=True) is AutoModelForImageTextToText


def test_other_models_are_no_language_models() -> None:
    assert not is_language_model(config_of("CLIPVision"))


def test_classes_that_see_images() -> None:
    assert sees_images("Gemma3ForConditionalGeneration")
    assert sees_images("LlavaForConditionalGeneration")
    assert not sees_images("Gemma3ForCausalLM")
    assert not sees_images("")


@pytest.mark.parametrize("name", sorted(IMAGE_MODELS))
def test_a_model_is_loaded_whole(name: str, tmp_path: Path) -> None:
    model = tiny_image_model(name)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32)
    assert type(loaded) is type(model)
    assert same_weights(loaded, model)


def test_an_adapter_is_loaded_onto_its_base_model(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    assert type(load_model(tmp_path / "adapter")) is type(tiny_model("llama"))


def test_a_folder_without_a_model_is_told_by_transformers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unrecognized model in .*config\.json"):
        load_model(tmp_path)
