"""Converts scores of units into importances of their weights."""

from collections.abc import Callable, Iterable, Mapping

import torch

from optimum_cap.methods import HIGHEST, LOWEST
from optimum_cap.models import Matrix, Site, all_units, mixer_units

UnitKey = tuple[str, int]
"""`(name of the site, index of the unit)`."""


def scaled_importances(scores: torch.Tensor) -> torch.Tensor:
    """Map scores linearly to importances in [1, 10] over all scored units (paper, Eq. 3).

    In the paper these are the heads. If MLPs and experts are scored too, one map covers units of
    all kinds and sizes. A score is the increase of the loss without the whole unit, so units with
    more weights tend to get higher scores. Units with about as many weights as a head are most
    comparable (`mlp_unit_size`).

    A unit without a finite masked loss on any example (score NaN) breaks the model when masked, so
    it gets 10.

    Args:
        scores: Causal scores, `[units]`.

    Returns:
        Importances, float64 `[units]`; all 1 if all scores are equal.
    """
    scores = scores.double()
    finite = scores[scores.isfinite()]
    if len(finite) == 0 or finite.min() == finite.max():
        importances = torch.full_like(scores, LOWEST)
    else:
        low, high = finite.min(), finite.max()
        importances = LOWEST + (HIGHEST - LOWEST) * (scores - low) / (high - low)
    return importances.where(scores.isfinite(), HIGHEST)


def unit_importances(
    sites: Iterable[Site], scored: Mapping[UnitKey, float]
) -> dict[UnitKey, float]:
    """Return the importance of every unit: its own, or the mean of the heads of its layer.

    The paper uses this mean for MLPs (step 5) and names it as its main weakness; experts are
    treated like MLPs. A mixer without heads counts as one head. A layer that does not mix tokens
    (Nemotron-H) takes the mean of the nearest preceding layer that does, or else of the next one.

    Args:
        sites: All sites of the model.
        scored: Importances of the scored units, including all heads.
    """
    sites = list(sites)
    of_heads: dict[int, list[float]] = {}
    for site, unit in mixer_units(sites):
        of_heads.setdefault(site.layer, []).append(scored[site.name, unit.index])
    means = {layer: sum(values) / len(values) for layer, values in of_heads.items()}

    def nearest(layer: int) -> float:
        return means[min(means, key=lambda other: (other > layer, abs(other - layer)))]

    importances = {}
    for site, unit in all_units(sites):
        key = site.name, unit.index
        importances[key] = scored[key] if key in scored else nearest(site.layer)
    return importances


def region_importances(
    sites: Iterable[Site], importances: Mapping[UnitKey, float], kv_combination: str = "mean"
) -> dict[Matrix, torch.Tensor]:
    """Spread the importances of units over the rows or columns of their regions.

    Args:
        sites: All sites of the model.
        importances: Importance per unit.
        kv_combination: How a key/value row combines the importances of the units that share it:
            `"mean"` or `"max"`.

    Returns:
        For each matrix of shape `[a, b]`, a float32 tensor that broadcasts against it: `[a, 1]` or
        `[1, b]`.
    """
    combine = COMBINATIONS[kv_combination]
    pieces: dict[Matrix, dict[tuple[int, int, int], list[float]]] = {}
    for site in sites:
        for unit in site.units:
            for piece in unit.region:
                ranges = pieces.setdefault(Matrix(piece.parameter, piece.expert), {})
                shared = ranges.setdefault((piece.dim, piece.start, piece.stop), [])
                shared.append(importances[site.name, unit.index])
    spread: dict[Matrix, torch.Tensor] = {}
    for matrix, ranges in pieces.items():
        dim = next(iter(ranges))[0]
        vector = torch.empty(max(stop for _, _, stop in ranges), dtype=torch.float32)
        for (_, start, stop), values in ranges.items():
            vector[start:stop] = combine(values)
        spread[matrix] = vector.unsqueeze(1 - dim)
    return spread


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


COMBINATIONS: dict[str, Callable[[list[float]], float]] = {"mean": _mean, "max": max}
