"""`PruningRun`: the steps of one pruning run, in the order in which `CAPPruner` calls them."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.utils import logging

from optimum_cap.checkpoint import (
    DenseWeights,
    MatrixSparsity,
    PruningRecord,
    SiteSensitivity,
    UnitScore,
)
from optimum_cap.config import CAPConfig
from optimum_cap.data import CalibrationExample, CalibrationSet
from optimum_cap.methods import ALLOCATIONS, apply_mask_, keep_masks, kth_smallest
from optimum_cap.models import Matrix, ModelView, SiteUnit, projections_left_dense
from optimum_cap.pruning.allocation import ALLOCATORS, interventional, uniform
from optimum_cap.pruning.cache import LayerStore, PruningCache
from optimum_cap.pruning.first_batch import check_first_batch
from optimum_cap.pruning.fisher import estimate_sensitivities
from optimum_cap.pruning.layer_by_layer import LayerByLayerPruning
from optimum_cap.pruning.matrix_pruner import MatrixPruner
from optimum_cap.pruning.regions import (
    UnitKey,
    region_importances,
    scaled_importances,
    unit_importances,
)
from optimum_cap.pruning.sensitivity import Sensitivity, measure_sensitivities
from optimum_cap.pruning.versions import versions
from optimum_cap.runtime import ProcessGroup
from optimum_cap.scoring import ESTIMATORS, CausalScores, UnitLosses, causal_scores, read_scores
from optimum_cap.text import public_name

logger = logging.get_logger(__name__)


class PruningRun:
    """One pruning run: its steps and their results.

    Args:
        view: The model.
        config: What to prune and how.
        matrices: The matrices to prune.
        examples: The calibration examples.
        process_group: The processes that share the measurements.

    Attributes:
        pruner: Prunes one matrix.
        scores: The causal scores; `None` before `score_units`.
        importances: The importances of the scored units.
        threshold: The global threshold, if there is one.
        tokens: Number of calibration tokens that each matrix was pruned by.
        sensitivities: The sensitivity of each site, if the allocation uses sensitivities.
        layer_store: Stores finished layers, if there is a resume folder.
    """

    def __init__(
        self,
        view: ModelView,
        config: CAPConfig,
        matrices: list[Matrix],
        examples: list[CalibrationExample],
        process_group: ProcessGroup,
    ) -> None:
        self.process_group = process_group
        self.view = view
        self.config = config
        self.matrices = matrices
        self.examples = examples
        chosen = set(matrices)
        self.layers = {
            layer: [matrix for matrix in layer_matrices if matrix in chosen]
            for layer, layer_matrices in view.matrices_by_layer.items()
        }
        self.pruner = MatrixPruner(view, config)
        self.scores: CausalScores | None = None
        self.importances: dict[UnitKey, float] = {}
        self.threshold: float | None = None
        self.tokens: dict[Matrix, int] = {}
        self.sensitivities: list[Sensitivity] = []
        self.layer_store: LayerStore | None = None

    def check_model(self, losses: UnitLosses | None) -> None:
        """Check that the model can be calibrated on its examples; see `check_first_batch`.

        Args:
            losses: The losses of the units, if already measured.
        """
        method = self.config.method
        layer_by_layer = method.layer_by_layer or ALLOCATIONS[method.allocation].needs_data
        measures = method.needs_data and losses is None and self.config.scores is None
        if layer_by_layer or measures:
            budget = self.config.memory_budget
            differentiate = method.allocation == "fisher" or method.refine > 0
            check_first_batch(self.view, self.examples, layer_by_layer, budget, differentiate)

    def score_units(self, losses: UnitLosses | None) -> None:
        """Compute the causal scores, and the importances of units and of their weights.

        Args:
            losses: The losses of the units; `None` reads the config's scores file, or measures
                them.
        """
        config = self.config
        if losses is not None:
            _check_losses(losses, self.view.units(config.scored_units), self.examples)
        elif config.scores is not None:
            losses = read_scores(config.scores).losses(self.view, self.examples, config)
        else:
            losses = ESTIMATORS[config.estimator].losses(
                self.view, self.examples, config, self.process_group
            )
        self.scores = causal_scores(losses, config.subsets, config.aggregation)
        self.importances = _importances(self.scores)
        of_units = unit_importances(self.view.sites, self.importances)
        self.pruner.regions = region_importances(self.view.sites, of_units, config.kv_combination)

    @property
    def unit_scores(self) -> list[UnitScore]:
        """The causal scores, for the record; empty if there are none."""
        return _unit_scores(self.scores, self.importances) if self.scores else []

    @property
    def intact_loss(self) -> float | None:
        """The loss of the dense model on the calibration set, if causal scores were measured."""
        return self.scores.intact_loss if self.scores else None

    def prune_below_global_threshold_(self, zeros: int) -> None:
        """Zero the least important weights of the whole model."""

        def importances() -> Iterator[torch.Tensor]:
            return (self.pruner.importance(matrix) for matrix in self.matrices)

        threshold = kth_smallest(importances, zeros)
        for matrix, keep in zip(self.matrices, keep_masks(importances(), threshold), strict=True):
            apply_mask_(self.view.writable_weights(matrix), keep)
        self.threshold = threshold.value

    def allocate(self, zeros: int) -> dict[Matrix, int]:
        """Return the number of zeros of each matrix."""
        config, method = self.config, self.config.method
        if not method.by_sensitivity:
            allocate = ALLOCATORS[method.allocation]
            return allocate(self.view, self.layers, zeros, self.examples, config)
        uniform_zeros = uniform(self.view, self.layers, zeros, self.examples, config)
        store = None
        if self._cache is not None:
            settings = self._settings(uniform_zeros)
            settings["answer_weight"] = config.method.answer_weight
            store = self._cache.sensitivities(settings)
        if method.allocation == "fisher":
            estimate = estimate_sensitivities(
                self.view,
                self.layers,
                self.examples,
                uniform_zeros,
                config.allocation_examples,
                config.seed,
                config.method.answer_weight,
                config.memory_budget,
                store,
                self.process_group,
            )
            self.sensitivities = estimate.sensitivities
            self.pruner.weight_outputs(estimate.output_weights)
        else:
            self.sensitivities = measure_sensitivities(
                self.view,
                self.layers,
                self.examples,
                lambda matrix, inputs: self.pruner.pruned(matrix, inputs, uniform_zeros[matrix]),
                config.allocation_examples,
                self.pruner.criterion.updates_weights,
                config.method.answer_weight,
                store,
                config.memory_budget,
                self.process_group,
            )
        return interventional(self.sensitivities, zeros, config.allocation_bound)

    def prune_each_matrix_(self, zeros: Mapping[Matrix, int]) -> None:
        """Zero the least important weights of each matrix."""
        for matrix, count in zeros.items():
            self.pruner.mask_(matrix, count)

    def prune_layer_by_layer_(self, zeros: Mapping[Matrix, int]) -> None:
        """Prune each layer based on the inputs it receives after pruning all layers before it."""
        if self._cache is not None:
            views = (self.view.oriented(matrix) for matrix in self.matrices)
            size = sum(view.numel() * view.element_size() for view in views)
            settings = {
                **dataclasses.asdict(self.config.method),
                **self._settings(zeros),
                "allocation_examples": self.config.allocation_examples,
                "refine_learning_rate": self.config.refine_learning_rate,
            }
            self.layer_store = self._cache.layers(settings, size)
        self.tokens = LayerByLayerPruning(
            self.view,
            self.layers,
            zeros,
            self.examples,
            self.config,
            self.pruner,
            self.layer_store,
            self.process_group,
        ).run_()

    @functools.cached_property
    def _cache(self) -> PruningCache | None:
        """The store of interrupted runs' results, which hashes the weights of the dense model."""
        folder = self.config.resume_dir
        if folder is None:
            return None
        return PruningCache(folder, self.view.model, self.examples, self.process_group)

    def _settings(self, zeros: Mapping[Matrix, int]) -> dict[str, Any]:
        """Return the settings pruned weights depend on other than method, model and data."""
        config = self.config
        return {
            "criterion": config.method.criterion,
            "pattern": config.pattern,
            "seed": config.seed,
            "kv_combination": config.kv_combination,
            "mlp_unit_size": config.mlp_unit_size,
            "importances": [[*key, value] for key, value in self.importances.items()],
            "zeros": {matrix.name: count for matrix, count in zeros.items()},
        }

    def record(self, calibration: CalibrationSet | None) -> PruningRecord:
        """Return the record of the run, after the model is pruned."""
        zeros = {matrix: int((self.view.weights(matrix) == 0).sum()) for matrix in self.matrices}
        return PruningRecord(
            config=self.config.to_dict(),
            base_model=public_name(self.view.model.name_or_path),
            base_revision=None,
            matrices=[
                MatrixSparsity(
                    matrix.name,
                    zeros[matrix],
                    self.view.oriented(matrix).numel(),
                    self.tokens.get(matrix),
                )
                for matrix in self.matrices
            ],
            scores=self.unit_scores,
            calibration=calibration.record if calibration else {},
            versions=versions(),
            threshold=self.threshold,
            intact_loss=self.intact_loss,
            sensitivities=[
                SiteSensitivity(
                    site=sensitivity.site.name,
                    kind=sensitivity.site.kind,
                    layer=sensitivity.site.layer,
                    zeros=sum(zeros[matrix] for matrix in sensitivity.matrices),
                    total=sensitivity.weights,
                    divergence=_finite(sensitivity.divergence),
                    standard_error=_finite(sensitivity.standard_error),
                )
                for sensitivity in self.sensitivities
            ],
            dense=[
                DenseWeights(projection.name, projection.weights, projection.prunable)
                for projection in projections_left_dense(self.view, self.matrices)
            ],
        )


def _check_losses(
    losses: UnitLosses, units: list[SiteUnit], examples: list[CalibrationExample]
) -> None:
    """Check that losses match the units to score and the number of examples."""
    expected, measured = (
        [(site.name, unit.channels) for site, unit in each] for each in (units, losses.units)
    )
    if measured != expected or len(losses.intact) != len(examples):
        raise ValueError(
            f"the losses are of {len(measured)} units and {len(losses.intact)} examples, but the "
            f"config scores {len(expected)} units of this model and the calibration set has "
            f"{len(examples)} examples: measure them with the same model and config"
        )


def _importances(scores: CausalScores) -> dict[UnitKey, float]:
    """Return the importances of scored units; warn about losses that are not finite."""
    for (site, unit), count in zip(scores.units, scores.nonfinite.tolist(), strict=True):
        if count:
            logger.warning(
                f"masking {'head' if site.kind == 'attention' else 'unit'} {unit.index} of "
                f"{site.name} gave a loss that is not finite on {count} examples; they do not "
                "count in its score"
            )
    importances = scaled_importances(scores.scores).tolist()
    return {
        (site.name, unit.index): importance
        for (site, unit), importance in zip(scores.units, importances, strict=True)
    }


def _unit_scores(scores: CausalScores, importances: Mapping[UnitKey, float]) -> list[UnitScore]:
    return [
        UnitScore(
            site=site.name,
            unit=unit.index,
            layer=site.layer,
            score=_finite(scores.scores[index]),
            standard_error=_finite(scores.standard_errors[index]),
            importance=importances[site.name, unit.index],
            nonfinite=int(scores.nonfinite[index]),
            kind=site.kind,
        )
        for index, (site, unit) in enumerate(scores.units)
    ]


def _finite(value: torch.Tensor | float) -> float | None:
    return float(value) if math.isfinite(value) else None
