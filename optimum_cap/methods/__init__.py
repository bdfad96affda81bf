"""Pruning methods for single matrices: masks, criteria, and solvers that update weights."""

from optimum_cap.methods.allocations import ALLOCATIONS
from optimum_cap.methods.columns import COLUMN_ROUNDS, remove_columns
from optimum_cap.methods.criteria import (
    CRITERIA,
    HIGHEST,
    LOWEST,
    Criterion,
    CriterionInputs,
    wanda,
)
from optimum_cap.methods.masks import (
    REMOVED_PARTS,
    SELECTIONS,
    SMALLER_PATTERNS,
    apply_mask_,
    keep_masks,
    kth_smallest,
    n_of_m_mask,
    parse_pattern,
    split_proportionally,
)
from optimum_cap.methods.reconstruction import (
    ALPS_INVERSES,
    ALPS_STEPS,
    BLOCK,
    FITTING_STEPS,
    correct_toward_dense,
)
from optimum_cap.methods.rounding import RoundedMatrix, round_columns
from optimum_cap.methods.statistics import InputStatistics

__all__ = [
    "ALLOCATIONS",
    "ALPS_INVERSES",
    "ALPS_STEPS",
    "BLOCK",
    "COLUMN_ROUNDS",
    "CRITERIA",
    "FITTING_STEPS",
    "HIGHEST",
    "LOWEST",
    "REMOVED_PARTS",
    "SELECTIONS",
    "SMALLER_PATTERNS",
    "Criterion",
    "CriterionInputs",
    "InputStatistics",
    "RoundedMatrix",
    "apply_mask_",
    "correct_toward_dense",
    "keep_masks",
    "kth_smallest",
    "n_of_m_mask",
    "parse_pattern",
    "remove_columns",
    "round_columns",
    "split_proportionally",
    "wanda",
]
