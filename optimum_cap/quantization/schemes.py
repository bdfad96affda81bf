"""Quantization schemes: the packages that quantize a pruned model, and their configs."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from optimum_cap.text import did_you_mean

GROUPS = (64, 32)
"""Numbers of inputs that may share a scale in `int4`; the first that fits all matrices is used."""


@dataclass(frozen=True)
class Scheme:
    """A quantization that transformers loads and saves, and that represents zero exactly.

    Attributes:
        title: Description of the quantized weights, for the model card and the summary.
        package: Name of the package that quantizes and loads the weights.
        requirement: Requirement specifier for pip.
        reaches: Whether it quantizes the weights of a module. Embeddings and the head stay floats.
        is_available: Whether the package is installed in a version that transformers supports.
        config: Takes the dtype of the model, and returns the quantization config for transformers;
            `None` if optimum-cap rounds the weights itself, calibrated as in pruning.
    """

    title: str
    package: str
    requirement: str
    reaches: Callable[[nn.Module], bool]
    is_available: Callable[[], bool]
    config: Callable[[torch.dtype], Any] | None


def get_scheme(name: str) -> Scheme:
    """Return a scheme by name, after checking that its package is installed.

    Raises:
        ValueError: The scheme is unknown.
        ImportError: Its package is not installed, or is too old.
    """
    if name not in SCHEMES:
        raise ValueError(
            f"quantization scheme {name!r} is unknown{did_you_mean(name, SCHEMES)}: choose "
            f"{', '.join(SCHEMES)}"
        )
    scheme = SCHEMES[name]
    if not scheme.is_available():
        raise ImportError(
            f"quantization scheme {name!r} needs {scheme.requirement}, which is not installed: "
            f"pip install '{scheme.requirement}'"
        )
    return scheme


def _int8(dtype: torch.dtype) -> Any:
    from transformers import TorchAoConfig

    torchao = importlib.import_module("torchao.quantization")
    return TorchAoConfig(torchao.Int8WeightOnlyConfig())


def _four_bits(kind: str) -> Callable[[torch.dtype], Any]:
    def config(dtype: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype
        )

    return config


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _has_whole_groups(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.in_features % GROUPS[-1] == 0


def _bitsandbytes(kind: str, title: str) -> Scheme:
    return Scheme(
        title,
        "bitsandbytes",
        "bitsandbytes>=0.46.1",
        lambda module: isinstance(module, nn.Linear | Conv1D),
        is_bitsandbytes_available,
        _four_bits(kind),
    )


SCHEMES: dict[str, Scheme] = {
    "int4": Scheme(
        f"4-bit integers with a scale for each {GROUPS[0]} or {GROUPS[-1]} inputs, rounded with "
        "error compensation (GPTQ, arXiv 2210.17323; compressed-tensors)",
        "compressed-tensors",
        "compressed-tensors>=0.15",
        _has_whole_groups,
        lambda: True,  # only loading needs the package
        None,
    ),
    "int8": Scheme(
        "8-bit integers with a scale for each output (torchao, weight only)",
        "torchao",
        "torchao>=0.15",
        _is_linear,
        is_torchao_available,
        _int8,
    ),
    "nf4": _bitsandbytes("nf4", "4-bit NormalFloat in blocks of 64 weights (bitsandbytes)"),
    "fp4": _bitsandbytes("fp4", "4-bit floats in blocks of 64 weights (bitsandbytes)"),
}
