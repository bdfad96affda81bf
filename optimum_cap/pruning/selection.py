"""Selects the matrices to prune."""

from transformers.utils import logging

from optimum_cap.config import CAPConfig
from optimum_cap.methods import WHOLE_HEADS
from optimum_cap.models import Matrix, ModelView, projections_left_dense, separable

_NOTABLE_SHARE = 0.02  # of the linear weights of the decoder

logger = logging.get_logger(__name__)


def matrices_to_prune(view: ModelView, config: CAPConfig) -> list[Matrix]:
    """Return the prunable matrices, without those that stay dense.

    Raises:
        ValueError: `modules_to_leave_dense` names no prunable matrix, or all of them.
    """
    leave_dense = config.modules_to_leave_dense
    matrices = view.matrices
    if config.pattern == WHOLE_HEADS:
        slices = (piece for head in view.units("heads") for piece in separable(view.model, *head))
        of_heads = {Matrix(piece.parameter) for piece in slices}
        matrices = [matrix for matrix in matrices if matrix in of_heads]
    for name in leave_dense:
        if not any(f".{name}." in f".{matrix.parameter}." for matrix in matrices):
            raise ValueError(
                f"modules_to_leave_dense names {name!r}, which is not part of the name of any "
                f"prunable matrix: use names such as {matrices[0].name}"
            )
    chosen = [
        matrix
        for matrix in matrices
        if not any(f".{name}." in f".{matrix.parameter}." for name in leave_dense)
    ]
    if not chosen:
        raise ValueError(
            f"modules_to_leave_dense {leave_dense} leaves nothing to prune: leave fewer modules "
            "dense"
        )
    return chosen


def report_unsupported(view: ModelView, matrices: list[Matrix]) -> None:
    """Log which linear weights of the decoder CAP cannot prune: as a warning if they are many.

    Args:
        view: The model.
        matrices: The matrices to prune.
    """
    left_dense = projections_left_dense(view, matrices)
    unsupported = [projection for projection in left_dense if not projection.prunable]
    if not unsupported:
        return
    weights = sum(projection.weights for projection in unsupported)
    total = sum(view.oriented(matrix).numel() for matrix in matrices)
    total += sum(projection.weights for projection in left_dense)
    names = ", ".join(f"{each.name} ({each.weights:,} weights)" for each in unsupported)
    log = logger.warning if weights / total >= _NOTABLE_SHARE else logger.info
    log(
        f"{weights / total:.1%} of the linear weights of the decoder stay dense, because CAP "
        f"cannot prune them in {type(view.model).__name__}: {names}; the sparsity is that of the "
        "other weights"
    )
