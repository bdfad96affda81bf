"""Rounds a pruned model to 4 bits layer by layer, calibrated on the inputs each layer then gets."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.config import CAPConfig
from optimum_cap.data import build_calibration_set
from optimum_cap.methods import InputStatistics, RoundedMatrix, round_columns
from optimum_cap.models import Matrix, ModelView, has_lm_head, longest_sequence
from optimum_cap.pruning import LayerByLayerPruning, MatrixPruner, check_first_batch
from optimum_cap.quantization.schemes import GROUPS

logger = logging.get_logger(__name__)

_CALIBRATION_FIELDS = (
    "dataset",
    "num_samples",
    "max_length",
    "scored_tokens",
    "seed",
    "memory_budget",
)


class MatrixRounder(MatrixPruner):
    """Rounds matrices one at a time; layer-by-layer pruning uses it like its superclass.

    Args:
        view: The model.
        config: Defines the calibration set.
        group: Number of inputs that share a scale.

    Attributes:
        rounded: The integers and scales of the rounded matrices, by name.
    """

    activity = "Rounding"

    def __init__(self, view: ModelView, config: CAPConfig, group: int) -> None:
        super().__init__(view, config)
        self.rounded: dict[str, RoundedMatrix] = {}
        self._model_view = view
        self._group = group
        self._dtype = view.model.dtype  # on CPUs, the weights are float32 during the passes

    def pruned(self, matrix: Matrix, statistics: InputStatistics, zeros: int) -> torch.Tensor:
        """Return the rounded weights of a matrix, `[out, in]`, without changing the matrix."""
        weight = self._model_view.weights(matrix)
        rounded = round_columns(weight, statistics, self._group, self._dtype, matrix.name)
        self.rounded[matrix.name] = RoundedMatrix(rounded.codes.cpu(), rounded.scales.cpu())
        return rounded.weight


def round_model_(
    model: PreTrainedModel, tokenizer: Any, calibration: CAPConfig
) -> dict[str, RoundedMatrix]:
    """Round the matrices of the decoder layers to 4 bits, in place; zeros stay zeros.

    Args:
        model: The pruned model.
        tokenizer: Its tokenizer or processor.
        calibration: The config it was pruned with; its data set, examples and tokens are used.

    Returns:
        The integers and scales of each rounded matrix, by parameter name.

    Raises:
        ValueError: No matrix can be rounded, or the calibration set cannot be built.
    """
    view = ModelView.of(model)
    layers = {
        index: [matrix for matrix in matrices if _can_round(view, matrix)]
        for index, matrices in view.matrices_by_layer.items()
    }
    chosen = [matrix for matrices in layers.values() for matrix in matrices]
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no linear layers whose inputs divide into groups of "
            f"{GROUPS[-1]}, so it cannot be rounded to 4 bits: choose another scheme"
        )
    if left := [matrix.name for matrix in view.matrices if matrix not in chosen]:
        logger.warning(
            f"{len(left)} of {len(view.matrices)} matrices are not rounded, such as {left[0]}: "
            f"they are no linear layers of their own, or their inputs do not divide into groups of "
            f"{GROUPS[-1]}"
        )
    widths = [view.oriented(matrix).shape[1] for matrix in chosen]
    group = next(size for size in GROUPS if all(width % size == 0 for width in widths))
    config = CAPConfig(
        sparsity=0.5,  # nothing is pruned
        recipe="sparsegpt",
        **{field: getattr(calibration, field) for field in _CALIBRATION_FIELDS},
    )
    examples = build_calibration_set(
        config, tokenizer, max_length=longest_sequence(model), unscored=not has_lm_head(model)
    ).examples
    check_first_batch(view, examples, True, config.memory_budget)
    rounder = MatrixRounder(view, config, group)
    LayerByLayerPruning(
        view, layers, dict.fromkeys(chosen, 0), examples, config, rounder, store=None
    ).run_()
    return rounder.rounded


def _can_round(view: ModelView, matrix: Matrix) -> bool:
    """Return whether a matrix is the weight of a linear layer whose inputs form whole groups."""
    owner, _, attribute = matrix.name.rpartition(".")
    return (
        matrix.expert is None
        and attribute == "weight"
        and type(view.model.get_submodule(owner)) is nn.Linear
        and view.oriented(matrix).shape[1] % GROUPS[-1] == 0
        and matrix not in view.layers_of_shared
    )
