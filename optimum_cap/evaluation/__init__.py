"""Accuracy and perplexity of models, and paired comparisons of two models."""

from optimum_cap.evaluation.comparison import comparison_table
from optimum_cap.evaluation.results import (
    AccuracyResult,
    Evaluation,
    LossResult,
    mean_and_interval,
    wilson_interval,
)
from optimum_cap.evaluation.run import TaskData, check_counts, evaluate, load_task_data
from optimum_cap.evaluation.tasks import DEFAULT_TASKS, TASKS, extract_marked, resolve_tasks

__all__ = [
    "DEFAULT_TASKS",
    "TASKS",
    "AccuracyResult",
    "Evaluation",
    "LossResult",
    "TaskData",
    "check_counts",
    "comparison_table",
    "evaluate",
    "extract_marked",
    "load_task_data",
    "mean_and_interval",
    "resolve_tasks",
    "wilson_interval",
]
