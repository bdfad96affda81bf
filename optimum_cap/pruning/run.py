"""One run of the pruner: what is known so far, and the steps that change the weights."""

import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.checkpoint import MatrixSparsity, PruningRecord, SiteSensitivity, UnitScore
from optimum_cap.config import CAPConfig
from optimum_cap.data import CalibrationExample, CalibrationSet
from optimum_cap.methods import (
    CRITERIA,
    SELECTIONS,
    Criterion,
    CriterionInputs,
    InputStatistics,
    apply_mask_,
    correct_toward_dense,
    keep_masks,
    kth_smallest,
    n_of_m_mask,
    parse_pattern,
)
from optimum_cap.models import (
    Matrix,
    Site,
    Unit,
    WeightSlice,
    decoder_layers,
    evaluation_mode,
    float32_on_cpu,
    heads,
    is_transposed,
    matrices_by_layer,
    oriented,
    separable,
    stages_by_layer,
    weights,
    writable_weights,
)
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.allocation import ALLOCATIONS, interventional
from optimum_cap.pruning.cache import LayerStore, PruningCache, SensitivityStore
from optimum_cap.pruning.dense_reference import DenseReferencePass
from optimum_cap.pruning.fisher import estimate_sensitivities
from optimum_cap.pruning.regions import (
    UnitKey,
    region_importances,
    scaled_importances,
    unit_importances,
)
from optimum_cap.pruning.selection import number_of_heads_to_remove, removable_heads
from optimum_cap.pruning.sensitivity import Sensitivity, measure_sensitivities
from optimum_cap.runtime import ProcessGroup
from optimum_cap.scoring import (
    ESTIMATORS,
    CausalScores,
    UnitLosses,
    causal_scores,
    read_scores,
    scored_units,
)

logger = logging.get_logger(__name__)


_VERSIONED = ("optimum-cap", "safetensors", "tokenizers", "torch", "transformers")


class PruningRun:
    """One run of the pruner: what is known so far, and the steps that change the weights."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: CAPConfig,
        sites: list[Site],
        matrices: list[Matrix],
        examples: list[CalibrationExample],
    ) -> None:
        self.model = model
        self.config = config
        self.sites = sites
        self.matrices = matrices
        self.examples = examples
        chosen = set(matrices)
        self.layers = {
            layer: [matrix for matrix in own if matrix in chosen]
            for layer, own in matrices_by_layer(sites).items()
        }
        self.pattern = parse_pattern(config.pattern)
        self.scores: CausalScores | None = None
        self.importances: dict[UnitKey, float] = {}  # of the scored units
        self.threshold: float | None = None
        self.tokens: dict[Matrix, int] = {}
        self.sensitivities: list[Sensitivity] = []
        self.layer_store: LayerStore | None = None
        self._regions: dict[Matrix, torch.Tensor] = {}

    def score_units(self, losses: UnitLosses | None) -> None:
        """Measure the causal scores, and spread the importances of the units over the weights."""
        config = self.config
        if losses is not None:
            _check_losses(losses, scored_units(self.sites, config.scored_units), self.examples)
        elif config.scores is not None:
            saved = read_scores(config.scores)
            losses = saved.losses(self.model, self.sites, self.examples, config)
        else:
            estimator = ESTIMATORS[config.estimator]
            losses = estimator.losses(self.model, self.sites, self.examples, config)
        self.scores = causal_scores(losses, config.subsets, config.aggregation)
        self.importances = _importances(self.scores)
        every = unit_importances(self.sites, self.importances)
        self._regions = region_importances(self.sites, every, config.kv_combination)

    def prune_below_one_threshold_(self, zeros: int) -> None:
        """Zero the least important weights of the whole model."""

        def importances() -> Iterator[torch.Tensor]:
            return (self._importance(matrix) for matrix in self.matrices)

        threshold = kth_smallest(importances, zeros)
        for matrix, keep in zip(self.matrices, keep_masks(importances(), threshold), strict=True):
            apply_mask_(writable_weights(self.model, matrix), keep)
        self.threshold = threshold.value

    def remove_heads_(self) -> None:
        """Zero all weights that belong to the least important heads, and to no other one."""
        candidates = removable_heads(self.model, self.sites, self.matrices)
        count = number_of_heads_to_remove(candidates, self.config.sparsity)
        ranks = self._ranks(candidates)
        order = sorted(range(len(candidates)), key=ranks.__getitem__)
        removed = {candidates[index] for index in order[:count]}
        attention = [site for site in self.sites if site.kind == "attention"]
        kept = {
            (site.name, unit.index): float((site, unit) not in removed)
            for site, unit in heads(attention)
        }
        # A key/value head goes with the last of the query heads that share it.
        regions = region_importances(attention, kept, "max")
        for matrix in self.matrices:
            keep = self._in_orientation(matrix, regions[matrix]).bool()
            apply_mask_(writable_weights(self.model, matrix), keep)

    def _ranks(self, candidates: list[tuple[Site, Unit]]) -> list[float]:
        """Importances of heads: of their scores, or the mean over the weights of their regions."""
        if self.importances:
            return [self.importances[site.name, unit.index] for site, unit in candidates]
        regions = [separable(self.model, site, unit) for site, unit in candidates]
        pieces: dict[str, set[WeightSlice]] = {}
        for piece in chain.from_iterable(regions):
            pieces.setdefault(piece.parameter, set()).add(piece)
        sums: dict[WeightSlice, float] = {}
        sizes: dict[WeightSlice, int] = {}
        for matrix in self.matrices:
            importance = self._in_orientation(matrix, self._importance(matrix))
            for piece in pieces.get(matrix.parameter, ()):
                values = piece.of(importance)
                sums[piece], sizes[piece] = float(values.double().sum()), values.numel()
        return [
            sum(sums[piece] for piece in region) / sum(sizes[piece] for piece in region)
            for region in regions
        ]

    def allocate(self, zeros: int) -> dict[Matrix, int]:
        """Decide how many zeros each matrix gets."""
        model, sites, config = self.model, self.sites, self.config
        if config.method.allocation not in ("interventional", "fisher"):
            allocation = ALLOCATIONS[config.method.allocation]
            return allocation(model, sites, self.layers, zeros, self.examples, config)
        alike = ALLOCATIONS["uniform"](model, sites, self.layers, zeros, self.examples, config)
        kept = self._kept_responses(alike)
        if config.method.allocation == "fisher":
            self.sensitivities = estimate_sensitivities(
                model,
                sites,
                self.layers,
                self.examples,
                alike,
                config.allocation_examples,
                config.seed,
                config.method.answer_weight,
                config.memory_budget,
                kept,
            )
        else:
            self.sensitivities = measure_sensitivities(
                model,
                sites,
                self.layers,
                self.examples,
                lambda matrix, inputs: self._pruned(matrix, inputs, alike[matrix]),
                config.allocation_examples,
                self._updates,
                config.method.answer_weight,
                kept,
                config.memory_budget,
            )
        return interventional(self.sensitivities, zeros, config.allocation_bound)

    def prune_each_matrix_(self, shares: Mapping[Matrix, int]) -> None:
        """Zero so many of the least important weights of each matrix."""
        for matrix, zeros in shares.items():
            self._mask_(matrix, self._importance(matrix), zeros)

    def prune_layer_by_layer_(self, shares: Mapping[Matrix, int]) -> None:
        """Do the same by what the inputs of each matrix are when all before it are pruned."""
        model, method = self.model, self.config.method
        count = len(decoder_layers(model, self.sites))
        stages = stages_by_layer(self.sites)
        self.layer_store = kept = self._layer_store(shares)
        with (
            evaluation_mode(model),
            float32_on_cpu(model) as own_dtypes,
            logging.tqdm(total=count, desc="Pruning", unit="layer") as progress,
        ):
            kind = DenseReferencePass if method.target == "dense" else LayerwisePass
            walk = kind(
                model,
                self.sites,
                self.examples,
                method.answer_weight,
                self.config.memory_budget,
            )
            for index in range(count):
                own = self.layers[index]
                steps = stages[index] if method.order == "projection" else [own]
                try:
                    walk.begin(index)
                    if not (kept and self._recall_layer_(index, kept)):
                        for step in steps:
                            chosen = [matrix for matrix in step if matrix in own]
                            if chosen:  # some modules may stay dense
                                statistics = walk.statistics(index, chosen, gram=self._updates)
                                inputs = {matrix: statistics[matrix] for matrix in chosen}
                                self._prune_step_(inputs, shares, own_dtypes, kept)
                        if kept:
                            kept.commit(index, [self.tokens[matrix] for matrix in own])
                    walk.advance(index)
                except BaseException:
                    logger.warning(
                        f"pruning stopped in layer {index} of {count}; the layers before it are "
                        "pruned already: load the model again before you use or prune it"
                        + ("; the same call then goes on here" if kept and kept.complete else "")
                    )
                    raise
                progress.update()
        self._warn_of_few_tokens()

    def _prune_step_(
        self,
        inputs: Mapping[Matrix, InputStatistics],
        shares: Mapping[Matrix, int],
        own_dtypes: Mapping[str, torch.dtype],
        kept: LayerStore | None,
    ) -> None:
        """Prune matrices, in the dtype in which they are stored.

        What comes later is so calibrated on what is saved.
        """
        for matrix, own in inputs.items():
            new = self._pruned(matrix, own, shares[matrix])
            weight = writable_weights(self.model, matrix)
            new = new.to(own_dtypes.get(matrix.parameter, weight.dtype))
            weight.copy_(new)
            self.tokens[matrix] = own.tokens
            if kept:
                kept.put(matrix, new)

    def _kept_responses(self, shares: Mapping[Matrix, int]) -> SensitivityStore | None:
        """What an earlier run found about sites that are pruned so, if anything is kept."""
        if self._cache is None:
            return None
        settings = {"answer_weight": self.config.method.answer_weight, **self._way(shares)}
        return self._cache.sensitivities(settings)

    def _layer_store(self, shares: Mapping[Matrix, int]) -> LayerStore | None:
        """The layers that an earlier run pruned so, if anything is kept."""
        if self._cache is None:
            return None
        views = (oriented(self.model, matrix) for matrix in self.matrices)
        size = sum(view.numel() * view.element_size() for view in views)
        settings = {**dataclasses.asdict(self.config.method), **self._way(shares)}
        return self._cache.layers(settings, size)

    @functools.cached_property
    def _cache(self) -> PruningCache | None:
        """What is known about the dense model; it is asked for before any weight is changed."""
        folder = self.config.resume_dir
        return None if folder is None else PruningCache(folder, self.model, self.examples)

    def _way(self, shares: Mapping[Matrix, int]) -> dict[str, Any]:
        """All that decides what a matrix becomes, beside the method, model and data."""
        return {
            "criterion": self.config.method.criterion,
            "pattern": self.config.pattern,
            "seed": self.config.seed,
            "kv_combination": self.config.kv_combination,
            "mlp_unit_size": self.config.mlp_unit_size,
            "importances": [[*key, value] for key, value in self.importances.items()],
            "shares": {matrix.name: zeros for matrix, zeros in shares.items()},
        }

    def _recall_layer_(self, index: int, kept: LayerStore) -> bool:
        """Give the matrices of a layer what they became in an earlier run, if it is known."""
        own = self.layers[index]
        if (tokens := kept.get(index, own)) is None:
            return False
        self.tokens.update(tokens)
        for matrix, weight in kept.weights(own):
            writable_weights(self.model, matrix).copy_(weight)
        return True

    def record(self, calibration: CalibrationSet | None) -> PruningRecord:
        """Say what was done."""
        zeros = {matrix: int((weights(self.model, matrix) == 0).sum()) for matrix in self.matrices}
        return PruningRecord(
            config=self.config.to_dict(),
            base_model=self.model.name_or_path or None,
            base_revision=None,
            matrices=[
                MatrixSparsity(
                    matrix.name,
                    zeros[matrix],
                    oriented(self.model, matrix).numel(),
                    self.tokens.get(matrix),
                )
                for matrix in self.matrices
            ],
            scores=_unit_scores(self.scores, self.importances) if self.scores else [],
            calibration=calibration.record if calibration else {},
            versions={name: importlib.metadata.version(name) for name in _VERSIONED},
            threshold=self.threshold,
            intact_loss=self.scores.intact_loss if self.scores else None,
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
        )

    @property
    def criterion(self) -> Criterion:
        return CRITERIA[self.config.method.criterion]

    def _importance(self, matrix: Matrix, inputs: InputStatistics | None = None) -> torch.Tensor:
        regions = self._regions.get(matrix)
        if regions is not None:
            regions = self._in_orientation(matrix, regions)
        assert self.criterion.importance is not None
        known = CriterionInputs(matrix.name, self.config.seed, regions, inputs)
        return self.criterion.importance(weights(self.model, matrix), known)

    def _in_orientation(self, matrix: Matrix, values: torch.Tensor) -> torch.Tensor:
        """Turn values per weight from `[out, in]` to how the matrix is stored, or back."""
        return values.T if is_transposed(self.model, matrix) else values

    @property
    def _updates(self) -> bool:
        """Whether the weights that are kept change too."""
        return self.criterion.updates_weights

    def _pruned(self, matrix: Matrix, inputs: InputStatistics, zeros: int) -> torch.Tensor:
        """Return what a matrix becomes, `[out, in]`; it is not changed."""
        weight = weights(self.model, matrix)
        solve = self.criterion.solve
        if solve is None:
            keep = self._kept(self._importance(matrix, inputs), zeros)
            return weight.masked_fill(~keep.to(weight.device), 0)
        if inputs.output_error_moment is not None:
            weight = correct_toward_dense(weight, inputs, matrix.name)
        return solve(weight, inputs, zeros, self.pattern, matrix.name)

    def _kept(self, importance: torch.Tensor, zeros: int) -> torch.Tensor:
        if self.pattern is None:
            return SELECTIONS[self.criterion.compared](importance, zeros)
        return n_of_m_mask(importance, *self.pattern)

    def _mask_(self, matrix: Matrix, importance: torch.Tensor, zeros: int) -> None:
        apply_mask_(writable_weights(self.model, matrix), self._kept(importance, zeros))

    def _warn_of_few_tokens(self) -> None:
        few = [
            matrix.name
            for matrix, tokens in self.tokens.items()
            if tokens < oriented(self.model, matrix).shape[1]
        ]
        if few:
            logger.warning(
                f"{len(few)} of {len(self.tokens)} matrices saw fewer calibration tokens than they "
                f"have inputs ({', '.join(few[:3])}{', ...' if len(few) > 3 else ''}); the record "
                "has the numbers: more or longer calibration examples help"
            )


def wait_for_all() -> None:
    """Wait until all processes have read the kept layers, which the first one then deletes."""
    try:
        ProcessGroup.current().all_gather(None)
    except ConnectionError as error:
        logger.warning(f"{error}; what this process has pruned is whole")


def _check_losses(
    losses: UnitLosses, units: list[tuple[Site, Unit]], examples: list[CalibrationExample]
) -> None:
    """Check that losses are of the units to score, and of as many examples."""
    wanted, given = (
        [(site.name, unit.channels) for site, unit in own] for own in (units, losses.units)
    )
    if given != wanted or len(losses.intact) != len(examples):
        raise ValueError(
            f"the losses are of {len(given)} units and {len(losses.intact)} examples, but the "
            f"config scores {len(wanted)} units of this model and the calibration set has "
            f"{len(examples)} examples: measure them with the same model and config"
        )


def _importances(scores: CausalScores) -> dict[UnitKey, float]:
    """Return the importances of scored units by site; warn of those that broke the model."""
    for (site, unit), count in zip(scores.units, scores.nonfinite.tolist(), strict=True):
        if count:
            logger.warning(
                f"masking {'head' if site.kind == 'attention' else 'unit'} {unit.index} of "
                f"{site.name} gave a loss that is not finite on "
                f"{count} examples; they are left out of its score"
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
