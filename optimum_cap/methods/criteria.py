"""Pruning criteria: functions that rank the weights of a matrix, or solve for them.

To add a criterion, write a function and add an entry to `CRITERIA` at the end of this file.
`CAPConfig`, the command line, the model card and `cap estimate` then support its name.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from optimum_cap.methods.masks import REMOVED_PARTS
from optimum_cap.methods.reconstruction import Reconstruction, alps, sparsegpt
from optimum_cap.methods.statistics import InputStatistics

LOWEST, HIGHEST = 1.0, 10.0


@dataclass(frozen=True)
class CriterionInputs:
    """Inputs of a criterion other than the weights of the matrix.

    Attributes:
        name: Name of the matrix.
        seed: Seed for random numbers.
        regions: Importance of each weight's unit; broadcasts against `[out, in]`.
        statistics: Statistics of the inputs of the matrix.
    """

    name: str
    seed: int = 0
    regions: torch.Tensor | None = None
    statistics: InputStatistics | None = None


Importance = Callable[[torch.Tensor, CriterionInputs], torch.Tensor]
"""`(weight [out, in], criterion inputs)` -> non-negative importances, float32 `[out, in]`; weights
with higher importances are kept."""


@dataclass(frozen=True)
class Criterion:
    """A pruning criterion, which ranks weights with `importance` or solves for them with `solve`.

    Attributes:
        title: Its name in the model card.
        importance: Ranks the weights; the kept weights do not change.
        solve: Chooses the weights to prune and updates the others; replaces `importance`.
        compared: Whether weights are ranked within a `"matrix"` or within each `"row"` of it.
        needs_scores: Whether it needs the causal scores of the units.
        needs_inputs: Whether it needs statistics of the inputs of a matrix, so that each layer is
            pruned before the inputs of the next one are measured.
        needs_examples: Whether it measures parts of the dense model on calibration examples.
        needs_predictions: Whether it measures predictions of tokens on these examples.
        removes_columns: Whether it removes channels with `remove_columns`, which fits the others.
        parts: The patterns of `SMALLER_PATTERNS` for which it can choose parts.
        cost: Its cost model in `cap estimate`: `"threshold"`, `"rows"`, `"sparsegpt"` or `"alps"`
            (`PRUNING_COSTS` in `optimum_cap/estimation/costs.py`).
        fields: The fields of `CAPConfig` that it uses, in addition to those that `needs_scores`,
            `needs_inputs` and `solve` imply. They are refused where nothing uses them.
    """

    title: str
    importance: Importance | None = None
    solve: Reconstruction | None = None
    compared: str = "matrix"
    needs_scores: bool = False
    needs_inputs: bool = False
    needs_examples: bool = False
    needs_predictions: bool = False
    removes_columns: bool = False
    parts: tuple[str, ...] = ()
    cost: str = "threshold"
    fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ways = (self.importance, self.solve)
        if ways.count(None) == 0 or (ways.count(None) == 2 and not self.parts):
            raise ValueError(f"{self.title}: set importance or solve, and only one of them")
        if self.solve is not None and not self.needs_inputs:
            raise ValueError(f"{self.title}: solve needs the inputs: set needs_inputs=True")
        if self.solve is not None and self.cost == "threshold":
            raise ValueError(f"{self.title}: name the cost of solve, a key of PRUNING_COSTS")

    @property
    def updates_weights(self) -> bool:
        """Whether it also changes the kept weights."""
        return self.solve is not None or self.removes_columns

    @property
    def ranks_weights(self) -> bool:
        """Whether it can choose individual weights, not only parts."""
        return self.importance is not None or self.solve is not None


def magnitude_times_importance(weight: torch.Tensor, inputs: CriterionInputs) -> torch.Tensor:
    """Return |W| * I (paper, Eq. 4)."""
    assert inputs.regions is not None
    # abs() makes a copy, so the following operations can work in place.
    return weight.detach().abs().float().mul_(inputs.regions.to(weight.device))


def magnitude(weight: torch.Tensor, inputs: CriterionInputs) -> torch.Tensor:
    """Return |W|."""
    return weight.detach().abs().float()


def random(weight: torch.Tensor, inputs: CriterionInputs) -> torch.Tensor:
    """Return uniform random numbers that depend only on seed and name, not on the device."""
    generator = torch.Generator().manual_seed(zlib.crc32(inputs.name.encode()) + inputs.seed)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def wanda(weight: torch.Tensor, inputs: CriterionInputs) -> torch.Tensor:
    """Return |W_ij| * ||X_j||_2 (Sun et al. 2023, arXiv 2306.11695, Eq. 1).

    The norm of a channel is its root mean square over tokens, which gives the same ranking. The
    matrix of an expert that no token reached is ranked by magnitude.
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
        parts=("heads",),
    ),
    "magnitude": Criterion("magnitude pruning", importance=magnitude, parts=("heads", "channels")),
    "random": Criterion(
        "random pruning",
        importance=random,
        parts=REMOVED_PARTS,
        fields=("seed",),
    ),
    "wanda": Criterion(
        "Wanda (arXiv 2306.11695)",
        importance=wanda,
        compared="row",
        needs_inputs=True,
        parts=("heads", "channels"),
        cost="rows",
    ),
    "sparsegpt": Criterion(
        "SparseGPT (arXiv 2301.00774)", solve=sparsegpt, needs_inputs=True, cost="sparsegpt"
    ),
    "alps": Criterion("ALPS (arXiv 2406.07831)", solve=alps, needs_inputs=True, cost="alps"),
    "divergence": Criterion(
        "the measured effect of each of them on the predictions",
        needs_examples=True,
        needs_predictions=True,
        parts=("experts", "layers", "structured"),
    ),
    "routed_error": Criterion(
        "the effect of each expert on the output of its layer",
        needs_examples=True,
        parts=("experts",),
    ),
    "reap": Criterion("REAP (arXiv 2510.13999)", needs_examples=True, parts=("experts",)),
    "frequency": Criterion(
        "the number of tokens of each expert", needs_examples=True, parts=("experts",)
    ),
    "routing_weight": Criterion(
        "the routing weights of each expert", needs_examples=True, parts=("experts",)
    ),
    "block_influence": Criterion(
        "block influence (ShortGPT, arXiv 2403.03853)", needs_examples=True, parts=("layers",)
    ),
    "least_squares": Criterion(
        "the least squares fit without each of them (ZipLM, arXiv 2302.04089)",
        needs_inputs=True,
        removes_columns=True,
        parts=("heads", "channels"),
    ),
}
