"""Pruning: sensitivities, allocation, and the steps that change weights."""

from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.cache import LayerStore
from optimum_cap.pruning.compaction import CompactedParts, Compaction, compact
from optimum_cap.pruning.first_batch import check_first_batch
from optimum_cap.pruning.fisher import examples_to_estimate
from optimum_cap.pruning.layer_by_layer import LayerByLayerPruning
from optimum_cap.pruning.matrix_pruner import MatrixPruner
from optimum_cap.pruning.part_ranking import (
    CANDIDATES,
    COMPARED_BYTES,
    COMPARED_TOKENS,
    MEASURED_EXAMPLES,
    MEASURED_EXAMPLES_FOR_LAYERS,
    MOST_ROUNDS,
)
from optimum_cap.pruning.refinement import EXAMPLES_PER_STEP, LEFT_OUT
from optimum_cap.pruning.removal import PartRemoval, removal_record
from optimum_cap.pruning.run import PruningRun
from optimum_cap.pruning.selection import matrices_to_prune, report_unsupported
from optimum_cap.pruning.sensitivity import examples_to_measure
from optimum_cap.pruning.structured import StructuredRemoval

__all__ = [
    "CANDIDATES",
    "COMPARED_BYTES",
    "COMPARED_TOKENS",
    "EXAMPLES_PER_STEP",
    "LEFT_OUT",
    "MEASURED_EXAMPLES",
    "MEASURED_EXAMPLES_FOR_LAYERS",
    "MOST_ROUNDS",
    "CompactedParts",
    "Compaction",
    "LayerByLayerPruning",
    "LayerStore",
    "LayerwisePass",
    "MatrixPruner",
    "PartRemoval",
    "PruningRun",
    "StructuredRemoval",
    "check_first_batch",
    "compact",
    "examples_to_estimate",
    "examples_to_measure",
    "matrices_to_prune",
    "removal_record",
    "report_unsupported",
]
