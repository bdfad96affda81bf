"""Selects the matrices to prune."""

from optimum_cap.config import CAPConfig
from optimum_cap.methods import WHOLE_HEADS
from optimum_cap.models import Matrix, ModelView, separable


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
