"""Atomic replacement of folders: as a whole or not at all."""

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError
from transformers.utils import CHAT_TEMPLATE_DIR

from optimum_cap.checkpoint.digests import (
    CONFIG_NAME,
    PICTURE_NAME,
    RECORD_NAME,
    RESULTS_NAME,
)
from optimum_cap.runtime import sync, was_left_behind, write_atomically

_SWAP_FILE = "swap.json"  # in a save's folder, while the save replaces the files of a mount point
_LONGEST_SWAP = 60  # seconds; a swap only renames files

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_LONGEST = 64  # bytes of a name that temporary folders are named after


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `target` when the context ends without an error.

    Files of `target` that are not part of a checkpoint are kept. On any error, `target` does not
    change and no other files remain.

    Args:
        target: The folder to replace or create.

    Raises:
        FileExistsError: As for `check_target`.
        OSError: The folder cannot be written, or another process is saving to this mount point.
    """
    # Replace the target of a link, not the link: it may be on another disk on purpose.
    target = target.resolve()
    name = _short(target.name)
    old = target.with_name(f".{name}.replaced")
    if not target.exists() and old.is_dir():
        old.rename(target)  # an earlier save was killed between its two renames
    if target.is_dir():
        _undo_killed_swaps(target)
    check_target(target)
    # A mount point cannot be renamed, nor can a folder whose parent is read-only.
    renamable = not target.exists() or (
        not os.path.ismount(target) and os.access(target.parent, os.W_OK)
    )
    parent = target.parent if renamable else target
    prefix = f".{name}.saving-{_short(platform.node())}-"
    new = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(parent, prefix)
        # Each save has its own folder, so that processes saving to one target do not mix files.
        new = parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
        new.mkdir()
        yield new
        _flush(new)
        if renamable:
            _swap_folders(new, target, old)
        else:
            _swap_files(new, target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, FileExistsError):
            raise
        state = "which stays as it was: free disk space, or choose a writable folder"
        if new is not None and (new / _SWAP_FILE).exists():
            state = f"and could not put back its old files, which the next save finds in {new}"
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"could not save to {target} ({error}), {state}",
        ) from error
    finally:
        # Files that could not be restored are left for the next save.
        if new is not None and not (new / _SWAP_FILE).exists():
            shutil.rmtree(new, ignore_errors=True)


def _short(name: str) -> str:
    """Return a name short enough that a prefix and a suffix can be added, if `name` is valid.

    A long name is cut and gets a digest of the whole, so that different names stay different.
    """
    encoded = os.fsencode(name)
    if len(encoded) <= _LONGEST:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return f"{encoded[: _LONGEST - 17].decode(errors='ignore')}-{digest}"


def _swap_folders(new: Path, target: Path, old: Path) -> None:
    """Replace `target` with `new`; in between, `target` is renamed to `old`."""
    if not target.exists():
        new.rename(target)
        return
    for entry in target.iterdir():
        if not (new / entry.name).exists() and not is_of_weights(entry.name):
            _link_or_copy(entry, new / entry.name)
    shutil.copymode(target, new)
    shutil.rmtree(old, ignore_errors=True)
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _swap_files(new: Path, target: Path) -> None:
    """Replace the files of `target` with those of `new`, a folder in `target`.

    The config is removed first and added last. If the process is killed, the folder therefore
    cannot be loaded with a mixture of old and new files. The next save restores the old files.
    """
    added = [entry.name for entry in new.iterdir()]
    stale = {entry.name for entry in target.iterdir() if is_of_weights(entry.name)}
    stale |= {name for name in added if (target / name).exists()}
    (new / "replaced").mkdir()
    process = {"host": platform.node(), "process": os.getpid()}
    swap = {"stale": sorted(stale), "added": sorted(added), **process}
    write_atomically(new / _SWAP_FILE, json.dumps(swap).encode())
    moves = _moves_of_swap(new, target, swap)
    try:
        for source, destination in moves:
            source.rename(destination)
    except BaseException:
        _undo(moves)
        (new / _SWAP_FILE).unlink()
        raise
    (new / _SWAP_FILE).unlink()


def _moves_of_swap(new: Path, target: Path, swap: dict[str, Any]) -> list[tuple[Path, Path]]:
    """Return the renames of a swap in order: the old config first, the new config last."""
    stale, added = (
        sorted(swap[key], key=lambda name: (name == CONFIG_NAME, name))
        for key in ("stale", "added")
    )
    removals = [(target / name, new / "replaced" / name) for name in reversed(stale)]
    return removals + [(new / name, target / name) for name in added]


def _undo(moves: list[tuple[Path, Path]]) -> None:
    """Undo the renames that were done."""
    for source, destination in reversed(moves):
        if destination.exists() and not source.exists():
            destination.rename(source)


def _undo_killed_swaps(target: Path) -> None:
    """Restore the files of `target` that killed saves moved away.

    Raises:
        OSError: The files cannot be restored, or a save is replacing them right now.
    """
    for folder, swap in _swaps_in(target):
        file = folder / _SWAP_FILE
        if not was_left_behind(file, swap["host"], swap["process"], _LONGEST_SWAP):
            raise OSError(
                errno.EBUSY,
                f"process {swap['process']} on {swap['host']} is saving to {target}: save again "
                f"when it has ended, or in {_LONGEST_SWAP} seconds if it was killed",
            )
        moves = _moves_of_swap(folder, target, swap)
        try:
            if any((folder / name).exists() for name in swap["added"]):  # it did not finish
                _undo(moves)
            file.unlink()
        except OSError as error:
            raise OSError(
                error.errno,
                f"a save to {target} was killed, and its old files cannot be restored from "
                f"{folder} ({error}): move them back, or choose another folder",
            ) from error
        shutil.rmtree(folder, ignore_errors=True)


def _swaps_in(target: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the folders of saves that began to replace the files of `target`, and their swaps."""
    for file in target.glob(f".*.saving-*/{_SWAP_FILE}"):
        try:
            swap = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if _is_swap(swap):
            yield file.parent, swap


def _is_swap(swap: Any) -> bool:
    """Return whether a value was written by `_swap_files` and has only names inside a folder."""
    return (
        isinstance(swap, dict)
        and isinstance(swap.get("host"), str)
        and isinstance(swap.get("process"), int)
        and 0 < swap["process"] < 1 << 31
        and all(
            isinstance(swap.get(key), list) and all(map(_is_plain_name, swap[key]))
            for key in ("stale", "added")
        )
    )


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name != ".." and "\0" not in name


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove the folders of killed saves: those named after a process that no longer runs."""
    for folder in parent.iterdir():
        if folder.name.startswith(prefix):
            # The rest does not match if this host's name is a prefix of another host's.
            process = re.fullmatch(r"(\d+)-[0-9a-f]{8}", folder.name.removeprefix(prefix))
            if process and not psutil.pid_exists(int(process[1])):
                shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flush all files of a folder to disk before the folder replaces another."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as stream:
                sync(stream)


def check_target(target: Path) -> None:
    """Check that a checkpoint may be saved to `target`, an absolute path.

    Raises:
        FileExistsError: It is a file, contains the current folder, or contains weights that are not
            part of a CAP checkpoint.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file: choose a folder to save to")
    if not target.is_dir():
        return
    if Path.cwd().is_relative_to(target):
        raise FileExistsError(
            f"{target} is or contains the current folder: choose a folder inside it"
        )
    weights = [entry.name for entry in target.iterdir() if is_weight_file(entry.name)]
    if weights and not (target / RECORD_NAME).exists() and not any(_swaps_in(target)):
        raise FileExistsError(
            f"{target} holds the weights of another model ({weights[0]}), which is not a CAP "
            "checkpoint: choose another folder to keep them"
        )


def is_weight_file(name: str) -> bool:
    """Return whether loading a model could read the file as weights."""
    return name.startswith(("model", "pytorch_model")) and (
        name.endswith((".safetensors", ".bin")) or (".index." in name and name.endswith(".json"))
    )


def is_of_weights(name: str) -> bool:
    """Return whether a file contains a model's weights or was made from exactly these weights."""
    return is_weight_file(name) or name in (RESULTS_NAME, PICTURE_NAME)


def is_weights(name: str) -> bool:
    """Return whether a file contains weights, or an index of them, in the format of any library."""
    return is_weight_file(name) or name.endswith((*_WEIGHTS, ".index.json"))


def copy_other_files(source: Path, target: Path) -> None:
    """Copy the files of a checkpoint other than weights and record that `target` does not have.

    These are the tokenizer, the chat templates, the processor and any other files.
    """
    for entry in source.iterdir():
        copy = target / entry.name
        if copy.exists() or entry.name == RECORD_NAME:
            continue
        if is_weights(entry.name) or is_of_weights(entry.name):
            continue
        if entry.is_file():
            shutil.copyfile(entry, copy)
        elif entry.name == CHAT_TEMPLATE_DIR:
            shutil.copytree(entry, copy)


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file or the files of a folder, or copy where hard links are not supported."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, copy_function=link, symlinks=True)
    else:
        link(os.fspath(source), os.fspath(target))
