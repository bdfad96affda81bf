"""Criteria: a matrix and what was measured -> importances of its weights. Higher means keep."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from optimum_cap.methods.statistics import InputStatistics

LOWEST, HIGHEST = 1.0, 10.0


@dataclass(frozen=True)
class CriterionInputs:
    """What a criterion may look at, beside the weights of the matrix.

    Attributes:
        name: Name of the matrix.
        seed: Seed of whatever is drawn.
        regions: Importance of the units that the weights belong to; broadcasts against `[out, in]`.
        inputs: Statistics of the inputs of the matrix.
    """

    name: str
    seed: int = 0
    regions: torch.Tensor | None = None
    inputs: InputStatistics | None = None


@dataclass(frozen=True)
class Criterion:
    """How the weights of a matrix are ranked.

    Attributes:
        importance: `(weight [out, in], evidence)` -> importances, float32 `[out, in]`, at least 0.
        compared: Weights compete in a `"matrix"` or in a `"row"` of it.
    """

    importance: Callable[[torch.Tensor, CriterionInputs], torch.Tensor]
    compared: str = "matrix"


def magnitude_times_importance(weight: torch.Tensor, evidence: CriterionInputs) -> torch.Tensor:
    """Return |W| * I (paper, Eq. 4)."""
    assert evidence.regions is not None
    # abs() first: it copies, so that the rest may work in place.
    return weight.detach().abs().float().mul_(evidence.regions.to(weight.device))


def magnitude(weight: torch.Tensor, evidence: CriterionInputs) -> torch.Tensor:
    """Return |W|."""
    return weight.detach().abs().float()


def random(weight: torch.Tensor, evidence: CriterionInputs) -> torch.Tensor:
    """Return uniform random numbers, the same ones for the same seed and name on any device."""
    generator = torch.Generator().manual_seed(zlib.crc32(evidence.name.encode()) + evidence.seed)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def wanda(weight: torch.Tensor, evidence: CriterionInputs) -> torch.Tensor:
    """Return |W_ij| * ||X_j||_2 (Sun et al. 2023, arXiv 2306.11695, Eq. 1).

    The norm of a channel is the root mean square over tokens, which ranks alike. A matrix that no
    token reached, of an expert, is ranked by magnitude.
    """
    assert evidence.inputs is not None
    importance = magnitude(weight, evidence)
    if evidence.inputs.tokens:
        importance *= (evidence.inputs.squares / evidence.inputs.tokens).sqrt().to(weight.device)
    return importance


CRITERIA: dict[str, Criterion] = {
    "cap": Criterion(magnitude_times_importance),
    "magnitude": Criterion(magnitude),
    "random": Criterion(random),
    "wanda": Criterion(wanda, compared="row"),
}
