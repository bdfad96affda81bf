"""The dense model's own answers as calibration data, and conversations with a model."""

from optimum_cap.generation.answers import (
    AnsweredPrompt,
    AnsweredPrompts,
    answer_prompts,
    answered_calibration_set,
    first_prompts,
)
from optimum_cap.generation.chat import Chat, Reply
from optimum_cap.generation.sampling import LARGEST_BATCH
from optimum_cap.generation.traces import trace_rows

__all__ = [
    "LARGEST_BATCH",
    "AnsweredPrompt",
    "AnsweredPrompts",
    "Chat",
    "Reply",
    "answer_prompts",
    "answered_calibration_set",
    "first_prompts",
    "trace_rows",
]
