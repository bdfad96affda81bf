"""Allocations: how many of the zeros each matrix gets."""

from collections.abc import Callable, Mapping

import torch

from optimum_cap.config import CAPConfig
from optimum_cap.data import CalibrationExample
from optimum_cap.methods import CriterionInputs, split_proportionally, wanda
from optimum_cap.models import (
    Matrix,
    ModelView,
    evaluation_mode,
    float32_on_cpu,
)
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.sensitivity import Sensitivity

_GROWTH = 10.0  # of the logarithm of a divergence, per unit of sparsity
_SMALLEST = 1e-3  # of the median: what is less than that is hard to tell from rounding
_BISECTIONS = 60

Layers = Mapping[int, list[Matrix]]
"""The matrices to prune, by decoder layer."""


def uniform(
    view: ModelView,
    layers: Layers,
    zeros: int,
    examples: list[CalibrationExample],
    config: CAPConfig,
) -> dict[Matrix, int]:
    """Give every matrix the same sparsity.

    Args:
        view: The model.
        layers: The matrices to prune.
        zeros: Number of zeros in all.
        examples: The calibration examples.
        config: Settings of the allocation.

    Returns:
        Number of zeros per matrix; they add up to `zeros`.
    """
    matrices = [matrix for own in layers.values() for matrix in own]
    sizes = [view.oriented(matrix).numel() for matrix in matrices]
    return dict(zip(matrices, split_proportionally(zeros, sizes), strict=True))


def owl(
    view: ModelView,
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
    outliers = _outlier_shares(view, layers, examples, config)
    sizes = torch.tensor(
        [sum(view.oriented(matrix).numel() for matrix in own) for own in layers.values()],
        dtype=torch.float64,
    )
    sparsity = zeros / float(sizes.sum())
    span = float(outliers.max() - outliers.min())
    if span == 0:
        return uniform(view, layers, zeros, examples, config)
    less = (outliers - outliers.min()) / span * 2 * config.owl_bound
    less -= (less * sizes).sum() / sizes.sum()
    room = torch.where(less > 0, sparsity / less, (1 - sparsity) / -less)
    less *= min(1.0, float(room.min()))
    counts = _whole_numbers((sparsity - less) * sizes, zeros)
    given: dict[Matrix, int] = {}
    for own, count in zip(layers.values(), counts, strict=True):
        parts = split_proportionally(count, [view.oriented(matrix).numel() for matrix in own])
        given.update(zip(own, parts, strict=True))
    return given


def _outlier_shares(
    view: ModelView,
    layers: Layers,
    examples: list[CalibrationExample],
    config: CAPConfig,
) -> torch.Tensor:
    """Share of weights per layer that are outliers, float64 `[layers]`."""
    found = []
    with evaluation_mode(view.model), float32_on_cpu(view.model):
        walk = LayerwisePass(view, examples, memory_budget=config.memory_budget)
        for index in range(max(layers) + 1):
            own = layers.get(index, [])
            statistics = walk.statistics(index, own, advance=True)
            if not own:
                continue
            importances = [
                wanda(
                    view.weights(matrix),
                    CriterionInputs(matrix.name, statistics=statistics[matrix]),
                )
                for matrix in own
            ]
            count = sum(importance.numel() for importance in importances)
            mean = sum(float(importance.double().sum()) for importance in importances) / count
            above = sum(
                int((importance > config.owl_outlier_ratio * mean).sum())
                for importance in importances
            )
            found.append(above / count)
    return torch.tensor(found, dtype=torch.float64)


def interventional(found: list[Sensitivity], zeros: int, bound: float) -> dict[Matrix, int]:
    """Move sparsity from sites whose pruning changes the predictions to sites where it does not.

    The divergence of a site pruned alone grows about exponentially with its sparsity (measured on
    the models of `docs/quality.md`: twofold for 0.07). Then the sum of the divergences is least
    where what one more zero costs is the same everywhere: a site whose divergence per weight is
    e times the others' gets a sparsity that is lower by 1 / `_GROWTH`. That sites interact, and
    that measurements are noisy, is why no site is moved by more than `bound`.

    A site that breaks the model when it is pruned (its divergence is not finite) counts as the one
    with the largest divergence per weight. Where no site shows any divergence, all others get the
    same sparsity.

    Args:
        found: The sensitivities of all sites that are to be pruned.
        zeros: Number of zeros in all.
        bound: The most that the sparsity of a site may differ from that of the whole; near 0 and 1
            less, so that no site is left dense or emptied.

    Returns:
        Number of zeros per matrix; they add up to `zeros`. Matrices of a site have its sparsity.
    """
    sizes = torch.tensor([sensitivity.weights for sensitivity in found], dtype=torch.float64)
    divergences = torch.tensor(
        [sensitivity.divergence for sensitivity in found], dtype=torch.float64
    )
    sparsity = zeros / float(sizes.sum())
    finite = divergences.isfinite()
    positive = divergences[finite & (divergences > 0)]
    if len(positive):
        least = float(positive.median()) * _SMALLEST
        per_weight = divergences.clamp(min=least) / sizes
        cost = per_weight.where(finite, per_weight[finite].max()).log() / _GROWTH
    else:
        cost = (~finite).double()
    low, high = sparsity - min(bound, sparsity / 2), sparsity + min(bound, (1 - sparsity) / 2)

    def moved(level: float) -> torch.Tensor:
        return (level - cost).clamp(low, high)

    # The total rises with the level: bisection.
    below, above = low + float(cost.min()), high + float(cost.max())
    for _ in range(_BISECTIONS):
        level = (below + above) / 2
        if float((moved(level) * sizes).sum()) < zeros:
            below = level
        else:
            above = level
    counts = _whole_numbers(moved(above) * sizes, zeros)
    given: dict[Matrix, int] = {}
    for sensitivity, count in zip(found, counts, strict=True):
        parts = split_proportionally(count, list(sensitivity.sizes))
        given.update(zip(sensitivity.matrices, parts, strict=True))
    return given


def _whole_numbers(wanted: torch.Tensor, total: int) -> list[int]:
    """Round numbers that add up to about `total` so that they do exactly."""
    sums = wanted.cumsum(0).round().long()
    sums[-1] = total
    return sums.diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()


Allocation = Callable[
    [ModelView, Layers, int, list[CalibrationExample], CAPConfig], dict[Matrix, int]
]

ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform, "owl": owl}
"""Neither `"global"`, where one threshold over all weights decides, nor `"interventional"`, which
needs to know how matrices are pruned."""
