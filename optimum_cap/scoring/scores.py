"""Causal scores: the increase of the loss on the calibration set when a unit is masked.

`exact_losses` measures every unit at about half the cost of one forward pass per unit
(`wavefront.py`). `plain_losses` implements the definition, one hooked forward pass per unit, and is
the reference for tests and benchmarks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers.utils import logging

from optimum_cap.models import SiteUnit

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class UnitLosses:
    """Losses of the intact model, and with each unit masked.

    Attributes:
        units: The units, each with its site.
        intact: Mean loss over the scored tokens of each example, nats, float64 `[examples]`.
        masked: The same with each unit masked, float64 `[units, examples]`; measured or estimated
            (`estimators.py`).
        standard_errors: Standard error of the mean of masked minus intact, nats, `[units]`, if it
            cannot be computed from `masked` because that is an estimate.
    """

    units: list[SiteUnit]
    intact: torch.Tensor
    masked: torch.Tensor
    standard_errors: torch.Tensor | None = None


@dataclass(frozen=True)
class CausalScores:
    """Causal score per unit, in nats per scored token; higher means more important for the task.

    Attributes:
        units: The units, each with its site.
        scores: Score of each unit (Eq. 1-2), float64 `[units]`; NaN where no masked loss is finite.
        standard_errors: Standard error of the mean paired difference over examples, `[units]`.
        nonfinite: Number of examples whose masked loss is not finite, int64 `[units]`. They are
            excluded from the score of the unit, as are their intact losses.
        intact_loss: Mean over subsets of the intact loss.
    """

    units: list[SiteUnit]
    scores: torch.Tensor
    standard_errors: torch.Tensor
    nonfinite: torch.Tensor
    intact_loss: float


def causal_scores(
    losses: UnitLosses, subsets: int = 3, aggregation: str = "median"
) -> CausalScores:
    """Reduce losses to scores (paper, Eq. 2).

    The examples, which are in random order, are split into `subsets` consecutive parts. A score is
    the median (or mean) over subsets of the mean masked loss, minus the mean over subsets of the
    mean intact loss, both over the examples whose masked loss is finite.

    Args:
        losses: Losses per unit and example.
        subsets: Number K of disjoint subsets.
        aggregation: `"median"` or `"mean"`.

    Raises:
        ValueError: An intact loss is not finite, or there are fewer examples than subsets.
    """
    if bad := int((~losses.intact.isfinite()).sum()):
        raise ValueError(
            f"the loss of the intact model is not finite on {bad} of {len(losses.intact)} "
            "calibration examples: check the weights and the dtype of the model"
        )
    if len(losses.intact) < subsets:
        raise ValueError(
            f"{len(losses.intact)} calibration examples cannot be split into {subsets} subsets"
        )
    finite = losses.masked.isfinite()
    masked = losses.masked.where(finite, torch.nan)
    parts = np.array_split(np.arange(len(losses.intact)), subsets)

    def per_part(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values[:, part].nanmean(dim=1) for part in parts], dim=1)

    per_subset = per_part(masked)
    if aggregation == "median":
        # Not torch.nanmedian, which takes the lower of two middle values.
        central = per_subset.nanquantile(0.5, dim=1)
    else:
        central = per_subset.nanmean(dim=1)
    intact = torch.stack([losses.intact[part].mean() for part in parts]).mean()
    compared = per_part(losses.intact.expand_as(masked).where(finite, torch.nan)).nanmean(dim=1)
    compared = intact.where(finite.all(dim=1), compared)

    standard_errors = losses.standard_errors
    if standard_errors is None:
        differences = masked - losses.intact
        standard_errors = (
            nanvar(differences, torch.ones_like(differences)) / finite.sum(dim=1)
        ).sqrt()
    return CausalScores(
        units=losses.units,
        scores=central - compared,
        standard_errors=standard_errors,
        nonfinite=(~finite).sum(dim=1),
        intact_loss=float(intact),
    )


def nanvar(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted variance of each row, ignoring NaNs, `[rows]`.

    With equal weights it is the sample variance. It is NaN for rows without values or with a single
    positive weight, and 0 for rows with values but no positive weight.
    """
    valid = ~values.isnan()
    weights = weights.where(valid, 0)
    total = weights.sum(dim=1)
    mean = (weights * values).nansum(dim=1) / total
    squares = (weights * (values - mean.unsqueeze(1)).square()).nansum(dim=1)
    variance = (squares / (total - weights.square().sum(dim=1) / total)).where(total > 0, 0.0)
    return variance.where(valid.any(dim=1) & ((weights > 0).sum(dim=1) != 1), torch.nan)
