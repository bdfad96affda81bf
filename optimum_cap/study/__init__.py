"""Many recipes, sparsities and seeds side by side."""

from optimum_cap.study.report import write_report
from optimum_cap.study.study import Study, read_cells, run_study

__all__ = ["Study", "read_cells", "run_study", "write_report"]
