"""Checks that a model is a plain transformers model: not wrapped or quantized, no adapters."""

import os
from typing import Any

from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_cap.models.internals import (
    has_adapters,
    module_before_compilation,
    wrapped_layers,
)


def plain_model(model: Any, taker: str = "CAPPruner") -> PreTrainedModel:
    """Return the transformers model whose own weights are pruned and saved.

    Args:
        model: A transformers model, possibly wrapped by `torch.compile`, which shares the weights
            of the model inside it.
        taker: Name of the function or class that takes the model, for error messages.

    Raises:
        TypeError: It is not a transformers model (for example a name, a `PeftModel` or a
            `DistributedDataParallel`).
        ValueError: It has PEFT adapters, is quantized, or computes weights on every forward.
    """
    if isinstance(model, str | os.PathLike):
        raise TypeError(
            f"{taker} takes a loaded model, got the name {os.fspath(model)!r}: load it with "
            "AutoModelForCausalLM.from_pretrained, or pass pruning_config=CAPConfig(...) to that"
        )
    model = module_before_compilation(model)
    kind = type(model).__name__
    if hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"got a {kind}, whose adapters are not merged: prune the result of merge_and_unload() "
            "instead, or prune the base model before you add adapters"
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{taker} takes a loaded model, got {kind}: load a PreTrainedModel with "
            "from_pretrained, or pass the model inside the wrapper"
        )
    if has_adapters(model) or has_peft_layers(model):
        raise ValueError(
            f"this {kind} has PEFT adapters, which are not merged: merge them first "
            "(PeftModel.merge_and_unload), or prune the base model before you add adapters"
        )
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        method = quantizer.quantization_config.quant_method
        method = str(getattr(method, "value", method))
        load = (
            "load it with quantization_config=GgufConfig(dequantize=True)"
            if method == "gguf"
            else "prune the float model before you quantize it"
        )
        raise ValueError(
            f"this {kind} is quantized ({method}), so it could not be saved once it is pruned: "
            f"{load}"
        )
    if compiled := wrapped_layers(model):
        raise ValueError(
            f"{len(compiled)} layers of this {kind} are compiled one by one ({compiled[0]}), which "
            "changes the names of their weights: prune the model before you compile its layers"
        )
    if any(map(_computes_weights, model.modules())) or prune.is_pruned(model):
        raise ValueError(
            f"weights of this {kind} are computed from other parameters on every forward "
            "(torch.nn.utils: parametrize, prune, weight_norm or spectral_norm): make them "
            "permanent first, with remove_parametrizations, prune.remove or remove_weight_norm"
        )
    return model


def has_peft_layers(model: nn.Module) -> bool:
    """Return whether PEFT has replaced modules of `model` with its own."""
    return any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules())


def _computes_weights(module: nn.Module) -> bool:
    """Return whether the weight of a linear layer is computed rather than a parameter."""
    if parametrize.is_parametrized(module):
        return True
    own = dict(module.named_parameters(recurse=False))
    return isinstance(module, nn.Linear | Conv1D) and "weight" not in own


def check_configs_can_be_saved(model: PreTrainedModel) -> None:
    """Check for configs that `save_pretrained` would refuse, before hours of pruning.

    Raises:
        ValueError: The config or the generation config cannot be saved.
    """
    generation_config = getattr(model, "generation_config", None)
    if model.can_generate() and generation_config is not None:
        try:
            generation_config.validate(strict=True)
        except ValueError as error:
            problem = " ".join(str(error).split())
            raise ValueError(
                "transformers could not save the pruned model, because its generation config is "
                f"invalid: change model.generation_config or generation_config.json ({problem})"
            ) from None
    try:
        model.config.to_json_string()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"transformers could not save the pruned model, because its config cannot be written "
            f"as JSON ({error}): remove the value from model.config"
        ) from error
