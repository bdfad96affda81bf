"""Calibration data: from rows of a data set to tokenized examples to batches."""

from optimum_cap.data.batches import Batch, batches, shared_prefix
from optimum_cap.data.calibration import (
    CalibrationExample,
    CalibrationSet,
    Part,
    build_calibration_set,
    describe_example,
    mixed_set,
)
from optimum_cap.data.images import load_tokenizer_of
from optimum_cap.data.prompts import Prompt, PromptDraw, PromptSource, draw_prompts, has_prompts
from optimum_cap.data.rendering import RenderingCheck, encode, render_prompt
from optimum_cap.data.sources import (
    FINISHED,
    PRESETS,
    ROW_DIGEST,
    Conversation,
    Source,
    check_folder,
    find_data_files,
    first_file,
    load_sources,
    local_presets,
    multiple_choice_parts,
    row_digest,
)
from optimum_cap.data.tokenizers import check_token_ids, load_tokenizer, usable_tokenizer

__all__ = [
    "FINISHED",
    "PRESETS",
    "ROW_DIGEST",
    "Batch",
    "CalibrationExample",
    "CalibrationSet",
    "Conversation",
    "Part",
    "Prompt",
    "PromptDraw",
    "PromptSource",
    "RenderingCheck",
    "Source",
    "batches",
    "build_calibration_set",
    "check_folder",
    "check_token_ids",
    "describe_example",
    "draw_prompts",
    "encode",
    "find_data_files",
    "first_file",
    "has_prompts",
    "load_sources",
    "load_tokenizer",
    "load_tokenizer_of",
    "local_presets",
    "mixed_set",
    "multiple_choice_parts",
    "render_prompt",
    "row_digest",
    "shared_prefix",
    "usable_tokenizer",
]
