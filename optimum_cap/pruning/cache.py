"""What a run of the pruner has found out and done so far, so that one that was stopped goes on."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.data import CalibrationExample
from optimum_cap.models import Matrix, Site
from optimum_cap.runtime import (
    ProcessGroup,
    TensorFiles,
    digest_of,
    examples_digest,
    machine,
    model_digest,
)

logger = logging.get_logger(__name__)

_LAYOUT = 1  # of files and keys, and of the way that sensitivities and weights are computed


class PruningCache:
    """What is known about one model and one calibration set.

    It lies under a digest of all that it follows from, so that nothing else ever meets it.

    Args:
        folder: Where it is kept; made when there is something to keep. Several runs may share it.
        model: The model, dense. Its weights are read once, here.
        examples: The calibration examples.
        process_group: The processes that prune the model; the first one stores the layers.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: PreTrainedModel,
        examples: list[CalibrationExample],
        process_group: ProcessGroup,
    ) -> None:
        self._files = TensorFiles(Path(folder))
        self._is_first = process_group.rank == 0
        self._subject = _name(
            _LAYOUT, machine(model), model_digest(model), examples_digest(examples)
        )

    def sensitivities(self, settings: Mapping[str, Any]) -> "SensitivityStore":
        """The sensitivities of sites that are pruned in a certain way."""
        return SensitivityStore(self._files, f"{self._subject}/{_name(dict(settings))}")

    def layers(self, settings: Mapping[str, Any], size: int) -> "LayerStore":
        """The layers that are pruned in a certain way, of so many bytes in all."""
        prefix = f"{self._subject}/layers/{_name(dict(settings))}"
        return LayerStore(self._files, prefix, size, self._is_first)


class SensitivityStore:
    """Divergences with sites pruned alone; they are small, and stay.

    Args:
        files: Where they are kept.
        prefix: Of their keys.
    """

    def __init__(self, files: TensorFiles, prefix: str) -> None:
        self.files = files
        self._prefix = prefix

    def measured(self, site: Site, examples: int) -> torch.Tensor | None:
        """Divergences of a site on the first examples, float64 `[examples]`; `None` if unknown."""
        return self.files.read(self._key(site.name, examples))

    def keep_measured(self, site: Site, divergences: torch.Tensor) -> None:
        """Keep the divergences of a site."""
        self.files.write(self._key(site.name, len(divergences)), divergences)

    def estimated(self, examples: int, seed: int) -> torch.Tensor | None:
        """Estimates for all sites, float64 `[sites, examples]`; `None` if unknown."""
        return self.files.read(self._key("estimated", examples, seed))

    def keep_estimated(self, divergences: torch.Tensor, seed: int) -> None:
        """Keep the estimates for all sites; those of the first run stay."""
        key = self._key("estimated", divergences.shape[1], seed)
        self.files.write(key, divergences, replace=False)

    def _key(self, *parts: Any) -> str:
        return f"{self._prefix}/{_name(*parts)}"


class LayerStore:
    """Layers that have been pruned; they take the room of the model until `forget`.

    Of processes that were launched together, all of which prune, the first one keeps them. Where
    the disk has no room for them and the checkpoint too, nothing is kept, and that is said.

    Args:
        files: Where they are kept.
        prefix: Of their keys.
        size: Bytes that all of them take.
        writes: Whether this process stores layers.
    """

    def __init__(self, files: TensorFiles, prefix: str, size: int, writes: bool) -> None:
        self._files = files
        self._prefix = prefix
        stored = _size_of(files.folder / prefix) if writes else 0
        self._writes = writes and _has_room(files.folder, 2 * size - stored)

    @property
    def complete(self) -> bool:
        """Whether all that was to be kept could be."""
        return self._writes and not self._files.failed

    def get(self, index: int, matrices: Sequence[Matrix]) -> dict[Matrix, int] | None:
        """How many tokens decided about each matrix of a layer; `None` unless all is kept."""
        tokens = self._files.read(self._mark(index))
        if tokens is None or len(tokens) != len(matrices):
            return None
        if any(self._files.read(self._key(matrix)) is None for matrix in matrices):
            return None
        return dict(zip(matrices, tokens.tolist(), strict=True))

    def weights(self, matrices: Sequence[Matrix]) -> Iterator[tuple[Matrix, torch.Tensor]]:
        """Yield what the matrices of a layer that is `known` became, `[out, in]`, one by one."""
        for matrix in matrices:
            weight = self._files.read(self._key(matrix))
            if weight is None:
                raise OSError(
                    f"{self._files.folder} was changed while {matrix.name} was read from it: load "
                    "the model again, and prune it again"
                )
            yield matrix, weight

    def put(self, matrix: Matrix, weight: torch.Tensor) -> None:
        """Keep what a matrix became, `[out, in]`; it counts once its layer is finished."""
        if self._writes:
            self._files.write(self._key(matrix), weight.cpu().contiguous())

    def commit(self, index: int, tokens: list[int]) -> None:
        """All matrices of a layer have been kept; so many tokens decided about each."""
        if self._writes:
            self._files.write(self._mark(index), torch.tensor(tokens))

    def clear(self) -> None:
        """Delete them."""
        shutil.rmtree(self._files.folder / self._prefix, ignore_errors=True)

    def _key(self, matrix: Matrix) -> str:
        return f"{self._prefix}/{_name(matrix.name)}"

    def _mark(self, index: int) -> str:
        return f"{self._prefix}/{index}"


def _name(*parts: Any) -> str:
    return digest_of(*parts)[:32]


def _size_of(folder: Path) -> int:
    size = 0
    for file in folder.glob("*.safetensors"):
        with suppress(FileNotFoundError):  # another run may delete them
            size += file.stat().st_size
    return size


def _has_room(folder: Path, size: int) -> bool:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        logger.warning(
            f"{existing} has {free / 1e9:.1f} GB left, and pruned layers are kept only where there "
            f"are {size / 1e9:.1f} GB: pruning that is stopped will start anew; name another "
            "folder as resume_dir to keep them"
        )
    return free >= size
