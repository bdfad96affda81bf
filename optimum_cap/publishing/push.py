"""Upload of a saved checkpoint."""

import fnmatch
import os
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from optimum_cap.checkpoint import (
    CARD_NAME,
    RECORD_NAME,
    check_all_files,
    read_record,
    set_base_model,
    upload,
    warn_of_changed_settings,
)
from optimum_cap.publishing.results import load_results
from optimum_cap.text import enumeration

logger = logging.get_logger(__name__)

_TRAINING_STATE = (
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("trainer_state.json", "training_args.bin"),
)
_TRAINER_CHECKPOINT = "checkpoint-[0-9]*"


def check_base_model(base_model: str, token: str | bool | None = None) -> None:
    """Check that the Hub has a model with this name.

    Raises:
        ValueError: The name is not a valid repository name, or the Hub has no such model that the
            token may read.
    """
    try:
        validate_repo_id(base_model)
        exists = HfApi(token=token).repo_exists(base_model)
    except HFValidationError:
        exists = False
    if not exists:
        raise ValueError(
            f"the Hub has no model {base_model!r} that you may read, so it cannot be the base "
            "model: check the name"
        )


def push_checkpoint(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    base_model: str | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """Upload a checkpoint with its record, card, results and tokenizer, in one commit.

    All weights are compared with their digests first. Training states, hidden files and folders are
    not uploaded. Outdated weight files of the repository are removed.

    Args:
        folder: The checkpoint.
        repo_id: Repository, created if it does not exist.
        base_model: Hub id of the dense model, to write to the record and the card first.
        token: Token for the Hub.
        **kwargs: `private`, `revision`, `create_pr`, `commit_message`, `commit_description`.

    Returns:
        Information about the commit.

    Raises:
        ValueError: The folder is not a CAP checkpoint, has no card, or is damaged, or its results
            are damaged.
        OSError: The upload failed.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{os.fspath(folder)} is no folder: name that of a pruned checkpoint")
    _, files = read_record(path / RECORD_NAME, os.fspath(folder))
    if not (path / CARD_NAME).is_file():
        raise ValueError(
            f"{path} has no {CARD_NAME}, without which nobody can tell what the model is: save the "
            "model again, or write one"
        )
    load_results(path)  # or else damaged ones would be published
    check_all_files(path, files["digests"], settings=False)
    warn_of_changed_settings(path, files["digests"])
    if base_model is not None:
        set_base_model(path, base_model)
    names, left_out = _files(path)
    if left_out:
        logger.warning(f"not uploaded, as it is the state of a training: {enumeration(left_out)}")
    return upload(path, repo_id, names, token=token, **kwargs)


def _files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the files to upload, and those that are training states."""
    names: list[str] = []
    left_out: list[str] = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if not file.is_file() or any(part.startswith(".") for part in parts):
            continue
        if len(parts) > 1 and fnmatch.fnmatch(parts[0], _TRAINER_CHECKPOINT):
            left_out.append(parts[0])
            continue
        is_state = any(fnmatch.fnmatch(file.name, pattern) for pattern in _TRAINING_STATE)
        (left_out if is_state else names).append("/".join(parts))
    return names, list(dict.fromkeys(left_out))
