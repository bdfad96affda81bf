"""Folders that are replaced as a whole or stay as they were."""

import errno
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError

from optimum_cap.checkpoint.transcoding import CONFIG_NAME, RECORD_NAME
from optimum_cap.runtime import sync

# Folders, all or nothing


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` if all goes well.

    Files of `target` that are no part of a checkpoint come along. On any error `target` is left as
    it was, and nothing else is left behind.
    """
    # Of a link, the folder that it stands for is replaced: it may be on another disk on purpose.
    target = target.resolve()
    old = target.with_name(f".{target.name}.replaced")
    if not target.exists() and old.is_dir():
        old.rename(target)  # a save was killed between its two renames
    check_target(target)
    # A mount point cannot be renamed, nor can a folder in one that is read-only.
    renamable = not target.exists() or (
        not os.path.ismount(target) and os.access(target.parent, os.W_OK)
    )
    home = target.parent if renamable else target
    prefix = f".{target.name}.saving-{platform.node()}-"
    new = None
    try:
        home.mkdir(parents=True, exist_ok=True)
        _clear_up(home, prefix)
        # One of its own for every save: processes that save to one place do not mix their files.
        new = home / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
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
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"could not save to {target} ({error}); it is as it was before: make room, or choose a "
            "folder that can be written",
        ) from error
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def _swap_folders(new: Path, target: Path, old: Path) -> None:
    """Put folder `new` in the place of `target`, which is `old` in between."""
    if not target.exists():
        new.rename(target)
        return
    for entry in target.iterdir():
        if not (new / entry.name).exists() and not is_weight_file(entry.name):
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
    """Put the files of `new`, a folder in `target`, in the place of those in `target`.

    The config goes first and comes last: if the process is killed in between, the folder does not
    load, rather than load old and new files together.
    """

    def config_last(name: str) -> bool:
        return name == CONFIG_NAME

    come = sorted((entry.name for entry in new.iterdir()), key=config_last)
    stale = {entry.name for entry in target.iterdir() if is_weight_file(entry.name)}
    stale |= {name for name in come if (target / name).exists()}
    replaced = new / "replaced"
    replaced.mkdir()
    moves = [(target / name, replaced / name) for name in sorted(stale, key=config_last)[::-1]]
    moves += [(new / name, target / name) for name in come]
    done = []
    try:
        for source, place in moves:
            done.append((source, place))
            source.rename(place)
    except BaseException:
        for source, place in reversed(done):
            if not source.exists():
                place.rename(source)
        raise


def _clear_up(home: Path, prefix: str) -> None:
    """Remove what saves that were killed left: the process in the name is no more."""
    for folder in home.iterdir():
        if folder.name.startswith(prefix):
            # Of a host whose name only starts like this one's, another part stands here.
            process = re.fullmatch(r"(\d+)-[0-9a-f]{8}", folder.name.removeprefix(prefix))
            if process and not psutil.pid_exists(int(process[1])):
                shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Have the files written to the disk: a folder must not take its place before them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as stream:
                sync(stream)


def check_target(target: Path) -> None:
    """Check that a checkpoint may be saved to `target`, an absolute path.

    Raises:
        FileExistsError: It is a file, holds the current folder, or the weights of another model.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file: choose a folder to save to")
    if not target.is_dir():
        return
    if Path.cwd().is_relative_to(target):
        raise FileExistsError(f"{target} is or holds the current folder: choose a folder in it")
    weights = [entry.name for entry in target.iterdir() if is_weight_file(entry.name)]
    if weights and not (target / RECORD_NAME).exists():
        raise FileExistsError(
            f"{target} holds the weights of another model ({weights[0]}), which is no CAP "
            "checkpoint: choose another folder, so that they are not lost"
        )


def is_weight_file(name: str) -> bool:
    """Whether a file is one that loading a model could pick up as its weights."""
    return name.startswith(("model", "pytorch_model")) and (
        name.endswith((".safetensors", ".bin")) or (".index." in name and name.endswith(".json"))
    )


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file or folder a second name, or copy it where the file system has no hard links."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, copy_function=link, symlinks=True)
    else:
        link(os.fspath(source), os.fspath(target))
