"""Calibration data: rows of a data set -> tokenized examples -> batches."""

from optimum_cap.data.batches import Batch, batches, shared_prefix
from optimum_cap.data.calibration import (
    CalibrationExample,
    CalibrationSet,
    build_calibration_set,
    describe_example,
)
from optimum_cap.data.rendering import RenderingCheck, encode, render_prompt
from optimum_cap.data.sources import (
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
    "Batch",
    "CalibrationExample",
    "CalibrationSet",
    "Conversation",
    "RenderingCheck",
    "Source",
    "batches",
    "build_calibration_set",
    "check_folder",
    "check_token_ids",
    "describe_example",
    "encode",
    "find_data_files",
    "first_file",
    "load_sources",
    "load_tokenizer",
    "local_presets",
    "multiple_choice_parts",
    "render_prompt",
    "row_digest",
    "shared_prefix",
    "usable_tokenizer",
]
