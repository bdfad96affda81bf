"""Inspection and conversion of checkpoints."""

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from optimum_cap.checkpoint.digests import (
    CONFIG_NAME,
    RECORD_NAME,
    check_all_files,
    record_digest,
    warn_of_changed_settings,
    weight_files,
)
from optimum_cap.checkpoint.folders import atomic_folder
from optimum_cap.checkpoint.model_card import (
    CARD_NAME,
    read_card,
    with_base_model,
    write_model_card,
)
from optimum_cap.checkpoint.reading import read_json, validate_shards
from optimum_cap.checkpoint.record import PruningRecord, is_count
from optimum_cap.checkpoint.results_file import carry_results
from optimum_cap.checkpoint.transcoding import transcode_folder
from optimum_cap.formats import FORMATS, check_format_version
from optimum_cap.runtime import write_atomically
from optimum_cap.text import printable

_OTHER_WEIGHTS = ("original/*", "onnx/*", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.pth")
_MAX_DEPTH = 64  # of nested JSON values; valid records have fewer than ten levels


@dataclass(frozen=True)
class CheckpointSummary:
    """Summary of a checkpoint, obtained without loading its weights.

    Attributes:
        record: The pruning record.
        checkpoint_format: `"packed"`, `"coded"` or `"dense"`.
        format_version: Version of the file format.
        weight_bytes: Size of all weight files in bytes.
        dense_bytes: Size of the tensors in bytes when stored dense.
    """

    record: PruningRecord
    checkpoint_format: str
    format_version: int
    weight_bytes: int
    dense_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes but the record as JSON values."""
        return {
            "checkpoint_format": self.checkpoint_format,
            "format_version": self.format_version,
            "weight_bytes": self.weight_bytes,
            "dense_bytes": self.dense_bytes,
            "sparsity": self.record.sparsity,
            "zeros": self.record.zeros,
            "total": self.record.total,
        }


def inspect_checkpoint(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str = "",
    verify: bool = False,
) -> CheckpointSummary:
    """Read the record and the sizes of a checkpoint. Weights are read only to verify them.

    If a repository cannot be reached, it is read from the cache, as in `from_pretrained`.

    Args:
        path_or_repo: Folder, or repository on the Hub.
        revision: Branch, tag or commit of the repository.
        token: Token for the Hub.
        cache_dir: Cache for downloads.
        subfolder: Folder of the checkpoint in the folder or repository.
        verify: Whether to compare all files with their digests in the record, which downloads the
            weights.

    Raises:
        ValueError: It is not a CAP checkpoint, has a newer version, is damaged, or differs from its
            digests.
        FileNotFoundError: It is neither a folder nor a valid name of a repository, or is not in the
            cache and cannot be downloaded.
    """
    name = os.fspath(path_or_repo)
    if Path(name).exists() and not Path(name).is_dir():
        raise ValueError(f"{name} is a file: name the folder of a checkpoint")
    source = _Source(name, revision, token, cache_dir, subfolder)
    record_file = source.folder() / RECORD_NAME if verify else source.file(RECORD_NAME)
    record, files = read_record(record_file, name)
    if verify:
        check_all_files(record_file.parent, files["digests"])
    stored = [digest for digest in files["digests"].values() if "checksum" in digest]
    sizes = [digest["size"] for digest in stored]
    if source.is_local:
        sizes = [path.stat().st_size for path in weight_files(record_file.parent)]
    return CheckpointSummary(
        record,
        files["checkpoint_format"],
        files["format_version"],
        sum(sizes),
        files["dense_bytes"],
    )


@dataclass(frozen=True)
class _Source:
    """The location of a checkpoint: a folder, or a repository on the Hub.

    Attributes:
        name: Folder or repository.
        revision: Branch, tag or commit of the repository.
        token: Token for the Hub.
        cache_dir: Cache for downloads.
        subfolder: Folder of the checkpoint in it.
    """

    name: str
    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None = None
    subfolder: str = ""

    @property
    def is_local(self) -> bool:
        return Path(self.name).is_dir()

    @property
    def _download(self) -> dict[str, Any]:
        """Common keyword arguments of huggingface_hub's functions."""
        return {"revision": self.revision, "token": self.token, "cache_dir": self.cache_dir}

    def folder(self, ignored: Sequence[str] = ()) -> Path:
        """Return the folder of the checkpoint, downloaded unless it is local or cached.

        Args:
            ignored: Patterns of files that are not downloaded.
        """
        root = self.name
        if not self.is_local:
            _check_repo_id(root)
            options = self._download
            options["allow_patterns"] = f"{self.subfolder}/*" if self.subfolder else None
            options["ignore_patterns"] = list(ignored) or None
            try:
                root = snapshot_download(self.name, **options)
            except OfflineModeIsEnabled:
                # huggingface_hub 1.31 asks the Hub about a commit even when it must not.
                root = snapshot_download(self.name, local_files_only=True, **options)
        return Path(root) / self.subfolder

    def file(self, name: str) -> Path:
        """Return the path of one file, downloaded alone; the path may not exist."""
        if self.is_local:
            return self.folder() / name
        _check_repo_id(self.name)
        try:
            file = hf_hub_download(
                self.name, name, subfolder=self.subfolder or None, **self._download
            )
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"{name} of {self.name} is not in the cache, and the Hub cannot be reached: "
                "connect to the network, or name a folder"
            ) from error
        except EntryNotFoundError:
            return Path(self.name) / name
        return Path(file)


def folder_of_model(
    name: str, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Return the folder of a model, downloaded unless it is local or cached.

    Args:
        name: Folder, or repository on the Hub.
        revision: Branch, tag or commit of the repository.
        token: Token for the Hub.

    Raises:
        FileNotFoundError: It is neither a folder nor a valid name of a repository.
    """
    return _Source(name, revision, token).folder(ignored=_OTHER_WEIGHTS)


def file_of_checkpoint(
    path_or_repo: str, name: str, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Return one file of a checkpoint, downloaded unless it is local or cached.

    Args:
        path_or_repo: Folder, or repository on the Hub.
        name: Name of the file. If it is missing, the returned path does not exist.
        revision: Branch, tag or commit of the repository.
        token: Token for the Hub.

    Raises:
        FileNotFoundError: It is neither a folder nor a valid name of a repository, or the file is
            not in the cache and cannot be downloaded.
    """
    return _Source(path_or_repo, revision, token).file(name)


def read_record(path: Path, name: str) -> tuple[PruningRecord, dict[str, Any]]:
    """Read a record file.

    Args:
        path: The record file.
        name: Name of the checkpoint, for the error message.

    Returns:
        The record, and its entries about the files next to it: `checkpoint_format`,
        `format_version`, `dense_bytes` and `digests`.

    Raises:
        ValueError: The file is missing or damaged, has changed, or has a newer version.
    """
    if not path.is_file():
        raise ValueError(
            f"{name} is not a CAP checkpoint, because it has no {RECORD_NAME}: name a checkpoint "
            "saved by save_pretrained of a pruned model"
        )
    values = read_json(path)
    if isinstance(values.get("files"), dict):
        check_format_version(values["files"].get("format_version"), name)
    try:
        _check_depth(values)
        files = _checked_files(values)
        if files["record_sha256"] != record_digest(values):
            raise ValueError("it has changed since the model was saved")
        return PruningRecord.from_dict(
            {key: value for key, value in values.items() if key != "files"}
        ), files
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read ({printable(str(error))}): download or copy it again, or "
            "delete it to load the weights without their record"
        ) from error


def _check_depth(value: Any, depth: int = 0) -> None:
    """Raise a `ValueError` if JSON values are nested more deeply than those of any record."""
    if depth > _MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            _check_depth(entry, depth + 1)


def _checked_files(values: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a record about the files next to it, after checking their types."""
    files = values.get("files")
    if not isinstance(files, dict):
        raise ValueError(f"files must be an object, got {files!r:.80}")
    if files.get("checkpoint_format") not in tuple(FORMATS):
        raise ValueError(
            f"files.checkpoint_format must be one of {', '.join(FORMATS)}, got "
            f"{files.get('checkpoint_format')!r:.80}"
        )
    if not is_count(files.get("dense_bytes")) or not files["dense_bytes"]:
        raise ValueError(f"files.dense_bytes must be a size, got {files.get('dense_bytes')!r:.80}")
    digests = files.get("digests")
    if not isinstance(digests, dict) or not all(map(_is_digest, digests.values())):
        raise ValueError("files.digests must give the size and the sha256 of each file")
    if not isinstance(files.get("record_sha256"), str):
        raise ValueError(
            f"files.record_sha256 must be text, got {files.get('record_sha256')!r:.80}"
        )
    return files


def _is_digest(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and is_count(value.get("size"))
        and isinstance(value.get("sha256"), str)
        and isinstance(value.get("checksum", ""), str)
        and isinstance(value.get("tensors", {}), dict)
    )


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    checkpoint_format: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str = "",
) -> Path:
    """Write a checkpoint in another format, file by file, with bit-identical weights.

    All weights are compared with their digests first.

    Args:
        source: Folder, or repository on the Hub.
        target: New folder.
        checkpoint_format: `"packed"`, `"coded"` or `"dense"`.
        revision: Branch, tag or commit of the repository.
        token: Token for the Hub.
        cache_dir: Cache for downloads.
        subfolder: Folder of the checkpoint in the folder or repository.

    Returns:
        The new folder.

    Raises:
        ValueError: `source` is not a CAP checkpoint, is damaged, or differs from its digests, or
            the format is unknown.
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
    folder = _Source(os.fspath(source), revision, token, cache_dir, subfolder).folder()
    record, files = read_record(folder / RECORD_NAME, os.fspath(source))
    validate_shards(weight_files(folder))
    check_all_files(folder, files["digests"], settings=False)
    warn_of_changed_settings(folder, files["digests"])
    class_name = _class_name(folder / CONFIG_NAME)
    config = {**record.config, "checkpoint_format": checkpoint_format}
    record = dataclasses.replace(record, config=config)
    with atomic_folder(target) as new_folder:
        shutil.copytree(folder, new_folder, dirs_exist_ok=True)
        transcode_folder(new_folder, record, checkpoint_format)
        write_model_card(new_folder, record, class_name, token, base_folder=folder)
        _, new_files = read_record(new_folder / RECORD_NAME, os.fspath(target))
        carry_results(folder, files["digests"], new_folder, new_files["digests"])
    return target


def set_base_model(folder: Path, base_model: str) -> None:
    """Name the base model in the record and on the card of a checkpoint.

    Args:
        folder: The checkpoint.
        base_model: Its Hub id.

    Raises:
        ValueError: The record or the metadata of the card cannot be read.
        OSError: A file cannot be written.
    """
    record_file, card_file = folder / RECORD_NAME, folder / CARD_NAME
    record, _ = read_record(record_file, os.fspath(folder))
    if record.base_model == base_model:
        return
    values = read_json(record_file)
    values |= {"base_model": base_model, "base_revision": None}
    values["files"]["record_sha256"] = record_digest(values)
    card = None
    if card_file.is_file():
        card = with_base_model(read_card(card_file), base_model)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    write_atomically(record_file, text.encode())
    if card is not None:
        write_atomically(card_file, card.encode())


def _class_name(config_file: Path) -> str:
    """Return the class of a model that its config names; empty if it names none."""
    if not config_file.is_file():
        raise ValueError(f"{config_file} is missing: download or copy the checkpoint again")
    names = read_json(config_file).get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _check_repo_id(name: str) -> None:
    """Raise a `FileNotFoundError` if `name` is not a valid repository name for the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a valid repository name on the Hub: check the name"
        ) from error
