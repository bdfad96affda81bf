"""What a run of the pruner has found out and done so far, so that one that was stopped goes on."""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from optimum_cap.architectures import Matrix, Site
from optimum_cap.calibration import CalibrationExample
from optimum_cap.config import CAPConfig
from optimum_cap.distributed import Team
from optimum_cap.score_cache import TensorFiles, examples_digest, machine
from optimum_cap.storage import digest_of, model_digest

_LAYOUT = 1  # of files and keys, and of the way that responses and weights are computed
_LAYERS = "layers"


class PruningCache:
    """Responses and pruned layers of one model, calibration set and config.

    They lie under a digest of all of these, so that nothing else ever meets them. Responses are
    small and stay; pruned layers take the room of the model until `forget_layers`. Of processes
    that were launched together, all of which prune, the first one keeps the layers.

    Args:
        folder: Where they are kept; made when there is something to keep. Several runs may share
            it.
        model: The model, dense. Its weights are read once, here.
        examples: The calibration examples.
        config: Settings of the run.
        matrices: The matrices to prune.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: PreTrainedModel,
        examples: list[CalibrationExample],
        config: CAPConfig,
        matrices: Iterable[Matrix],
    ) -> None:
        self._files = TensorFiles(Path(folder))
        settings = {k: v for k, v in config.to_dict().items() if k != "checkpoint_format"}
        of_run = digest_of(
            {"layout": _LAYOUT, **machine(model)},
            model_digest(model),
            examples_digest(examples),
            settings,
            [matrix.name for matrix in matrices],
        )
        self._run = of_run[:32]
        self._first = Team.of_this_run().rank == 0

    def divergences(self, site: Site, examples: int) -> torch.Tensor | None:
        """Divergences with a site pruned alone, float64 `[examples]`; `None` if unknown."""
        return self._files.read(self._response(site, examples))

    def keep_divergences(self, site: Site, divergences: torch.Tensor) -> None:
        """Keep the divergences with a site pruned alone."""
        self._files.write(self._response(site, len(divergences)), divergences)

    def layer(
        self, index: int, matrices: Sequence[Matrix]
    ) -> dict[Matrix, tuple[torch.Tensor, int]] | None:
        """What the matrices of a layer became, and how many tokens decided; `None` if unknown."""
        tokens = self._files.read(self._tokens(index))
        if tokens is None or len(tokens) != len(matrices):
            return None
        found = {}
        for matrix, count in zip(matrices, tokens.tolist(), strict=True):
            if (weight := self._files.read(self._weight(matrix))) is None:
                return None
            found[matrix] = weight, count
        return found

    def keep_matrix(self, matrix: Matrix, weight: torch.Tensor) -> None:
        """Keep what a matrix became, `[out, in]`; it counts once its layer is finished."""
        if self._first:
            self._files.write(self._weight(matrix), weight.cpu().contiguous())

    def finish_layer(self, index: int, tokens: list[int]) -> None:
        """All matrices of a layer have been kept: so many tokens their statistics are of."""
        if self._first:
            self._files.write(self._tokens(index), torch.tensor(tokens))

    def forget_layers(self) -> None:
        """Delete the pruned layers."""
        shutil.rmtree(self._files.folder / self._run / _LAYERS, ignore_errors=True)

    def _response(self, site: Site, examples: int) -> str:
        return f"{self._run}/{digest_of(site.name, examples)[:32]}"

    def _weight(self, matrix: Matrix) -> str:
        return f"{self._run}/{_LAYERS}/{digest_of(matrix.name)[:32]}"

    def _tokens(self, index: int) -> str:
        return f"{self._run}/{_LAYERS}/{index}"
