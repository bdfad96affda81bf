"""Losses of finished chunks on disk, from which an interrupted scoring run resumes.

Files are named by a digest of everything their losses depend on: weights and config of the model,
batch, units, versions and machine. Files are never compared or updated: a changed input gives a
different name, and two runs that share a folder write the same bytes.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_cap.data import Batch, CalibrationExample
from optimum_cap.models import SiteUnit
from optimum_cap.runtime import TensorFiles, digest_of, examples_digest, machine, model_digest

_LAYOUT = 2  # version of files and keys, and of the computation of losses


class ScoreCache:
    """Stores the losses of finished chunks of one model.

    Args:
        folder: Where to store them; created with the first file. Several models and processes may
            share it.
        model: The model. Its weights are hashed once, at creation; create a new cache if they
            change.
    """

    def __init__(self, folder: str | os.PathLike[str], model: PreTrainedModel) -> None:
        self.files = TensorFiles(Path(folder))
        self._model = digest_of(_LAYOUT, machine(model), model_digest(model))[:32]

    def get(
        self, batch: Batch, units: list[SiteUnit], torch_compile: bool = False
    ) -> torch.Tensor | None:
        """Return the losses of a batch with each unit masked, or intact if `units` is empty.

        Losses from compiled layers differ in the last bits and are stored separately.

        Returns:
            The losses, float64 `[units, examples]` or `[examples]`; `None` if none are stored.
        """
        examples = len(batch.positions)
        shape = (len(units), examples) if units else (examples,)
        return self.files.read(self._chunk_key(batch, units, torch_compile), shape, torch.float64)

    def put(
        self,
        batch: Batch,
        units: list[SiteUnit],
        losses: torch.Tensor,
        torch_compile: bool = False,
    ) -> None:
        """Store the losses of a batch with each unit masked, or intact if `units` is empty."""
        self.files.write(self._chunk_key(batch, units, torch_compile), losses)

    def get_or_measure(
        self,
        name: str,
        examples: list[CalibrationExample],
        units: list[SiteUnit],
        measure: Callable[[], int],
    ) -> int:
        """Return a number stored by the first run with these examples and units, or measure it.

        Args:
            name: Name of the quantity.
            examples: The calibration examples.
            units: The units.
            measure: Measures it if no run has stored it.
        """
        key = self._key(name, unit_names(units), examples_digest(examples))
        stored = self._number(key)
        if stored is not None:
            return stored
        measured = measure()
        self.files.write(key, torch.tensor(measured), replace=False)
        stored = self._number(key)  # another process may have been faster
        return measured if stored is None else stored

    def _number(self, key: str) -> int | None:
        def problem_of(number: torch.Tensor) -> str | None:
            return f"it holds {int(number)}, a negative number" if number < 0 else None

        stored = self.files.read(key, (), torch.int64, problem_of)
        return None if stored is None else int(stored)

    def _chunk_key(self, batch: Batch, units: list[SiteUnit], torch_compile: bool) -> str:
        # Losses do not depend on the positions of the examples in the calibration set.
        content = {name: value for name, value in vars(batch).items() if name != "positions"}
        kind = "compiled chunk" if torch_compile else "chunk"
        return self._key(kind, unit_names(units), content)

    def _key(self, *parts: Any) -> str:
        return f"{self._model}/{digest_of(*parts)[:32]}"


def unit_names(units: list[SiteUnit]) -> list[str]:
    """Return unique names of units: their sites and channels."""
    return [f"{site.name} {unit.channels}" for site, unit in units]
