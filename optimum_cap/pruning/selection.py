"""Which matrices and heads are pruned."""

from transformers import PreTrainedModel

from optimum_cap.config import CAPConfig
from optimum_cap.methods import WHOLE_HEADS
from optimum_cap.models import Matrix, Site, Unit, heads, prunable_matrices, separable


def matrices_to_prune(model: PreTrainedModel, sites: list[Site], config: CAPConfig) -> list[Matrix]:
    """Return the prunable matrices without those that are to stay dense."""
    leave_dense = config.modules_to_leave_dense
    matrices = prunable_matrices(sites)
    if config.pattern == WHOLE_HEADS:
        slices = (piece for job in heads(sites) for piece in separable(model, *job))
        of_heads = {Matrix(piece.parameter) for piece in slices}
        matrices = [matrix for matrix in matrices if matrix in of_heads]
    for name in leave_dense:
        if not any(f".{name}." in f".{matrix.parameter}." for matrix in matrices):
            raise ValueError(
                f"modules_to_leave_dense names {name!r}, which is no part of the name of a "
                f"prunable matrix (such as {matrices[0].name})"
            )
    kept = [
        matrix
        for matrix in matrices
        if not any(f".{name}." in f".{matrix.parameter}." for name in leave_dense)
    ]
    if not kept:
        raise ValueError(f"modules_to_leave_dense {leave_dense} leaves nothing to prune")
    return kept


def removable_heads(
    model: PreTrainedModel, sites: list[Site], matrices: list[Matrix]
) -> list[tuple[Site, Unit]]:
    """Return the heads none of whose weights is to stay dense."""
    chosen = {matrix.name for matrix in matrices}
    return [
        (site, unit)
        for site, unit in heads(sites)
        if all(piece.parameter in chosen for piece in separable(model, site, unit))
    ]


def number_of_heads_to_remove(candidates: list[tuple[Site, Unit]], sparsity: float) -> int:
    """Return how many heads to remove."""
    total = len(candidates)
    if not total:
        raise ValueError(
            "modules_to_leave_dense leaves no head whole: pattern 'heads' removes all weights of a "
            "head, so leave none of them dense but in whole layers, such as layers.0"
        )
    count = round(sparsity * total)
    if not 0 < count < total:
        raise ValueError(
            f"sparsity {sparsity} of {total} heads is {count} heads: ask for a sparsity that "
            "removes some heads and keeps some"
        )
    return count
