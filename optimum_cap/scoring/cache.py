"""Finished chunks of a scoring on disk, so that one that was stopped goes on."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_cap.data import Batch, CalibrationExample
from optimum_cap.models import SiteUnit
from optimum_cap.runtime import TensorFiles, digest_of, examples_digest, machine, model_digest

_LAYOUT = 2  # of files and keys, and of the way that losses are computed


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
        self, batch: Batch, units: list[SiteUnit], torch_compile: bool = False
    ) -> torch.Tensor | None:
        """Losses of a batch with each unit masked, or intact with no units; `None` if unknown.

        Those of compiled layers, which have other last bits, are kept beside the others.
        """
        return self.files.read(self._chunk(batch, units, torch_compile))

    def keep(
        self,
        batch: Batch,
        units: list[SiteUnit],
        losses: torch.Tensor,
        torch_compile: bool = False,
    ) -> None:
        """Keep the losses of a batch with each unit masked, or intact with no units."""
        self.files.write(self._chunk(batch, units, torch_compile), losses)

    def remembered(
        self,
        what: str,
        examples: list[CalibrationExample],
        units: list[SiteUnit],
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

    def _chunk(self, batch: Batch, units: list[SiteUnit], torch_compile: bool) -> str:
        # Where the examples of the batch stand in the calibration set changes no loss.
        content = {name: value for name, value in vars(batch).items() if name != "positions"}
        what = "compiled chunk" if torch_compile else "chunk"
        return self._key(what, names(units), content)

    def _key(self, *parts: Any) -> str:
        return f"{self._model}/{digest_of(*parts)[:32]}"


def names(units: list[SiteUnit]) -> list[str]:
    """What tells units apart: their sites and channels."""
    return [f"{site.name} {unit.channels}" for site, unit in units]
