"""Allocations: how many zeros each matrix gets."""

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

_GROWTH = 10.0  # growth of the log divergence per unit of sparsity
_SMALLEST = 1e-3  # of the median; smaller divergences are hard to distinguish from rounding
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
    matrices = [matrix for layer_matrices in layers.values() for matrix in layer_matrices]
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
    times the mean of its layer. The outlier shares are mapped linearly to densities whose range is
    twice `owl_bound` (https://github.com/luuyin/OWL, `lib/prune_all.py`). Unlike there, layers are
    weighted by their size, so that the total is exact, and the range shrinks if the sparsity of a
    layer would otherwise fall below 0 or exceed 1.

    Args and returns: as for `uniform`.
    """
    layers = {index: own for index, own in layers.items() if own}  # other layers stay dense
    outliers = _outlier_shares(view, layers, examples, config)
    sizes = torch.tensor(
        [
            sum(view.oriented(matrix).numel() for matrix in layer_matrices)
            for layer_matrices in layers.values()
        ],
        dtype=torch.float64,
    )
    sparsity = zeros / float(sizes.sum())
    span = float(outliers.max() - outliers.min())
    if span == 0:
        return uniform(view, layers, zeros, examples, config)
    reduction = (outliers - outliers.min()) / span * 2 * config.owl_bound
    reduction -= (reduction * sizes).sum() / sizes.sum()
    largest_factors = torch.where(reduction > 0, sparsity / reduction, (1 - sparsity) / -reduction)
    reduction *= min(1.0, float(largest_factors.min()))
    counts = _whole_numbers((sparsity - reduction) * sizes, zeros)
    zeros_per_matrix: dict[Matrix, int] = {}
    for layer_matrices, count in zip(layers.values(), counts, strict=True):
        matrix_sizes = [view.oriented(matrix).numel() for matrix in layer_matrices]
        parts = split_proportionally(count, matrix_sizes)
        zeros_per_matrix.update(zip(layer_matrices, parts, strict=True))
    return zeros_per_matrix


def _outlier_shares(
    view: ModelView,
    layers: Layers,
    examples: list[CalibrationExample],
    config: CAPConfig,
) -> torch.Tensor:
    """Return the share of weights that are outliers in each layer, float64 `[layers]`."""
    shares = []
    with evaluation_mode(view.model), float32_on_cpu(view.model):
        layerwise = LayerwisePass(view, examples, memory_budget=config.memory_budget)
        for index in range(max(layers) + 1):
            layer_matrices = layers.get(index, [])
            statistics = layerwise.statistics(index, layer_matrices, advance=True)
            if not layer_matrices:
                continue
            importances = [
                wanda(
                    view.weights(matrix),
                    CriterionInputs(matrix.name, statistics=statistics[matrix]),
                )
                for matrix in layer_matrices
            ]
            count = sum(importance.numel() for importance in importances)
            mean = sum(float(importance.double().sum()) for importance in importances) / count
            outliers = sum(
                int((importance > config.owl_outlier_ratio * mean).sum())
                for importance in importances
            )
            shares.append(outliers / count)
    return torch.tensor(shares, dtype=torch.float64)


def interventional(sensitivities: list[Sensitivity], zeros: int, bound: float) -> dict[Matrix, int]:
    """Move sparsity from sites whose pruning changes the predictions to other sites.

    The divergence of a site pruned alone grows about exponentially with its sparsity (it doubles
    every 0.07 on the models of `docs/quality.md`). The sum of the divergences is then minimal when
    one more zero costs the same everywhere: a site whose divergence per weight is e times that of
    the others gets a sparsity lower by 1 / `_GROWTH`. Because sites interact and measurements are
    noisy, `bound` limits how far the sparsity of a site moves.

    A site that breaks the model when pruned (its divergence is not finite) is treated as if it had
    the largest finite divergence per weight. If no site has a positive divergence, all other sites
    get the same sparsity.

    Args:
        sensitivities: The sensitivities of all sites to prune.
        zeros: Number of zeros in all.
        bound: Largest difference between the sparsity of a site and the overall sparsity; smaller
            near 0 and 1, so that no site stays dense or becomes empty.

    Returns:
        Number of zeros per matrix; they add up to `zeros`. Matrices of a site have its sparsity.
    """
    sizes = torch.tensor(
        [sensitivity.weights for sensitivity in sensitivities], dtype=torch.float64
    )
    divergences = torch.tensor(
        [sensitivity.divergence for sensitivity in sensitivities], dtype=torch.float64
    )
    sparsity = zeros / float(sizes.sum())
    finite = divergences.isfinite()
    positive = divergences[finite & (divergences > 0)]
    if len(positive):
        smallest = float(positive.median()) * _SMALLEST
        per_weight = divergences.clamp(min=smallest) / sizes
        cost = per_weight.where(finite, per_weight[finite].max()).log() / _GROWTH
    else:
        cost = (~finite).double()
    low, high = sparsity - min(bound, sparsity / 2), sparsity + min(bound, (1 - sparsity) / 2)

    def sparsities(level: float) -> torch.Tensor:
        return (level - cost).clamp(low, high)

    # The total increases with the level, so bisection finds the level.
    below, above = low + float(cost.min()), high + float(cost.max())
    for _ in range(_BISECTIONS):
        level = (below + above) / 2
        if float((sparsities(level) * sizes).sum()) < zeros:
            below = level
        else:
            above = level
    counts = _whole_numbers(sparsities(above) * sizes, zeros)
    zeros_per_matrix: dict[Matrix, int] = {}
    for sensitivity, count in zip(sensitivities, counts, strict=True):
        parts = split_proportionally(count, list(sensitivity.sizes))
        zeros_per_matrix.update(zip(sensitivity.matrices, parts, strict=True))
    return zeros_per_matrix


def _whole_numbers(numbers: torch.Tensor, total: int) -> list[int]:
    """Round numbers that add up to about `total` so that they add up to it exactly."""
    sums = numbers.cumsum(0).round().long()
    sums[-1] = total
    return sums.diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()


Allocator = Callable[
    [ModelView, Layers, int, list[CalibrationExample], CAPConfig], dict[Matrix, int]
]

ALLOCATORS: dict[str, Allocator] = {"uniform": uniform, "owl": owl}
"""The allocations that need only the dense model and the data.

`"global"` has no entry, because it uses one threshold over all weights; neither have
`"interventional"` and `"fisher"`, which need sensitivities.
"""
