"""Pruning methods as functions of one matrix: masks, criteria, and solvers that update weights."""

from optimum_cap.methods.criteria import CRITERIA, HIGHEST, LOWEST, Criterion, Evidence, wanda
from optimum_cap.methods.masks import (
    SELECTIONS,
    WHOLE_HEADS,
    apply_mask_,
    keep_masks,
    kth_smallest,
    most_of_each,
    parse_pattern,
    shares,
)
from optimum_cap.methods.reconstruction import (
    ALPS_INVERSES,
    ALPS_STEPS,
    BLOCK,
    FITTING_STEPS,
    RECONSTRUCTIONS,
    corrected,
)
from optimum_cap.methods.statistics import InputStatistics

__all__ = [
    "ALPS_INVERSES",
    "ALPS_STEPS",
    "BLOCK",
    "CRITERIA",
    "FITTING_STEPS",
    "HIGHEST",
    "LOWEST",
    "RECONSTRUCTIONS",
    "SELECTIONS",
    "WHOLE_HEADS",
    "Criterion",
    "Evidence",
    "InputStatistics",
    "apply_mask_",
    "corrected",
    "keep_masks",
    "kth_smallest",
    "most_of_each",
    "parse_pattern",
    "shares",
    "wanda",
]
