"""Allocations: how zeros are distributed over the matrices of a model.

This module lists what each allocation needs. The functions that compute them are in
`optimum_cap/pruning/allocation.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    """The properties of an allocation.

    Attributes:
        title: Text that the model card adds to the title of the criterion.
        needs_data: Whether it measures anything on calibration data.
        by_sensitivity: Whether it is computed from the sensitivities of the sites.
        per_matrix: Whether it determines the number of zeros of each matrix before pruning;
            otherwise a threshold over all weights does.
        fields: The fields of `CAPConfig` that it uses, in addition to those of the calibration
            data. They are refused where nothing uses them.
    """

    title: str = ""
    needs_data: bool = False
    by_sensitivity: bool = False
    per_matrix: bool = True
    fields: tuple[str, ...] = ()


ALLOCATIONS: dict[str, Allocation] = {
    "global": Allocation(per_matrix=False),
    "uniform": Allocation(),
    "owl": Allocation(
        " and OWL (arXiv 2310.05175)", needs_data=True, fields=("owl_outlier_ratio", "owl_bound")
    ),
    "interventional": Allocation(
        " and a sparsity per site from the measured effect of pruning it alone",
        needs_data=True,
        by_sensitivity=True,
        fields=("allocation_bound", "allocation_examples"),
    ),
    "fisher": Allocation(
        " and a sparsity per site from the estimated effect of pruning it alone",
        needs_data=True,
        by_sensitivity=True,
        fields=("allocation_bound", "allocation_examples", "answer_weight"),
    ),
}
