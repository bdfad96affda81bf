"""Files that are written as a whole or not at all."""

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


def write_atomically(file: Path, data: bytes, replace: bool = True) -> None:
    """Write a file so that it is there with all of `data`, on the disk, or as it was before.

    Args:
        file: The file.
        data: Its content.
        replace: Whether a file that is there already is replaced; else it stays.

    Raises:
        OSError: It cannot be written.
    """
    unfinished = file.with_name(f"{file.stem}.{secrets.token_hex(4)}.tmp")
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
    """Give a file a second name in one step, unless another file has that name."""
    try:
        os.link(file, name)
    except FileExistsError:
        pass
    except OSError:  # no hard links here: two processes at the same moment may replace each other
        if not name.exists():
            file.replace(name)


def sync(stream: IO[bytes]) -> None:
    """Write what an open file holds to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Write the names of the files in a folder to the disk, where the system supports that."""
    if os.name == "posix":
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class TensorFiles:
    """Tensors in a folder, one file each, with a checksum.

    Args:
        folder: Made when the first tensor is written. Several processes may share it.

    Attributes:
        failed: Whether a tensor could not be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed = False

    def read(self, key: str) -> torch.Tensor | None:
        """Return what was written under `key`; `None` if nothing was, or if it is damaged."""
        file = self._file(key)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as content:
                tensor: torch.Tensor = content.get_tensor("tensor")
                if (content.metadata() or {}).get("sha256") == digest_of(key, tensor):
                    return tensor
            problem = "its checksum is another one"
        except FileNotFoundError:
            return None  # another process has deleted it
        except (OSError, SafetensorError) as error:
            problem = str(error)
        logger.warning(f"{file} is damaged ({problem}): what it held is measured again")
        with suppress(OSError):
            file.unlink()
        return None

    def write(self, key: str, tensor: torch.Tensor, replace: bool = True) -> None:
        """Keep `tensor` under `key`: the file is there as a whole or not at all.

        A folder that cannot be written to does not stop the run, which has its results in memory;
        the first such failure is said.
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
                    f"the cache {self.folder} cannot be written ({error.strerror}): the run goes "
                    "on, but what it finds from here on is lost if it stops; make room, or name "
                    "another folder as resume_dir"
                )

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
