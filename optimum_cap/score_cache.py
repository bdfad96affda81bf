"""Finished chunks of a scoring on disk, so that a run that was stopped goes on where it was.

A chunk lies under a digest of all that its bytes follow from: weights and config of the model, the
batch, the units, the versions and the machine. Nothing is ever compared or updated, so a changed
input cannot meet an old chunk, and two runs that share a folder write the same bytes.
"""

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.architectures import Site, Unit
from optimum_cap.calibration import Batch, CalibrationExample
from optimum_cap.offload import device_of
from optimum_cap.storage import code_digest, digest_of, model_digest, write_whole

logger = logging.get_logger(__name__)

_LAYOUT = 2  # of files and keys, and of the way that losses are computed
VERSIONED = ("optimum-cap", "torch", "transformers")


def default_folder() -> Path:
    """Where the command line keeps chunks: `optimum_cap/scores` in the Hugging Face home."""
    return Path(constants.HF_HOME) / "optimum_cap" / "scores"


class Keeping(Protocol):
    """What keeps finished parts of a run."""

    files: "TensorFiles"


class ScoreCache:
    """The finished chunks of one model.

    Args:
        folder: Where they are kept; made when there is something to keep. Several models and
            several processes may share it.
        model: The model. Its weights are read once, here: a changed model needs a new cache.
    """

    def __init__(self, folder: str | os.PathLike[str], model: PreTrainedModel) -> None:
        self.files = TensorFiles(Path(folder))
        self._model = digest_of(_LAYOUT, machine(model), model_digest(model))[:32]

    def losses(
        self, batch: Batch, units: list[tuple[Site, Unit]], torch_compile: bool = False
    ) -> torch.Tensor | None:
        """Losses of a batch with each unit masked, or intact with no units; `None` if unknown.

        Those of compiled layers, which have other last bits, are kept beside the others.
        """
        return self.files.read(self._chunk(batch, units, torch_compile))

    def keep(
        self,
        batch: Batch,
        units: list[tuple[Site, Unit]],
        losses: torch.Tensor,
        torch_compile: bool = False,
    ) -> None:
        """Keep the losses of a batch with each unit masked, or intact with no units."""
        self.files.write(self._chunk(batch, units, torch_compile), losses)

    def remembered(
        self,
        what: str,
        examples: list[CalibrationExample],
        units: list[tuple[Site, Unit]],
        find: Callable[[], int],
    ) -> int:
        """Return what was found when the first run over these began, perhaps this one."""
        key = self._key(what, names(units), examples_digest(examples))
        if (known := self.files.read(key)) is None:
            found = torch.tensor(find())
            self.files.write(key, found, replace=False)
            known = self.files.read(key)  # another process may have been first
            return int(found if known is None else known)
        return int(known)

    def _chunk(self, batch: Batch, units: list[tuple[Site, Unit]], torch_compile: bool) -> str:
        # Where the examples of the batch stand in the calibration set changes no loss.
        content = {name: value for name, value in vars(batch).items() if name != "positions"}
        what = "compiled chunk" if torch_compile else "chunk"
        return self._key(what, names(units), content)

    def _key(self, *parts: Any) -> str:
        return f"{self._model}/{digest_of(*parts)[:32]}"


def way_on(kept: "Keeping | None") -> str:
    """Say what is left of a run that was stopped, and how to go on.

    Args:
        kept: Where finished parts are kept, if anywhere.
    """
    if kept is None:
        return "without a cache_dir nothing is kept, and it has to begin anew"
    what = "not all that is done" if kept.files.failed else "what is done"
    return f"{what} is kept in {kept.files.folder}; run the same again to go on from there"


@contextmanager
def stoppable(doing: Callable[[], str], kept: Keeping | None) -> Iterator[None]:
    """Say how to go on where a run is interrupted, or loses another process.

    Args:
        doing: What is stopped, and how far it is.
        kept: Where finished parts are kept, if anywhere.
    """
    try:
        yield
    except KeyboardInterrupt:
        logger.warning(f"{doing()}: {way_on(kept)}")
        raise
    except ConnectionError as error:
        raise ConnectionError(f"{error}: {way_on(kept)}") from error


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
            write_whole(file, data, replace)
        except OSError as error:
            if not self.failed:
                self.failed = True
                logger.warning(
                    f"the cache {self.folder} cannot be written ({error.strerror}): the run goes "
                    "on, but what it finds from here on is lost if it stops; make room, or name "
                    "another folder as cache_dir"
                )

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def examples_digest(examples: list[CalibrationExample]) -> str:
    """Digest of the tokens of examples, and of which are scored."""
    return digest_of([[example.input_ids, example.scored] for example in examples])


def names(units: list[tuple[Site, Unit]]) -> list[str]:
    """What tells units apart: their sites and channels."""
    return [f"{site.name} {unit.channels}" for site, unit in units]


def machine(model: PreTrainedModel) -> dict[str, Any]:
    """What measurements follow from beside the config, the weights and the tokens."""
    device = device_of(model)
    return {
        "code": code_digest(model),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
        "attention": model.config._attn_implementation,
        "experts": getattr(model.config, "_experts_implementation", None),
        "device": device.type,
        "machine": (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            # Matrix products add up in another order with other instructions and threads.
            else [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
        ),
        "precision": torch.get_float32_matmul_precision(),
    }
