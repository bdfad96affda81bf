"""Conversion of weight files from one format to another."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from optimum_cap.checkpoint.digests import (
    CONFIG_NAME,
    RECORD_NAME,
    digests_of,
    index_files,
    record_digest,
    weight_files,
)
from optimum_cap.checkpoint.reading import open_tensors, read_json
from optimum_cap.checkpoint.record import PruningRecord
from optimum_cap.formats import FORMATS, decode


def transcode_folder(folder: Path, record: PruningRecord, checkpoint_format: str) -> None:
    """Convert all weights in `folder` to one format, and update its config and record."""
    form = FORMATS[checkpoint_format]
    weight_map: dict[str, str] = {}
    dense_bytes = stored_bytes = 0
    for file in weight_files(folder):
        encoded: dict[str, torch.Tensor] = {}
        with open_tensors(file) as tensors, _naming(file):
            for name, weight in decode(tensors.keys(), tensors.get_tensor):
                dense_bytes += weight.nbytes
                encoded.update(form.encode(name, weight))
        stored_bytes += sum(tensor.nbytes for tensor in encoded.values())
        weight_map.update(dict.fromkeys(encoded, file.name))
        replacement = file.with_suffix(".new")
        save_file(encoded, replacement, metadata={"format": "pt"})
        replacement.replace(file)
    for index in index_files(folder):
        values = read_json(index)
        values["metadata"]["total_size"] = stored_bytes
        write_json(index, {**values, "weight_map": weight_map})
    config = read_json(folder / CONFIG_NAME)
    config["pruning_config"] = record.config
    config.pop("quantization_config", None)
    if form.needs_plugin:
        # Makes transformers load the weights with the plugin, or warn if the plugin is not
        # installed.
        config["quantization_config"] = {**record.config, "format_version": form.version}
    write_json(folder / CONFIG_NAME, config)
    files = {
        "checkpoint_format": checkpoint_format,
        "format_version": form.version,
        "dense_bytes": dense_bytes,
        "digests": digests_of(folder, checkpoint_format),
    }
    contents = {**record.to_dict(), "files": files}
    files["record_sha256"] = record_digest(contents)
    write_json(folder / RECORD_NAME, contents)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Add the file name to errors about its weights."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file of a checkpoint: indented, with sorted keys."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
