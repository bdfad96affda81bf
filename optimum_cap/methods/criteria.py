"""Criteria: how the weights of one matrix are ranked, or solved for.

To add a criterion, write a function and add an entry to `CRITERIA` at the foot of this file: its
name is then known to `CAPConfig`, the command line, the model card and `cap estimate`.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from optimum_cap.methods.reconstruction import Reconstruction, alps, sparsegpt
from optimum_cap.methods.statistics import InputStatistics

LOWEST, HIGHEST = 1.0, 10.0


@dataclass(frozen=True)
class CriterionInputs:
    """What a criterion may look at, beside the weights of the matrix.

    Attributes:
        name: Name of the matrix.
        seed: Seed of whatever is drawn.
        regions: Importance of the units that the weights belong to; broadcasts against `[out, in]`.
        statistics: Statistics of the inputs of the matrix.
    """

    name: str
    seed: int = 0
    regions: torch.Tensor | None = None
    statistics: InputStatistics | None = None


Importance = Callable[[torch.Tensor, CriterionInputs], torch.Tensor]
"""`(weight [out, in], criterion inputs)` -> importances, float32 `[out, in]`, at least 0; higher
means keep."""


@dataclass(frozen=True)
class Criterion:
    """How the weights of a matrix are pruned: ranked by `importance`, or solved for by `solve`.

    Attributes:
        title: What the model card calls it.
        importance: Ranks the weights and leaves those that are kept as they are.
        solve: Chooses the weights to prune and updates the others, in the place of `importance`.
        compared: Weights compete in a `"matrix"` or in a `"row"` of it.
        needs_scores: Whether it needs the causal scores of the units.
        needs_inputs: Whether it looks at the inputs of a matrix, so that each layer is pruned
            before the next one is looked at.
        ranks_heads: Whether whole heads can be ranked by it (`pattern="heads"`).
        cost: What `cap estimate` charges for it: `"threshold"`, `"rows"`, `"sparsegpt"` or
            `"alps"` (`PRUNING_COSTS` in `optimum_cap/estimation/costs.py`).
    """

    title: str
    importance: Importance | None = None
    solve: Reconstruction | None = None
    compared: str = "matrix"
    needs_scores: bool = False
    needs_inputs: bool = False
    ranks_heads: bool = False
    cost: str = "threshold"

    @property
    def updates_weights(self) -> bool:
        """Whether the weights that are kept change too."""
        return self.solve is not None


def magnitude_times_importance(weight: torch.Tensor, inputs: CriterionInputs) -> torch.Tensor:
    """Return |W| * I (paper, Eq. 4)."""
    assert inputs.regions is not None
    # abs() first: it copies, so that the rest may work in place.
    return weight.detach().abs().float().mul_(inputs.regions.to(weight.device))


def magnitude(weight: torch.Tensor, inputs: CriterionInputs) -> torch.Tensor:
    """Return |W|."""
    return weight.detach().abs().float()


def random(weight: torch.Tensor, inputs: CriterionInputs) -> torch.Tensor:
    """Return uniform random numbers, the same ones for the same seed and name on any device."""
    generator = torch.Generator().manual_seed(zlib.crc32(inputs.name.encode()) + inputs.seed)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def wanda(weight: torch.Tensor, inputs: CriterionInputs) -> torch.Tensor:
    """Return |W_ij| * ||X_j||_2 (Sun et al. 2023, arXiv 2306.11695, Eq. 1).

    The norm of a channel is the root mean square over tokens, which ranks alike. A matrix that no
    token reached, of an expert, is ranked by magnitude.
    """
    assert inputs.statistics is not None
    importance = magnitude(weight, inputs)
    if inputs.statistics.tokens:
        importance *= (
            (inputs.statistics.squares / inputs.statistics.tokens).sqrt().to(weight.device)
        )
    return importance


CRITERIA: dict[str, Criterion] = {
    "causal_score": Criterion(
        "Causal Attribution Pruning (arXiv 2606.19350)",
        importance=magnitude_times_importance,
        needs_scores=True,
        ranks_heads=True,
    ),
    "magnitude": Criterion("magnitude pruning", importance=magnitude, ranks_heads=True),
    "random": Criterion("random pruning", importance=random, ranks_heads=True),
    "wanda": Criterion(
        "Wanda (arXiv 2306.11695)",
        importance=wanda,
        compared="row",
        needs_inputs=True,
        cost="rows",
    ),
    "sparsegpt": Criterion(
        "SparseGPT (arXiv 2301.00774)", solve=sparsegpt, needs_inputs=True, cost="sparsegpt"
    ),
    "alps": Criterion("ALPS (arXiv 2406.07831)", solve=alps, needs_inputs=True, cost="alps"),
}
