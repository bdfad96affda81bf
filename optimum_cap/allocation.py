"""Allocations: how many of the zeros each matrix gets."""

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from optimum_cap.activations import LayerWalk
from optimum_cap.architectures import Matrix, Site, oriented
from optimum_cap.calibration import CalibrationExample
from optimum_cap.config import CAPConfig
from optimum_cap.criteria import Evidence, wanda
from optimum_cap.interventions import evaluation_mode, float32_on_cpu
from optimum_cap.masking import shares
from optimum_cap.offload import weights

Layers = Mapping[int, list[Matrix]]
"""The matrices to prune, by decoder layer."""


def uniform(
    model: PreTrainedModel,
    sites: list[Site],
    layers: Layers,
    zeros: int,
    examples: list[CalibrationExample],
    config: CAPConfig,
) -> dict[Matrix, int]:
    """Give every matrix the same sparsity.

    Args:
        model: The model.
        sites: All its sites.
        layers: The matrices to prune.
        zeros: Number of zeros in all.
        examples: The calibration examples.
        config: Settings of the allocation.

    Returns:
        Number of zeros per matrix; they add up to `zeros`.
    """
    matrices = [matrix for own in layers.values() for matrix in own]
    sizes = [oriented(model, matrix).numel() for matrix in matrices]
    return dict(zip(matrices, shares(zeros, sizes), strict=True))


def owl(
    model: PreTrainedModel,
    sites: list[Site],
    layers: Layers,
    zeros: int,
    examples: list[CalibrationExample],
    config: CAPConfig,
) -> dict[Matrix, int]:
    """Prune layers with many outliers less (OWL, Yin et al. 2023, arXiv 2310.05175, Eq. 3).

    A weight is an outlier if its Wanda importance in the dense model exceeds `owl_outlier_ratio`
    times the mean of its layer. The shares of outliers are mapped linearly to densities whose range
    is twice `owl_bound` (https://github.com/luuyin/OWL, `lib/prune_all.py`). Unlike there, layers
    weigh by their size, so that the total is exact, and the range shrinks where a layer would get
    less than no zeros, or more than it has weights.

    Args and returns: as `uniform`.
    """
    outliers = _outlier_shares(model, sites, layers, examples, config.owl_outlier_ratio)
    sizes = torch.tensor(
        [sum(oriented(model, matrix).numel() for matrix in own) for own in layers.values()],
        dtype=torch.float64,
    )
    sparsity = zeros / float(sizes.sum())
    span = float(outliers.max() - outliers.min())
    if span == 0:
        return uniform(model, sites, layers, zeros, examples, config)
    less = (outliers - outliers.min()) / span * 2 * config.owl_bound
    less -= (less * sizes).sum() / sizes.sum()
    room = torch.where(less > 0, sparsity / less, (1 - sparsity) / -less)
    less *= min(1.0, float(room.min()))
    wanted = ((sparsity - less) * sizes).cumsum(0).round().long()
    wanted[-1] = zeros
    counts = wanted.diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()
    given: dict[Matrix, int] = {}
    for own, count in zip(layers.values(), counts, strict=True):
        parts = shares(count, [oriented(model, matrix).numel() for matrix in own])
        given.update(zip(own, parts, strict=True))
    return given


def _outlier_shares(
    model: PreTrainedModel,
    sites: list[Site],
    layers: Layers,
    examples: list[CalibrationExample],
    ratio: float,
) -> torch.Tensor:
    """Share of weights per layer that are more than `ratio` times the mean, float64 `[layers]`."""
    found = []
    with evaluation_mode(model), float32_on_cpu(model):
        walk = LayerWalk(model, sites, examples)
        for index in range(max(layers) + 1):
            own = layers.get(index, [])
            statistics = walk.statistics(index, own, advance=True)
            if not own:
                continue
            importances = [
                wanda(weights(model, matrix), Evidence(matrix.name, inputs=statistics[matrix]))
                for matrix in own
            ]
            count = sum(importance.numel() for importance in importances)
            mean = sum(float(importance.double().sum()) for importance in importances) / count
            above = sum(int((importance > ratio * mean).sum()) for importance in importances)
            found.append(above / count)
    return torch.tensor(found, dtype=torch.float64)


Allocation = Callable[
    [PreTrainedModel, list[Site], Layers, int, list[CalibrationExample], CAPConfig],
    dict[Matrix, int],
]

ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform, "owl": owl}
"""`"global"` is none of them: there the one threshold over all weights decides."""
