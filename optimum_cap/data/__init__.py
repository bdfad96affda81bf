"""Calibration data: rows of a data set -> tokenized examples -> batches."""

from optimum_cap.data.batches import Batch, batches, shared_prefix
from optimum_cap.data.calibration import (
    SEPARATOR,
    CalibrationExample,
    CalibrationSet,
    build_calibration_set,
    chat_template,
    encode,
)
from optimum_cap.data.sources import (
    Conversation,
    Source,
    check_folder,
    find_data_files,
    first_file,
    load_sources,
    local_presets,
    row_digest,
)

__all__ = [
    "SEPARATOR",
    "Batch",
    "CalibrationExample",
    "CalibrationSet",
    "Conversation",
    "Source",
    "batches",
    "build_calibration_set",
    "chat_template",
    "check_folder",
    "encode",
    "find_data_files",
    "first_file",
    "load_sources",
    "local_presets",
    "row_digest",
    "shared_prefix",
]
