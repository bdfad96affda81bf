"""Checkpoints: pruning record, model card, saving, conversion and upload."""

from optimum_cap.checkpoint.conversion import (
    CheckpointSummary,
    convert_checkpoint,
    folder_of_model,
    inspect_checkpoint,
    read_record,
)
from optimum_cap.checkpoint.digests import (
    RECORD_NAME,
    check_loaded,
    check_loaded_folder,
    check_settings,
    warn_of_changed_settings,
)
from optimum_cap.checkpoint.folders import check_target
from optimum_cap.checkpoint.hub import upload
from optimum_cap.checkpoint.reading import validate_shards
from optimum_cap.checkpoint.record import (
    DenseWeights,
    MatrixSparsity,
    PruningRecord,
    SiteSensitivity,
    UnitScore,
    count_units,
    describe_answers,
    describe_recovery,
    describe_refinement,
    describe_removal,
    unit_label,
)
from optimum_cap.checkpoint.saving import (
    attach,
    name_base_of_adapters,
    names_loaded_from,
    names_now,
    save_smaller,
    set_checkpoint,
)

__all__ = [
    "RECORD_NAME",
    "CheckpointSummary",
    "DenseWeights",
    "MatrixSparsity",
    "PruningRecord",
    "SiteSensitivity",
    "UnitScore",
    "attach",
    "check_loaded",
    "check_loaded_folder",
    "check_settings",
    "check_target",
    "convert_checkpoint",
    "count_units",
    "describe_answers",
    "describe_recovery",
    "describe_refinement",
    "describe_removal",
    "folder_of_model",
    "inspect_checkpoint",
    "name_base_of_adapters",
    "names_loaded_from",
    "names_now",
    "read_record",
    "save_smaller",
    "set_checkpoint",
    "unit_label",
    "upload",
    "validate_shards",
    "warn_of_changed_settings",
]
