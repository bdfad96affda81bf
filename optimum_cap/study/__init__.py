"""Studies: comparisons of recipes over models, sparsities, calibration sets and seeds."""

from optimum_cap.study.report import write_report
from optimum_cap.study.study import Study, read_cells, run_study

__all__ = ["Study", "read_cells", "run_study", "write_report"]
