"""Accuracy and perplexity of models, and paired comparisons of two models."""

from optimum_cap.evaluation.comparison import (
    COLUMNS,
    MetricComparison,
    compare,
    comparison_table,
)
from optimum_cap.evaluation.results import (
    LAYOUT,
    AccuracyResult,
    ChoiceResult,
    Evaluation,
    HarnessResult,
    LossResult,
    PerplexityResult,
    Result,
    Transcript,
    mean_and_interval,
    wilson_interval,
)
from optimum_cap.evaluation.run import TaskData, check_counts, evaluate, load_task_data
from optimum_cap.evaluation.samples import check_sample_log
from optimum_cap.evaluation.tasks import (
    DEFAULT_TASKS,
    HARNESS_PREFIX,
    LOSS_PREFIX,
    TASKS,
    TaskItems,
    extract_marked,
    extract_of,
    resolve_tasks,
    result_name,
)

__all__ = [
    "COLUMNS",
    "DEFAULT_TASKS",
    "HARNESS_PREFIX",
    "LAYOUT",
    "LOSS_PREFIX",
    "TASKS",
    "AccuracyResult",
    "ChoiceResult",
    "Evaluation",
    "HarnessResult",
    "LossResult",
    "MetricComparison",
    "PerplexityResult",
    "Result",
    "TaskData",
    "TaskItems",
    "Transcript",
    "check_counts",
    "check_sample_log",
    "compare",
    "comparison_table",
    "evaluate",
    "extract_marked",
    "extract_of",
    "load_task_data",
    "mean_and_interval",
    "resolve_tasks",
    "result_name",
    "wilson_interval",
]
