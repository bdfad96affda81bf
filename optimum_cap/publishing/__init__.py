"""Publishing of pruned checkpoints: results on the model card, uploads and reports."""

from optimum_cap.publishing.push import check_base_model, push_checkpoint
from optimum_cap.publishing.report import write_html_report
from optimum_cap.publishing.results import (
    TaskResults,
    add_results,
    check_has_card,
    load_results,
)

__all__ = [
    "TaskResults",
    "add_results",
    "check_base_model",
    "check_has_card",
    "load_results",
    "push_checkpoint",
    "write_html_report",
]
