"""Models whose pruned weights could not be saved are refused before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pruning_runs import config
from helpers.tiny_models import tiny_model, tiny_tokenizer
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_pruning
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.quantization_config import GgufConfig

from optimum_cap import CAPPruner


def zeros(model: PreTrainedModel) -> int:
    return sum(int((weight == 0).sum()) for weight in model.state_dict().values())


def quantized_by_gguf(model: PreTrainedModel) -> None:
    class Quantizer:
        quantization_config = GgufConfig()

    model.hf_quantizer = Quantizer()


def with_an_invalid_generation_config(model: PreTrainedModel) -> None:
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.5)


def with_a_config_that_is_not_json(model: PreTrainedModel) -> None:
    model.config.extra = {1, 2}


def pruned_by_torch(model: PreTrainedModel) -> None:
    torch_pruning.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.3)


def with_weight_norm(model: PreTrainedModel) -> None:
    parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def with_legacy_weight_norm(model: PreTrainedModel) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.model.layers[0].mlp.up_proj)


def with_a_compiled_layer(model: PreTrainedModel) -> None:
    model.model.layers[1] = torch.compile(model.model.layers[1])


def with_weights_in_one_storage(model: PreTrainedModel) -> None:
    first, second, *_ = model.model.layers
    weight = torch.randn_like(first.mlp.up_proj.weight)
    first.mlp.up_proj.weight = nn.Parameter(weight)
    second.mlp.up_proj.weight = nn.Parameter(weight)


def with_a_matrix_inside_the_embedding(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    embedding = model.model.embed_tokens.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(embedding.detach()[4 : 4 + len(weight)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pruned_by_torch, r"computed from other parameters .*prune\.remove"),
        (with_weight_norm, r"computed from other parameters .*remove_parametrizations"),
        (with_legacy_weight_norm, "computed from other parameters .*remove_weight_norm"),
        (with_a_compiled_layer, r"1 layers .* compiled one by one \(model\.layers\.1\)"),
        (with_weights_in_one_storage, r"layers\.\d\.mlp\.up_proj\.weight and .* share one tensor"),
        (
            with_a_matrix_inside_the_embedding,
            r"embed_tokens.*and .*share one tensor",
        ),
        (quantized_by_gguf, r"is quantized \(gguf\).*GgufConfig\(dequantize=True\)"),
        (with_an_invalid_generation_config, "its generation config is invalid: .*`temperature`"),
        (with_a_config_that_is_not_json, r"its config cannot be written as JSON \(.*set"),
    ],
)
def test_what_cannot_be_saved_is_not_pruned(change: Any, message: str) -> None:
    model = tiny_model("llama")
    change(model)
    before = zeros(model)
    with pytest.raises(ValueError, match=message):
        CAPPruner(config()).prune(model, tiny_tokenizer())
    assert zeros(model) == before


@pytest.mark.parametrize("recipe", ["wanda", "magnitude", "paper", "causal"])
@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.k_proj.bias", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_values_that_are_not_finite_are_found_anywhere(recipe: str, name: str) -> None:
    """Attention turns a NaN in the bias of keys into finite values."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.get_parameter(name)[-1] = float("nan")
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite values"):
        CAPPruner(config(recipe=recipe)).prune(model, tiny_tokenizer())


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential])
def test_wrappers_are_refused(wrap: Any) -> None:
    wrapped, pruner = wrap(tiny_model("llama")), CAPPruner(config())
    for call in (pruner.prune, pruner.measure):
        with pytest.raises(
            TypeError, match=f"got {wrap.__name__}: .* pass the model inside the wrapper"
        ):
            call(wrapped, tiny_tokenizer())


def test_scores_measured_inside_torch_compile_are_those_of_the_model(tmp_path: Path) -> None:
    model, file = tiny_model("llama"), tmp_path / "scores.safetensors"
    CAPPruner(config(estimator="plain")).measure(
        torch.compile(model), tiny_tokenizer(), save_to=file
    )
    CAPPruner(config(estimator="plain", scores=file)).prune(model, tiny_tokenizer())
    assert model.pruning_record.scores


def test_an_invalid_generation_config_does_not_matter_to_scores() -> None:
    model = tiny_model("llama")
    with_an_invalid_generation_config(model)
    CAPPruner(config(estimator="plain")).measure(model, tiny_tokenizer())


def test_the_model_inside_torch_compile_is_pruned() -> None:
    model = tiny_model("llama")
    compiled = torch.compile(model)
    pruned = CAPPruner(config(recipe="magnitude")).prune(compiled, tiny_tokenizer())
    assert pruned is compiled
    assert model.pruning_record.zeros == round(0.3 * model.pruning_record.total)
