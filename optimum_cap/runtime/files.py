"""Files that are written atomically: as a whole or not at all."""

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from optimum_cap.runtime.digests import digest_of

logger = logging.get_logger(__name__)

_LONGEST = 48  # characters of a name that a temporary file is named after


def write_atomically(file: Path, data: bytes, replace: bool = True) -> None:
    """Write a file to disk completely, or leave it as it was.

    Args:
        file: The file.
        data: Its content.
        replace: Whether to replace an existing file; otherwise it is kept.

    Raises:
        OSError: The file cannot be written.
    """
    # The name of the file may be as long as the file system allows.
    unfinished = file.with_name(f"{file.stem[:_LONGEST]}.{secrets.token_hex(4)}.tmp")
    try:
        with unfinished.open("wb") as stream:
            stream.write(data)
            sync(stream)
        if replace:
            unfinished.replace(file)
        else:
            _link_unless_taken(unfinished, file)
        sync_folder(file.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _link_unless_taken(file: Path, name: Path) -> None:
    """Give a file a second name atomically, unless another file has that name."""
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


class TensorFiles:
    """Stores tensors in a folder, one file with a checksum each.

    Args:
        folder: Created with the first file. Several processes may share it.

    Attributes:
        failed: Whether a tensor could not be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed = False

    def read(self, key: str) -> torch.Tensor | None:
        """Return the tensor stored under `key`, or `None` if there is none or it is damaged."""
        file = self._file(key)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as content:
                tensor: torch.Tensor = content.get_tensor("tensor")
                if (content.metadata() or {}).get("sha256") == digest_of(key, tensor):
                    return tensor
            problem = "its checksum is wrong"
        except FileNotFoundError:
            return None  # another process has deleted it
        except (OSError, SafetensorError) as error:
            problem = str(error)
        logger.warning(f"{file} is damaged ({problem}): its content is computed again")
        with suppress(OSError):
            file.unlink()
        return None

    def write(self, key: str, tensor: torch.Tensor, replace: bool = True) -> None:
        """Store `tensor` under `key`, atomically.

        If the folder cannot be written to, the run continues with its results in memory; the first
        failure is logged.

        Args:
            key: Path of the file in the folder, without suffix.
            tensor: The tensor.
            replace: Whether to replace a stored tensor; otherwise it is kept.
        """
        file = self._file(key)
        data = safetensors.torch.save({"tensor": tensor}, {"sha256": digest_of(key, tensor)})
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, data, replace)
        except OSError as error:
            if not self.failed:
                self.failed = True
                logger.warning(
                    f"the resume folder {self.folder} cannot be written ({error.strerror}): the "
                    "run continues, but loses further results if it is interrupted; free disk "
                    "space, or choose another resume_dir"
                )

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
