"""`MatrixPruner`: prunes one matrix with a criterion and a pattern."""

from collections.abc import Mapping

import torch

from optimum_cap.config import CAPConfig
from optimum_cap.methods import (
    CRITERIA,
    SELECTIONS,
    CriterionInputs,
    InputStatistics,
    apply_mask_,
    correct_toward_dense,
    n_of_m_mask,
    parse_pattern,
)
from optimum_cap.models import Matrix, ModelView

_RELATIVE_WEIGHTS = (1e-4, 1e4)  # bounds of the weights of outputs, relative to their mean
_SCALE_EXPONENT = 0.25


class MatrixPruner:
    """Prunes matrices of a model one at a time, with the criterion and the pattern of a config.

    Args:
        view: The model.
        config: Defines the criterion, the pattern and the seed.

    Attributes:
        activity: Name of the activity, for a progress bar.
        regions: Importance of the units of a matrix's weights, broadcastable to `[out, in]`, for
            criteria that need causal scores.
    """

    activity = "Pruning"

    def __init__(self, view: ModelView, config: CAPConfig) -> None:
        self.criterion = CRITERIA[config.method.criterion]
        self.regions: Mapping[Matrix, torch.Tensor] = {}
        self._view = view
        self._pattern = parse_pattern(config.pattern)
        self._seed = config.seed
        self._row_scales: dict[Matrix, torch.Tensor] = {}

    def weight_outputs(self, output_weights: Mapping[Matrix, torch.Tensor]) -> None:
        """Make solvers take into account the weights of output errors when ranking weights.

        Solvers fit each row of a matrix separately, so this only changes which weights are pruned.

        Args:
            output_weights: Weight of a squared error of each output, `[out]`; only ratios matter.
                The scale of a row is the fourth root, not the square root, because the weights are
                estimated from few examples and for a model that is still dense.
        """
        for matrix, weights in output_weights.items():
            mean = float(weights.mean())
            if mean > 0:
                relative = (weights / mean).clamp(*_RELATIVE_WEIGHTS)
                self._row_scales[matrix] = relative.pow(_SCALE_EXPONENT).unsqueeze(1)

    def importance(self, matrix: Matrix, statistics: InputStatistics | None = None) -> torch.Tensor:
        """Return the importance of each weight, float32 `[out, in]`; higher means keep."""
        assert self.criterion.importance is not None
        regions = self.regions.get(matrix)
        if regions is not None:
            regions = self._view.in_orientation(matrix, regions)
        inputs = CriterionInputs(matrix.name, self._seed, regions, statistics)
        return self.criterion.importance(self._view.weights(matrix), inputs)

    def pruned(self, matrix: Matrix, statistics: InputStatistics, zeros: int) -> torch.Tensor:
        """Return the pruned weights of a matrix, `[out, in]`, without changing the matrix."""
        weight = self._view.weights(matrix)
        solve = self.criterion.solve
        if solve is None:
            keep = self._keep_mask(self.importance(matrix, statistics), zeros)
            return weight.masked_fill(~keep.to(weight.device), 0)
        if statistics.output_error_moment is not None:
            weight = correct_toward_dense(weight, statistics, matrix.name)
        scales = self._row_scales.get(matrix)
        if scales is None or self._pattern is not None:
            return solve(weight, statistics, zeros, self._pattern, matrix.name)
        scales = scales.to(weight.device)
        return solve(weight.float() * scales, statistics, zeros, None, matrix.name).div_(scales)

    def mask_(self, matrix: Matrix, zeros: int) -> None:
        """Zero the least important weights of a matrix, in place."""
        keep = self._keep_mask(self.importance(matrix), zeros)
        apply_mask_(self._view.writable_weights(matrix), keep)

    def _keep_mask(self, importance: torch.Tensor, zeros: int) -> torch.Tensor:
        if self._pattern is None:
            return SELECTIONS[self.criterion.compared](importance, zeros)
        return n_of_m_mask(importance, *self._pattern)
