"""Checkpoints: pruning record, model card, saving, conversion and upload."""

from optimum_cap.checkpoint.conversion import (
    CheckpointSummary,
    convert_checkpoint,
    inspect_checkpoint,
    read_record,
)
from optimum_cap.checkpoint.folders import check_target
from optimum_cap.checkpoint.hub import upload
from optimum_cap.checkpoint.record import (
    DenseWeights,
    MatrixSparsity,
    PruningRecord,
    SiteSensitivity,
    UnitScore,
    count_units,
    unit_label,
)
from optimum_cap.checkpoint.saving import attach
from optimum_cap.checkpoint.transcoding import RECORD_NAME, validate_shards

__all__ = [
    "RECORD_NAME",
    "CheckpointSummary",
    "DenseWeights",
    "MatrixSparsity",
    "PruningRecord",
    "SiteSensitivity",
    "UnitScore",
    "attach",
    "check_target",
    "convert_checkpoint",
    "count_units",
    "inspect_checkpoint",
    "read_record",
    "unit_label",
    "upload",
    "validate_shards",
]
