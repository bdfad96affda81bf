"""Storage of sensitivities and pruned layers, from which an interrupted pruning run resumes."""

import functools
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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

_LAYOUT = 4  # version of files and keys, and of the computation of sensitivities and weights


class PruningCache:
    """Stores results of pruning runs for one model and one calibration set.

    Files are named by a digest of everything their content depends on, so that no run reads results
    of other inputs.

    Args:
        folder: Where to store them; created with the first file. Several runs may share it.
        model: The dense model. Its weights are hashed once, here.
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
        """Return the store for sensitivities of sites pruned with these settings."""
        return SensitivityStore(self._files, f"{self._subject}/{_name(dict(settings))}")

    def choice(
        self, settings: Mapping[str, Any], shape: tuple[int, ...], parts: int
    ) -> torch.Tensor | None:
        """Return the parts that a run with these settings chose to remove, if stored.

        Args:
            settings: The settings.
            shape: Shape of the choice.
            parts: Number of parts to which the indices refer.

        Returns:
            Indices of parts, int64 of this shape, or `None`.
        """

        def problem(choice: torch.Tensor) -> str | None:
            valid = bool(((choice >= 0) & (choice < parts)).all())
            return None if valid else f"it holds an index that is not one of {parts} parts"

        return self._files.read(self._choice_key(settings), shape, torch.int64, problem)

    def put_choice(self, settings: Mapping[str, Any], choice: torch.Tensor) -> None:
        """Store the parts that a run with these settings chose to remove, int64."""
        if self._is_first:
            self._files.write(self._choice_key(settings), choice)

    def divergence(self, settings: Mapping[str, Any]) -> float | None:
        """Return the divergence of the model after a run with these settings, if stored."""
        stored = self._files.read(self._divergence_key(settings), (), torch.float64)
        return None if stored is None else float(stored)

    def put_divergence(self, settings: Mapping[str, Any], divergence: float) -> None:
        """Store the divergence of the model after a run with these settings."""
        if self._is_first:
            tensor = torch.tensor(divergence, dtype=torch.float64)
            self._files.write(self._divergence_key(settings), tensor)

    def _divergence_key(self, settings: Mapping[str, Any]) -> str:
        return f"{self._subject}/divergences/{_name(dict(settings))}"

    def _choice_key(self, settings: Mapping[str, Any]) -> str:
        return f"{self._subject}/choices/{_name(dict(settings))}"

    def layers(self, settings: Mapping[str, Any], size: int) -> "LayerStore":
        """Return the store for layers pruned with these settings, `size` bytes in total."""
        prefix = f"{self._subject}/layers/{_name(dict(settings))}"
        return LayerStore(self._files, prefix, size, self._is_first)


class SensitivityStore:
    """Stores divergences of sites pruned alone, which are small and never deleted.

    Args:
        files: Where to store them.
        prefix: Prefix of their keys.
    """

    def __init__(self, files: TensorFiles, prefix: str) -> None:
        self.files = files
        self._prefix = prefix

    def get_measured(self, site: Site, examples: int) -> torch.Tensor | None:
        """Return the divergences of a site on the first `examples` examples, if stored.

        Returns:
            float64 `[examples]`, or `None`.
        """
        return self.files.read(self._key(site.name, examples), (examples,), torch.float64)

    def put_measured(self, site: Site, divergences: torch.Tensor) -> None:
        """Store the divergences of a site."""
        self.files.write(self._key(site.name, len(divergences)), divergences)

    def get_estimated(
        self, sites: int, examples: int, outputs: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the estimates for all sites, or `None` unless all of them are stored.

        Returns:
            The divergences, float64 `[sites, examples]`, and the weights of all outputs, float32
            `[outputs]`.
        """
        divergences = self.files.read(
            self._key("estimated", examples, seed), (sites, examples), torch.float64
        )
        weights = self.files.read(
            self._key("output weights", examples, seed), (outputs,), torch.float32
        )
        return None if divergences is None or weights is None else (divergences, weights)

    def put_estimated(self, divergences: torch.Tensor, weights: torch.Tensor, seed: int) -> None:
        """Store the estimates for all sites and outputs."""
        examples = divergences.shape[1]
        self.files.write(self._key("output weights", examples, seed), weights)
        self.files.write(self._key("estimated", examples, seed), divergences)

    def _key(self, *parts: Any) -> str:
        return f"{self._prefix}/{_name(*parts)}"


class ExpectedWeights(NamedTuple):
    """Requirements for the pruned weights of a matrix.

    Attributes:
        shape: Their shape, `[out, in]`.
        dtype: Their dtype.
        zeros: Minimum number of zeros among them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    zeros: int


@dataclass(frozen=True)
class StoredLayer:
    """A pruned layer of an earlier run.

    Attributes:
        weights: The pruned matrices, `[out, in]`, mapped into memory from their files.
        tokens: Number of calibration tokens for each matrix.
    """

    weights: dict[Matrix, torch.Tensor]
    tokens: dict[Matrix, int]


class LayerStore:
    """Stores pruned layers, which take as much disk space as the model until `clear` is called.

    If the disk has too little space for the layers and the checkpoint, nothing is stored and a
    warning is logged.

    Args:
        files: Where to store them.
        prefix: Prefix of their keys.
        size: Total size of the layers in bytes.
        writes: Whether this process stores layers: only the first of several does, and sends stored
            layers to the others.
    """

    def __init__(self, files: TensorFiles, prefix: str, size: int, writes: bool) -> None:
        self._files = files
        self._prefix = prefix
        self._zeros: dict[Matrix, int] = {}
        stored = _size_of(files.folder / prefix) if writes else 0
        self._writes = writes and _has_disk_space(files.folder, 2 * size - stored)

    @property
    def complete(self) -> bool:
        """Whether everything so far has been stored."""
        return self._writes and not self._files.failed

    def get(self, index: int, expected: Mapping[Matrix, ExpectedWeights]) -> StoredLayer | None:
        """Return a layer, or `None` unless it is stored completely.

        The layer stays valid if another run deletes its files.

        Args:
            index: The layer.
            expected: The requirements for its matrices, in the order in which they were committed.
        """
        counts = self._files.read(
            self._layer_key(index), (2, len(expected)), torch.int64, _problem_of_counts
        )
        if counts is None:
            return None
        tokens, zeros = counts.tolist()
        weights = {}
        for (matrix, wanted), stored_zeros in zip(expected.items(), zeros, strict=True):
            check = functools.partial(_problem_of_weights, zeros=stored_zeros, least=wanted.zeros)
            weight = self._files.read(self._key(matrix), wanted.shape, wanted.dtype, check)
            if weight is None:
                return None
            weights[matrix] = weight
        return StoredLayer(weights, dict(zip(expected, tokens, strict=True)))

    def put(self, matrix: Matrix, weight: torch.Tensor) -> None:
        """Store a pruned matrix, `[out, in]`; it takes effect once its layer is committed."""
        if self._writes:
            self._zeros[matrix] = _zeros_of(weight)
            self._files.write(self._key(matrix), weight.cpu().contiguous())

    def commit(self, index: int, tokens: Mapping[Matrix, int]) -> None:
        """Mark a layer as finished.

        Args:
            index: The layer.
            tokens: Number of calibration tokens for each of its matrices.
        """
        if self._writes:
            zeros = [self._zeros.pop(matrix) for matrix in tokens]
            counts = torch.tensor([list(tokens.values()), zeros], dtype=torch.int64)
            self._files.write(self._layer_key(index), counts)

    def clear(self) -> None:
        """Delete the stored layers."""
        shutil.rmtree(self._files.folder / self._prefix, ignore_errors=True)

    def _key(self, matrix: Matrix) -> str:
        return f"{self._prefix}/{_name(matrix.name)}"

    def _layer_key(self, index: int) -> str:
        return f"{self._prefix}/{index}"


def _name(*parts: Any) -> str:
    return digest_of(*parts)[:32]


def _zeros_of(weight: torch.Tensor) -> int:
    return weight.numel() - int(weight.count_nonzero())


def _problem_of_counts(counts: torch.Tensor) -> str | None:
    return "it holds a negative number" if (counts < 0).any() else None


def _problem_of_weights(weight: torch.Tensor, zeros: int, least: int) -> str | None:
    """Return what is wrong with a pruned matrix that must have a minimum number of zeros."""
    if not weight.isfinite().all():
        return "it holds NaN or infinite weights"
    if (count := _zeros_of(weight)) != zeros:
        return f"{count} of its weights are zero, not {zeros}"
    if zeros < least:
        return f"{zeros} of its weights are zero, but at least {least} have to be"
    return None


def _size_of(folder: Path) -> int:
    """Return the size of the files in a folder, which another run may be deleting."""
    names: list[str] = []
    size = 0
    with suppress(OSError):
        names = os.listdir(folder)
    for name in names:
        with suppress(OSError):
            size += (folder / name).stat().st_size
    return size


def _has_disk_space(folder: Path, size: int) -> bool:
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    free = shutil.disk_usage(existing).free
    if free < size:
        logger.warning(
            f"{existing} has {free / 1e9:.1f} GB of free space, but storing pruned layers needs "
            f"{size / 1e9:.1f} GB, so an interrupted run must start over: free disk space, or "
            "choose another resume_dir"
        )
    return free >= size
