"""Checkpoints in the format `pack-quantized` of compressed-tensors, which vLLM reads too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.checkpoint import write_json
from optimum_cap.methods import RoundedMatrix

_BITS = 4
_PER_WORD = 32 // _BITS


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Return integers from -8 to 7, int8 `[out, in]`, as int32 `[out, in / 8]`, lowest bits first.

    Each integer is stored as its distance from -8.
    """
    nibbles = (codes.to(torch.int64) + 8).unflatten(1, (-1, _PER_WORD))
    words = (nibbles << (_BITS * torch.arange(_PER_WORD))).sum(dim=2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def replace_weights(
    folder: Path, model: PreTrainedModel, rounded: Mapping[str, RoundedMatrix]
) -> None:
    """Replace the weights of rounded matrices in a saved checkpoint with their packed integers.

    Args:
        folder: Folder of the checkpoint, without other weight files.
        model: The model that was saved there.
        rounded: The matrices, by parameter name.

    Raises:
        ValueError: The files use other names for these matrices than the model.
    """
    left = set(rounded)
    weight_map: dict[str, str] = {}
    size = 0
    for file in sorted(folder.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is not a dictionary
                if name in left:
                    left.remove(name)
                    tensors |= _packed(name, rounded[name])
                else:
                    tensors[name] = stored.get_tensor(name)
        replacement = file.with_suffix(".new")
        save_file(tensors, replacement, metadata={"format": "pt"})
        replacement.replace(file)
        weight_map |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if left:
        raise ValueError(
            f"{sorted(left)[0]} and {len(left) - 1} other matrices have other names in the files "
            f"of {type(model).__name__} than in the model, so they cannot be packed: choose "
            "another scheme"
        )
    for index in folder.glob("*.safetensors.index.json"):
        values = json.loads(index.read_bytes())
        values["metadata"]["total_size"] = size
        write_json(index, {**values, "weight_map": weight_map})
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"] = _quantization_config(model, rounded)
    write_json(folder / "config.json", config)


def _packed(name: str, matrix: RoundedMatrix) -> dict[str, torch.Tensor]:
    return {
        f"{name}_packed": pack(matrix.codes),
        f"{name}_scale": matrix.scales.contiguous(),
        f"{name}_shape": torch.tensor(matrix.codes.shape),
    }


def _quantization_config(
    model: PreTrainedModel, rounded: Mapping[str, RoundedMatrix]
) -> dict[str, Any]:
    """Return the config that tells compressed-tensors which layers are packed, and how."""
    first = next(iter(rounded.values()))
    weights = {
        "num_bits": _BITS,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": first.codes.shape[1] // first.scales.shape[1],
        "dynamic": False,
    }
    floats = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in rounded
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": floats,
    }
