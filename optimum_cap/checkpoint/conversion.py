"""Inspection and conversion of checkpoints."""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from optimum_cap.checkpoint.folders import atomic_folder
from optimum_cap.checkpoint.model_card import write_model_card
from optimum_cap.checkpoint.record import PruningRecord
from optimum_cap.checkpoint.transcoding import (
    CONFIG_NAME,
    RECORD_NAME,
    read_json,
    transcode_folder,
    validate_shards,
    weight_files,
)
from optimum_cap.formats import FORMATS, check_format_version


@dataclass(frozen=True)
class CheckpointSummary:
    """Summary of a checkpoint, obtained without loading its weights.

    Attributes:
        record: The pruning record.
        checkpoint_format: `"packed"` or `"dense"`.
        format_version: Version of the files.
        weight_bytes: Size of all weight files in bytes.
        dense_bytes: Size in bytes of the tensors when stored dense.
    """

    record: PruningRecord
    checkpoint_format: str
    format_version: int
    weight_bytes: int
    dense_bytes: int


def inspect_checkpoint(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> CheckpointSummary:
    """Read the record and the sizes of a checkpoint; no weights are read or downloaded.

    Args:
        path_or_repo: Folder, or repository on the Hub.
        revision: Branch, tag or commit of the repository.
        token: Token for the Hub.
        cache_dir: Cache for downloads.

    Raises:
        ValueError: It is not a CAP checkpoint, or has a newer version.
        FileNotFoundError: It is neither a folder nor a valid name of a repository.
    """
    name = os.fspath(path_or_repo)
    if Path(name).is_dir():
        record_file = Path(name) / RECORD_NAME
        sizes = [path.stat().st_size for path in weight_files(Path(name))]
    elif Path(name).exists():
        raise ValueError(f"{name} is a file: name the folder of a checkpoint")
    else:
        _check_repo_id(name)
        info = HfApi(token=token).model_info(name, revision=revision, files_metadata=True)
        files = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        sizes = [size for file, size in files.items() if file.endswith(".safetensors")]
        record_file = Path(name) / RECORD_NAME
        if RECORD_NAME in files:
            record_file = Path(
                hf_hub_download(
                    name, RECORD_NAME, revision=info.sha, token=token, cache_dir=cache_dir
                )
            )
    record, files_info = read_record(record_file, name)
    return CheckpointSummary(
        record,
        files_info["checkpoint_format"],
        files_info["format_version"],
        sum(sizes),
        files_info["dense_bytes"],
    )


def read_record(path: Path, name: str) -> tuple[PruningRecord, dict[str, Any]]:
    """Read a record file.

    Args:
        path: The record file.
        name: Name of the checkpoint, for the error message.

    Returns:
        The record, and format, version and size of the files next to it.

    Raises:
        ValueError: The file is missing or damaged, or has a newer version.
    """
    if not path.is_file():
        raise ValueError(
            f"{name} is not a CAP checkpoint, because it has no {RECORD_NAME}: name a checkpoint "
            "saved by save_pretrained of a pruned model"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        files = values.pop("files")
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; save or download it again") from error
    check_format_version(files.get("format_version"), name)
    return PruningRecord.from_dict(values), files


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    checkpoint_format: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Write a checkpoint in another format, file by file, with the same weights bit for bit.

    Args:
        source: Folder, or repository on the Hub.
        target: New folder.
        checkpoint_format: `"packed"` or `"dense"`.
        revision: Branch, tag or commit of the repository.
        token: Token for the Hub.

    Returns:
        The new folder.

    Raises:
        ValueError: `source` is not a CAP checkpoint or is damaged, or the format is unknown.
        FileExistsError: `target` exists and is not empty, or is inside `source`.
        FileNotFoundError: `source` is neither a folder nor a valid name of a repository.
    """
    if checkpoint_format not in FORMATS:
        raise ValueError(
            f"unknown checkpoint format {checkpoint_format!r}: choose one of {', '.join(FORMATS)}"
        )
    folder, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty: choose a new folder")
    if folder.is_dir() and target.resolve().is_relative_to(folder.resolve()):
        raise FileExistsError(f"{target} is inside the source checkpoint: choose another folder")
    if not folder.is_dir():
        _check_repo_id(os.fspath(source))
        folder = Path(snapshot_download(os.fspath(source), revision=revision, token=token))
    record, _ = read_record(folder / RECORD_NAME, os.fspath(source))
    validate_shards(weight_files(folder))
    config = {**record.config, "checkpoint_format": checkpoint_format}
    record = dataclasses.replace(record, config=config)
    with atomic_folder(target) as new_folder:
        shutil.copytree(folder, new_folder, dirs_exist_ok=True)
        transcode_folder(new_folder, record, checkpoint_format)
        class_name = read_json(new_folder / CONFIG_NAME).get("architectures", [""])[0]
        write_model_card(new_folder, record, class_name, token)
    return target


def _check_repo_id(name: str) -> None:
    """Raise a `FileNotFoundError` if `name` is not a valid name of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a valid repository name on the Hub: check the name"
        ) from error
