"""Removal of whole attention heads (`pattern="heads"`)."""

from collections.abc import Mapping
from itertools import chain

from optimum_cap.methods import apply_mask_
from optimum_cap.models import Matrix, ModelView, SiteUnit, WeightSlice
from optimum_cap.pruning.matrix_pruner import MatrixPruner
from optimum_cap.pruning.regions import UnitKey, region_importances


def removable_heads(view: ModelView, matrices: list[Matrix]) -> list[SiteUnit]:
    """Return the heads all of whose weights may be pruned; those of several layers only once."""
    chosen = {matrix.name for matrix in matrices}
    removable = {
        head.unit.separable: head
        for head in reversed(view.heads)
        if all(piece.parameter in chosen for piece in head.unit.separable)
    }
    return list(reversed(removable.values()))


def number_of_heads_to_remove(candidates: list[SiteUnit], sparsity: float) -> int:
    """Return how many heads to remove.

    Raises:
        ValueError: There is no removable head, or the sparsity rounds to none or all of them.
    """
    total = len(candidates)
    if not total:
        raise ValueError(
            "modules_to_leave_dense leaves a part of every head dense, but pattern 'heads' removes "
            "whole heads: leave whole layers dense, such as layers.0"
        )
    count = round(sparsity * total)
    if not 0 < count < total:
        raise ValueError(
            f"sparsity {sparsity} of {total} heads is {count} heads: choose a sparsity that "
            "removes some heads and keeps some"
        )
    return count


def remove_heads_(
    view: ModelView,
    matrices: list[Matrix],
    sparsity: float,
    pruner: MatrixPruner,
    scored: Mapping[UnitKey, float],
) -> None:
    """Zero the weights that belong only to the least important heads.

    Args:
        view: The model, which is changed.
        matrices: The matrices that may be changed.
        sparsity: Fraction of the removable heads to remove.
        pruner: Ranks weights; heads are ranked by the mean importance of their weights.
        scored: Importances of heads from causal scores; if not empty, they rank the heads instead.
    """
    candidates = removable_heads(view, matrices)
    count = number_of_heads_to_remove(candidates, sparsity)
    if scored:
        of_regions: dict[tuple[WeightSlice, ...], list[float]] = {}
        for site, unit in view.heads:
            of_regions.setdefault(unit.separable, []).append(scored[site.name, unit.index])
        of_candidates = [of_regions[unit.separable] for _, unit in candidates]
        ranks = [sum(scores) / len(scores) for scores in of_candidates]
    else:
        ranks = _mean_importances(view, matrices, pruner, candidates)
    order = sorted(range(len(candidates)), key=ranks.__getitem__)
    removed = {candidates[index].unit.separable for index in order[:count]}
    is_kept = {
        (site.name, unit.index): float(unit.separable not in removed) for site, unit in view.heads
    }
    attention = [site for site in view.sites if site.kind == "attention"]
    # A key/value head is removed only together with all query heads that share it.
    regions = region_importances(attention, is_kept, "max")
    for matrix in matrices:
        keep = view.in_orientation(matrix, regions[matrix]).bool()
        apply_mask_(view.writable_weights(matrix), keep)


def _mean_importances(
    view: ModelView, matrices: list[Matrix], pruner: MatrixPruner, heads: list[SiteUnit]
) -> list[float]:
    """Return the mean importance of the weights of each head."""
    regions = [unit.separable for _, unit in heads]
    pieces: dict[str, set[WeightSlice]] = {}
    for piece in chain.from_iterable(regions):
        pieces.setdefault(piece.parameter, set()).add(piece)
    sums: dict[WeightSlice, float] = {}
    sizes: dict[WeightSlice, int] = {}
    for matrix in matrices:
        importance = view.in_orientation(matrix, pruner.importance(matrix))
        for piece in pieces.get(matrix.parameter, ()):
            values = piece.of(importance)
            sums[piece], sizes[piece] = float(values.double().sum()), values.numel()
    return [
        sum(sums[piece] for piece in region) / sum(sizes[piece] for piece in region)
        for region in regions
    ]
