"""Checkpoints: pruning record, model card, saving, conversion and upload."""

from optimum_cap.checkpoint.conversion import (
    CheckpointSummary,
    convert_checkpoint,
    file_of_checkpoint,
    folder_of_model,
    inspect_checkpoint,
    read_record,
    set_base_model,
)
from optimum_cap.checkpoint.digests import (
    RECORD_NAME,
    RESULTS_NAME,
    check_all_files,
    check_loaded,
    check_loaded_folder,
    check_settings,
    warn_of_changed_settings,
)
from optimum_cap.checkpoint.folders import atomic_folder, check_target, copy_other_files
from optimum_cap.checkpoint.hub import upload
from optimum_cap.checkpoint.model_card import (
    CARD_NAME,
    ZEROS_IN_FILES,
    parsed_card,
    plain_markdown,
    read_card,
    with_results,
)
from optimum_cap.checkpoint.pictures import heat_map, sparsity_picture
from optimum_cap.checkpoint.reading import validate_shards
from optimum_cap.checkpoint.record import (
    DenseWeights,
    MatrixSparsity,
    PruningRecord,
    SiteSensitivity,
    UnitScore,
    count_units,
    count_zeros,
    describe_answers,
    describe_recovery,
    describe_refinement,
    describe_removal,
    short_names,
    unit_label,
)
from optimum_cap.checkpoint.results_file import read_results, write_results
from optimum_cap.checkpoint.saving import (
    attach,
    name_base_of_adapters,
    names_loaded_from,
    names_now,
    save_smaller,
    set_checkpoint,
)
from optimum_cap.checkpoint.transcoding import write_json

__all__ = [
    "CARD_NAME",
    "RECORD_NAME",
    "RESULTS_NAME",
    "ZEROS_IN_FILES",
    "CheckpointSummary",
    "DenseWeights",
    "MatrixSparsity",
    "PruningRecord",
    "SiteSensitivity",
    "UnitScore",
    "atomic_folder",
    "attach",
    "check_all_files",
    "check_loaded",
    "check_loaded_folder",
    "check_settings",
    "check_target",
    "convert_checkpoint",
    "copy_other_files",
    "count_units",
    "count_zeros",
    "describe_answers",
    "describe_recovery",
    "describe_refinement",
    "describe_removal",
    "file_of_checkpoint",
    "folder_of_model",
    "heat_map",
    "inspect_checkpoint",
    "name_base_of_adapters",
    "names_loaded_from",
    "names_now",
    "parsed_card",
    "plain_markdown",
    "read_card",
    "read_record",
    "read_results",
    "save_smaller",
    "set_base_model",
    "set_checkpoint",
    "short_names",
    "sparsity_picture",
    "unit_label",
    "upload",
    "validate_shards",
    "warn_of_changed_settings",
    "with_results",
    "write_json",
    "write_results",
]
