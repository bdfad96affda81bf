"""Digests of the files of a checkpoint, which detect files changed after saving.

They are stored in the pruning record, under `files`. Every file has its size and SHA-256. A weight
file also has a fast checksum that every load verifies: XXH3-128 of the whole file if it is packed
or coded; if it is dense, which transformers only maps into memory, XXH3-128 of its header and of
the first and last bytes of each tensor.

The tensors of a coded file have checksums as well, so that errors name the damaged tensor.

Digests protect against damage and mistakes, not against forgery, because whoever can write the
weights can also write the record.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash
from transformers.utils import logging

from optimum_cap.checkpoint.reading import (
    StoredTensor,
    damaged_tensors,
    read_header,
    tensor_checksums,
    validate_tensors,
)
from optimum_cap.formats import FORMATS
from optimum_cap.text import printable

logger = logging.get_logger(__name__)

RECORD_NAME = "pruning_record.json"
RESULTS_NAME = "pruning_results.json"
PICTURE_NAME = "pruning_sparsity.svg"
CONFIG_NAME = "config.json"
_WEIGHTS = "*.safetensors"
_INDEX = "*.safetensors.index*.json"  # with or without a variant
_SETTINGS = (CONFIG_NAME, "generation_config.json")
_SAMPLE = 4096  # bytes at each end of a tensor: one page
_THREADS = min(4, os.cpu_count() or 1)


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files in `folder`, sorted by name."""
    return sorted(folder.glob(_WEIGHTS))


def index_files(folder: Path) -> list[Path]:
    """Return the indices of sharded weights in `folder`, sorted by name."""
    return sorted(folder.glob(_INDEX))


def digests_of(folder: Path, checkpoint_format: str) -> dict[str, dict[str, Any]]:
    """Return sizes and digests of the weight files, their index and the settings in `folder`."""
    form = FORMATS[checkpoint_format]
    whole = form.needs_plugin
    weights = weight_files(folder)
    sums = dict(
        zip(weights, _in_parallel(lambda file: checksum(file, whole), weights), strict=True)
    )
    settings = [folder / name for name in _SETTINGS if (folder / name).is_file()]
    files = [*weights, *index_files(folder), *settings]
    digests = {}
    for file, sha256 in zip(files, _in_parallel(_sha256, files), strict=True):
        digests[file.name] = {"size": file.stat().st_size, "sha256": sha256}
        if file in sums:
            digests[file.name]["checksum"] = sums[file]
            if form.checks_tensors:
                digests[file.name]["tensors"] = tensor_checksums(file)
    return digests


def record_digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a pruning record, independent of the order and layout of its JSON."""
    files = {key: value for key, value in values["files"].items() if key != "record_sha256"}
    text = json.dumps({**values, "files": files}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_loaded(files: Iterable[Path], digests: Mapping[str, Any], checkpoint_format: str) -> None:
    """Check the files to load from a checkpoint, quickly.

    Args:
        files: The weight files to load.
        digests: Return value of `digests_of`.
        checkpoint_format: Format of the weights.

    Raises:
        ValueError: A file is damaged, has changed since the model was saved, or is not part of the
            checkpoint.
    """
    files = [Path(file) for file in files]
    for folder in {file.parent for file in files}:
        for index in index_files(folder):
            if index.name in digests and _sha256(index) != digests[index.name]["sha256"]:
                raise ValueError(f"{index} {_CHANGED}; {_ADVICE}")
    expected = {name for name, digest in digests.items() if "checksum" in digest}
    if files and (missing := sorted(expected - {file.name for file in files})):
        raise ValueError(
            f"{files[0].parent} is incomplete: {', '.join(missing)} is not loaded, but is part of "
            f"the checkpoint; {_ADVICE}"
        )
    whole = FORMATS[checkpoint_format].needs_plugin

    def changed(file: Path) -> bool:
        return digests[file.name]["checksum"] != checksum(file, whole)

    for file in files:
        _check_listed(file, expected)
        header = read_header(file)
        if whole:
            validate_tensors(file, header)
    for file, is_changed in zip(files, _in_parallel(changed, files), strict=True):
        if is_changed:
            raise ValueError(f"{_changed_file(file, digests[file.name])}; {_ADVICE}")


def check_loaded_folder(
    folder: Path,
    digests: Mapping[str, Any],
    checkpoint_format: str,
    variant: str | None = None,
    safetensors: bool = True,
) -> None:
    """Check the weight files that transformers loads from `folder`, quickly.

    Args:
        folder: The checkpoint.
        digests: Return value of `digests_of`.
        checkpoint_format: Format of the weights.
        variant: As for `from_pretrained`.
        safetensors: Whether safetensors files may be loaded.

    Raises:
        ValueError: As for `check_loaded`.
    """
    infix = f".{variant}" if variant else ""
    names = [f"model{infix}.safetensors", f"model.safetensors.index{infix}.json"] * safetensors
    names += [f"pytorch_model{infix}.bin", f"pytorch_model.bin.index{infix}.json"]
    chosen = next((folder / name for name in names if (folder / name).is_file()), None)
    if chosen is None:
        return  # transformers reports the missing weights
    _check_listed(chosen, digests)
    weights = [folder / name for name, digest in digests.items() if "checksum" in digest]
    check_loaded([file for file in weights if file.is_file()], digests, checkpoint_format)


def check_settings(folder: Path, digests: Mapping[str, Any]) -> None:
    """Check that the settings files have not changed since they were saved.

    Raises:
        ValueError: A file is missing or has changed.
    """
    for file in _changed_settings(folder, digests):
        if not file.is_file():
            raise ValueError(f"{file} is missing; {_ADVICE}")
        raise ValueError(f"{file} {_CHANGED}; {_ADVICE}")


def warn_of_changed_settings(folder: Path, digests: Mapping[str, Any]) -> None:
    """Warn about edited settings files; users may edit them on purpose, so it is no error."""
    for file in _changed_settings(folder, digests):
        if file.is_file():
            logger.warning(
                f"{file} has changed since the model was saved: download or copy it again, unless "
                "it was edited on purpose"
            )


def _changed_settings(folder: Path, digests: Mapping[str, Any]) -> list[Path]:
    files = [folder / name for name in _SETTINGS if name in digests]
    return [
        file
        for file in files
        if not file.is_file() or _sha256(file) != digests[file.name]["sha256"]
    ]


def check_all_files(folder: Path, digests: Mapping[str, Any], settings: bool = True) -> None:
    """Compare all files of a checkpoint with their SHA-256.

    Args:
        folder: The checkpoint.
        digests: Return value of `digests_of` when it was saved.
        settings: Whether to compare the settings too, and not only weights and their index.

    Raises:
        ValueError: A file is missing, has changed, or is not part of the checkpoint; the message
            names all such files.
    """
    names = [name for name in sorted(digests) if settings or name not in _SETTINGS]
    missing = [name for name in names if not (folder / name).is_file()]
    present = [folder / name for name in names if name not in missing]
    problems = [f"{folder / name} is missing" for name in missing]
    for file, sha256 in zip(present, _in_parallel(_sha256, present), strict=True):
        if sha256 != digests[file.name]["sha256"]:
            problems.append(_changed_file(file, digests[file.name]))
    problems += [
        f"{file} {_UNLISTED}"
        for file in (*weight_files(folder), *index_files(folder))
        if file.name not in digests and file.name.startswith("model")
    ]
    if problems:
        raise ValueError(f"{'; '.join(problems)}; {_ADVICE}")


def checksum(file: Path, whole: bool) -> str:
    """Return the XXH3-128 of a weight file: of all its bytes, or of a sample of each tensor."""
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        if whole:
            return xxhash.xxh3_128_hexdigest(view)
        digest = xxhash.xxh3_128()
        for start, stop in _sampled(read_header(file)):
            digest.update(view[start:stop])
        return digest.hexdigest()


def _sampled(header: Mapping[str, StoredTensor]) -> list[tuple[int, int]]:
    """Return the parts of a file that a dense checksum covers: its header and the tensors' ends."""
    tensors = sorted(header.values(), key=lambda tensor: tensor.start)
    parts = [(0, tensors[0].start if tensors else 0)]
    for tensor in tensors:
        middle = min(tensor.start + _SAMPLE, tensor.stop)
        parts += [(tensor.start, middle), (max(middle, tensor.stop - _SAMPLE), tensor.stop)]
    return parts


def _sha256(file: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def _in_parallel(function: Callable[[Path], Any], files: list[Path]) -> list[Any]:
    """Apply a function to files; hashing releases the GIL."""
    if len(files) < 2:
        return [function(file) for file in files]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, files))


_ADVICE = (
    "download or copy the checkpoint again, or, if another program rewrote it on purpose, delete "
    f"{RECORD_NAME} to load the weights without their record"
)


_CHANGED = "has changed since the model was saved (its digest differs)"
_UNLISTED = f"is not part of the checkpoint that {RECORD_NAME} describes"


def _changed_file(file: Path, digest: Mapping[str, Any]) -> str:
    """Return the message that a file has changed, with the changed tensors if `digest` has them."""
    if "tensors" not in digest:
        return f"{file} {_CHANGED}"
    try:
        names = printable(", ".join(damaged_tensors(file, digest["tensors"])))
    except ValueError:
        names = ""
    return f"{file} {_CHANGED}, in {names or 'its header'}"


def _check_listed(file: Path, names: Iterable[str]) -> None:
    if file.name not in names:
        raise ValueError(f"{file} {_UNLISTED}; {_ADVICE}")
