"""Atomic writing of files: as a whole or not at all."""

import functools
import json
import os
import platform
import re
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

import psutil
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from optimum_cap.runtime.digests import digest_of

logger = logging.get_logger(__name__)

_DAY = 86_400  # seconds
_CLOCK_ERROR = 2  # possible error, in seconds, of process start times and file times
_T = TypeVar("_T")
_LONGEST_STEM = 100  # bytes of a file's name that are used in the name of its unfinished version


def write_atomically(file: Path, data: bytes, replace: bool = True, mode: int = 0o666) -> None:
    """Write a file to disk completely, or leave it unchanged.

    Unfinished files that killed processes left in the same folder are removed.

    Args:
        file: The file.
        data: Its content.
        replace: Whether to replace an existing file; otherwise it is kept.
        mode: Permissions of the file before applying the umask.

    Raises:
        OSError: The file cannot be written.
    """
    _remove_unfinished(file.parent)
    stem = file.stem.encode()[:_LONGEST_STEM].decode(errors="ignore")
    owner = f"{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
    unfinished = file.with_name(f"{stem}.{owner}.tmp")
    try:
        with open(unfinished, "xb", opener=functools.partial(os.open, mode=mode)) as stream:
            stream.write(data)
            sync(stream)
        if replace:
            unfinished.replace(file)
        else:
            _link_unless_taken(unfinished, file)
        sync_folder(file.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@functools.cache  # once per folder, before this process has unfinished files in it
def _remove_unfinished(folder: Path) -> None:
    """Remove unfinished files of killed processes; those of other hosts if they are a day old."""
    with suppress(OSError):
        for file in folder.glob("*.tmp"):
            owner = re.fullmatch(r".*\.(.+)-(\d{1,9})-[0-9a-f]{8}\.tmp", file.name, re.DOTALL)
            if owner and was_left_behind(file, owner[1], int(owner[2])):
                file.unlink(missing_ok=True)


def was_left_behind(file: Path, host: str, process: int, patience: float = _DAY) -> bool:
    """Return whether the process that wrote a temporary file no longer runs.

    Args:
        file: The file.
        host: Host of the process. It is unknown whether a process on another host still runs.
        process: Its id. A process with this id that is younger than the file is a different one.
        patience: Age in seconds from which a file of another host counts as left behind.
    """
    try:
        modified = file.stat().st_mtime
    except OSError:
        return False  # already removed
    if host != platform.node():
        return modified < time.time() - patience
    try:
        return modified < psutil.Process(process).create_time() - _CLOCK_ERROR
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _link_unless_taken(file: Path, name: Path) -> None:
    """Hard-link a file to a second name atomically, unless that name is taken."""
    try:
        os.link(file, name)
    except FileExistsError:
        pass
    except OSError:  # no hard links: simultaneous processes may replace each other's file
        if not name.exists():
            file.replace(name)


def sync(stream: IO[bytes]) -> None:
    """Flush an open file to disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, if the system supports it."""
    if os.name == "posix":
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class PrivateFiles:
    """Stores values in a folder that only its owner can read, each in a file with a checksum.

    Checksums detect damage, not tampering: whoever can write to the folder can change what is read.
    A warning is logged if other users can.

    Args:
        folder: Created with the first file. Several processes may share it.

    Attributes:
        failed: Whether a file could not be written.

    Raises:
        NotADirectoryError: `folder` is a file or a broken link.
    """

    suffix: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise NotADirectoryError(
                f"the resume_dir {folder} is a file or a broken link: name a folder"
            )
        self.folder = folder
        self.failed = False
        self._has_warned_of_others = False
        self._warn_of_other_writers(folder)

    def _read(self, key: str, load: Callable[[Path], tuple[_T, str | None]]) -> _T | None:
        """Return the value stored under `key`, or `None` if it is missing or damaged.

        Args:
            key: Path of the file in the folder, without suffix.
            load: Returns the value and what is wrong with it, if anything.
        """
        file = self._file(key)
        try:
            if not os.path.isfile(file):
                return None
            for folder in self._folders_of(file):
                self._warn_of_other_writers(folder)
            value, problem = load(file)
            if problem is None:
                return value
        except FileNotFoundError:
            return None  # deleted by another process, or not readable
        except (OSError, SafetensorError, ValueError) as error:
            problem = str(error)
        logger.warning(f"{file} is damaged ({problem}): its content is computed again")
        with suppress(OSError):
            file.unlink()
        return None

    def _write(self, key: str, data: bytes, replace: bool) -> None:
        """Store `data` under `key`, atomically.

        If the folder cannot be written to, the run continues with its results in memory; the first
        failure is logged.
        """
        file = self._file(key)
        try:
            try:
                self._write_privately(file, data, replace)
            except FileNotFoundError:  # another process has just deleted the folder
                self._write_privately(file, data, replace)
        except OSError as error:
            if not self.failed:
                self.failed = True
                exists = isinstance(error, FileExistsError)
                reason = "a file is in the way" if exists else error.strerror
                logger.warning(
                    f"the resume folder {self.folder} cannot be written ({reason}): the "
                    "run continues, but loses further results if it is interrupted; free disk "
                    "space, or choose another resume_dir"
                )

    def _write_privately(self, file: Path, data: bytes, replace: bool) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        for folder in self._folders_of(file):
            folder.mkdir(mode=0o700, exist_ok=True)
        write_atomically(file, data, replace, mode=0o600)

    def _folders_of(self, file: Path) -> list[Path]:
        """Return the folders that contain a file, from `folder` inward."""
        inside = file.parent.relative_to(self.folder)
        return [self.folder / part for part in (*reversed(inside.parents), inside)]

    def _warn_of_other_writers(self, folder: Path) -> None:
        """Warn once if other users may change the files of a folder."""
        if self._has_warned_of_others or (writers := _other_writers(folder)) is None:
            return
        self._has_warned_of_others = True
        # Only once for the stores of losses and layers together, because they share the folder.
        logger.warning_once(
            f"{folder} {writers}: whoever can write to it can change what a resumed run computes; "
            "remove their permission, or choose another resume_dir"
        )

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}{self.suffix}"


class TensorFiles(PrivateFiles):
    """Stores tensors; see `PrivateFiles`."""

    suffix = ".safetensors"

    def read(
        self,
        key: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        check: Callable[[torch.Tensor], str | None] = lambda tensor: None,
    ) -> torch.Tensor | None:
        """Return the tensor stored under `key`, or `None` if it is missing or damaged.

        A file that is damaged or has unexpected content is deleted, and a warning is logged. The
        tensor is mapped into memory, and stays valid if its file is deleted.

        Args:
            key: Path of the file in the folder, without suffix.
            shape: Shape of the tensor.
            dtype: Its dtype.
            check: Returns what is wrong with the values of the tensor, if anything.
        """

        def load(file: Path) -> tuple[torch.Tensor, str | None]:
            tensor, checksum = _load(file)
            problem = _difference(tensor, shape, dtype)
            if problem is None and checksum != digest_of(key, tensor):
                problem = "its checksum is wrong"
            return tensor, check(tensor) if problem is None else problem

        return self._read(key, load)

    def write(self, key: str, tensor: torch.Tensor, replace: bool = True) -> None:
        """Store `tensor` under `key`, atomically.

        If the folder cannot be written to, the run continues with its results in memory; the first
        failure is logged.

        Args:
            key: Path of the file in the folder, without suffix.
            tensor: The tensor.
            replace: Whether to replace a stored tensor; otherwise it is kept.
        """
        data = safetensors.torch.save({"tensor": tensor}, {"sha256": digest_of(key, tensor)})
        self._write(key, data, replace)


class JsonFiles(PrivateFiles):
    """Stores JSON values; see `PrivateFiles`."""

    suffix = ".json"

    def read(self, key: str) -> Any:
        """Return the value stored under `key`, or `None` if it is missing or damaged."""

        def load(file: Path) -> tuple[Any, str | None]:
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.keys() != {"sha256", "value"}:
                return None, "it holds something else"
            right = content["sha256"] == digest_of(key, content["value"])
            return content["value"], None if right else "its checksum is wrong"

        return self._read(key, load)

    def write(self, key: str, value: Any) -> None:
        """Store a JSON value other than `None` under `key` atomically, like `TensorFiles.write`."""
        content = {"sha256": digest_of(key, value), "value": value}
        self._write(key, json.dumps(content, allow_nan=False).encode(), replace=True)


def _load(file: Path) -> tuple[torch.Tensor, str | None]:
    """Return the tensor of a file, and its checksum."""
    with safe_open(file, "pt") as content:
        return content.get_tensor("tensor"), (content.metadata() or {}).get("sha256")


def _difference(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Return how a tensor differs from the expected shape and dtype, if at all."""
    if (tuple(tensor.shape), tensor.dtype) == (tuple(shape), dtype):
        return None
    return f"it holds {list(tensor.shape)} {tensor.dtype}, not {list(shape)} {dtype}"


def _other_writers(folder: Path) -> str | None:
    """Return why users other than this one and root can change the files of a folder, if so."""
    if os.name != "posix":
        return None
    try:
        status = folder.stat()
    except OSError:
        return None
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to another user ({_name_of_user(status.st_uid)})"
    if status.st_mode & stat.S_IWOTH:
        return "may be written to by all users"
    if status.st_mode & stat.S_IWGRP and not _is_private_group(status.st_gid):
        return "may be written to by its group"
    return None


def _is_private_group(group: int) -> bool:
    """Return whether a group belongs to this user alone: same name, no other members.

    Where groups are set up like this, folders are group-writable by default.
    """
    import grp  # these exist only on POSIX systems
    import pwd

    try:
        user, entry = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == user and set(entry.gr_mem) <= {user}


def _name_of_user(user: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
