"""Validation of weight files, and their conversion from one format to another."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from optimum_cap.checkpoint.record import PruningRecord
from optimum_cap.formats import FORMAT_VERSION, FORMATS, check_parts, decode

RECORD_NAME = "pruning_record.json"
CONFIG_NAME = "config.json"
_INDEX_PATTERN = "*.safetensors.index*.json"  # with or without a variant


def validate_shards(files: list[Path]) -> None:
    """Check that the size of every file matches its header and its packed weights are complete.

    Raises:
        ValueError: A file is truncated, damaged or not a safetensors file; the message names it.
    """
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            try:
                if header_size > size:
                    raise ValueError
                header = json.loads(stream.read(header_size))
                ends = [
                    entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"
                ]
                expected = 8 + header_size + max(ends, default=0)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{file} is damaged ({size} bytes, with an incomplete header): download or "
                    "copy it again"
                ) from None
        if size != expected:
            raise ValueError(
                f"{file} is damaged (its header describes {expected} bytes, but it has {size}): "
                "download or copy it again"
            )
        with safe_open(file, framework="pt") as tensors:
            try:
                check_parts(tensors.keys(), tensors.get_tensor)
            except ValueError as error:
                raise ValueError(f"{file}: {error}; download or copy it again") from None


def transcode_folder(folder: Path, record: PruningRecord, checkpoint_format: str) -> None:
    """Convert all weights in `folder` to one format, and update its config and record."""
    encode = FORMATS[checkpoint_format].encode
    weight_map: dict[str, str] = {}
    dense_bytes = stored_bytes = 0
    for file in weight_files(folder):
        encoded: dict[str, torch.Tensor] = {}
        with safe_open(file, framework="pt") as tensors:
            for name, weight in decode(tensors.keys(), tensors.get_tensor):
                dense_bytes += weight.nbytes
                encoded.update(encode(name, weight))
        stored_bytes += sum(tensor.nbytes for tensor in encoded.values())
        weight_map.update(dict.fromkeys(encoded, file.name))
        replacement = file.with_suffix(".new")
        save_file(encoded, replacement, metadata={"format": "pt"})
        replacement.replace(file)
    for index in folder.glob(_INDEX_PATTERN):
        values = read_json(index)
        values["metadata"]["total_size"] = stored_bytes
        _write_json(index, {**values, "weight_map": weight_map})
    files = {
        "checkpoint_format": checkpoint_format,
        "format_version": FORMAT_VERSION,
        "dense_bytes": dense_bytes,
    }
    _write_json(folder / RECORD_NAME, {**record.to_dict(), "files": files})
    config = read_json(folder / CONFIG_NAME)
    config["pruning_config"] = record.config
    config.pop("quantization_config", None)
    if FORMATS[checkpoint_format].needs_plugin:
        # Makes transformers load the weights with the plugin, or warn if it is not installed.
        config["quantization_config"] = {**record.config, "format_version": FORMAT_VERSION}
    _write_json(folder / CONFIG_NAME, config)


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files in `folder`, sorted by name."""
    return sorted(folder.glob("*.safetensors"))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
