"""Checkpoints of tiny models: written, loaded, with their weights on disk, compared."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import disk_offload
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.tiny_models import tiny_model, tiny_tokenizer
from optimum_cap import CAPConfig
from optimum_cap.checkpoint.digests import RECORD_NAME, digests_of, record_digest
from optimum_cap.checkpoint.record import MatrixSparsity, PruningRecord
from optimum_cap.checkpoint.saving import attach

LAYERS = ("model.layers.1", "model.layers.2")


def pruned(architecture: str = "llama", **changes: Any) -> PreTrainedModel:
    """A tiny model with 30 % random zeros in its large matrices, and a record to match."""
    settings = {"checkpoint_format": changes.pop("checkpoint_format", "packed")}
    model = tiny_model(architecture, **changes)
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and ("proj" in name or "fc" in name or "dense" in name):
            mask = torch.rand(parameter.shape, generator=generator) < 0.3
            parameter.data[mask] = 0
            experts = parameter if parameter.ndim == 3 else [parameter]
            matrices += [
                MatrixSparsity(
                    f"{name}[{index}]" if parameter.ndim == 3 else name,
                    int((matrix == 0).sum()),
                    matrix.numel(),
                )
                for index, matrix in enumerate(experts)
            ]
    config = CAPConfig(sparsity=0.3, dataset="gsm8k", **settings).to_dict()
    calibration = {"sources": [{"name": "gsm8k", "hub_id": "openai/gsm8k"}], "digests": []}
    attach(model, PruningRecord(config, None, None, matrices, [], calibration, {"torch": "0"}))
    return model


def sign(folder: Path) -> None:
    """Write the digests of the files as they are to the record, as another writer would.

    What is damaged in them is then found by the checks of their content.
    """
    values = json.loads((folder / RECORD_NAME).read_text())
    values["files"]["digests"] = digests_of(folder, values["files"]["checkpoint_format"])
    values["files"]["record_sha256"] = record_digest(values)
    (folder / RECORD_NAME).write_text(json.dumps(values))


def change_record(folder: Path, **changes: Any) -> None:
    """Change fields of the record and its digest."""
    values = json.loads((folder / RECORD_NAME).read_text())
    values.update(changes)
    values["files"]["record_sha256"] = record_digest(values)
    (folder / RECORD_NAME).write_text(json.dumps(values))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same_weights(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def saved(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    tiny_model(architecture, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def half_on_disk(folder: Path, offload_folder: Path | None, **options: Any) -> PreTrainedModel:
    """Load a model of three decoder layers of which two, and the head, stay on disk."""
    names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "model.layers.0")
    places = dict.fromkeys(names, "cpu") | dict.fromkeys((*LAYERS, "lm_head"), "disk")
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=offload_folder, **options
    )


def on_disk(folder: Path, offload_folder: Path) -> PreTrainedModel:
    """Load a model, then put all of its weights on disk."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return disk_offload(model, offload_folder)
