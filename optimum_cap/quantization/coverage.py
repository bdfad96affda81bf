"""Which weights of a model a quantization scheme quantizes, determined from its config alone."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from optimum_cap.quantization.schemes import Scheme

_FEW = 0.5  # of the weights of matrices


def check_reaches(
    scheme: Scheme, name: str, config: PreTrainedConfig, auto_class: str, **options: Any
) -> None:
    """Check that a scheme quantizes most of a model, which is built here without weights.

    Args:
        scheme: The scheme.
        name: Its name, for the error message.
        config: The config of the model.
        auto_class: Auto class of transformers that loads the model.
        **options: Arguments of its `from_config`.

    Raises:
        ValueError: Most weights are in layers that the scheme does not quantize, or the scheme
            packs weights itself and the model sees images (files of such models use other weight
            names).
    """
    if scheme.config is None and auto_class == "AutoModelForImageTextToText":
        raise ValueError(
            f"quantization scheme {name!r} packs causal language models and classifiers, but this "
            f"model ({config.model_type}) sees images: choose another scheme"
        )
    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(config, **options)
    left_out = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    reached = other = 0
    for module in model.modules():
        if id(module) in left_out or isinstance(module, nn.Embedding):
            continue
        matrices = sum(
            weight.numel() for weight in module.parameters(recurse=False) if weight.ndim > 1
        )
        if scheme.reaches(module):
            reached += matrices
        else:
            other += matrices
    if reached <= _FEW * (reached + other):
        share = reached / max(reached + other, 1)
        raise ValueError(
            f"quantization scheme {name!r} reaches {share:.0%} of the weights of "
            f"{type(model).__name__}, because the others are in fused experts or in layers of "
            f"other kinds or sizes than {scheme.package} quantizes: choose another scheme, or none"
        )
