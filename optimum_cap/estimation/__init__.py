"""Estimates of the cost of scoring, pruning and evaluating a model."""

from optimum_cap.estimation.hardware import device_name
from optimum_cap.estimation.run import Estimate, StudyHours, estimate, lengths_of, study_hours

__all__ = ["Estimate", "StudyHours", "device_name", "estimate", "lengths_of", "study_hours"]
