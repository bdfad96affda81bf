"""Layer-by-layer pruning: each layer is calibrated on the outputs of the pruned ones before it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers.utils import logging

from optimum_cap.config import CAPConfig
from optimum_cap.data import CalibrationExample
from optimum_cap.methods import InputStatistics
from optimum_cap.models import Matrix, ModelView, evaluation_mode, float32_on_cpu
from optimum_cap.progress import progress_bar
from optimum_cap.pruning.activations import LayerwisePass, shared_statistics
from optimum_cap.pruning.cache import ExpectedWeights, LayerStore, StoredLayer
from optimum_cap.pruning.dense_reference import DenseReferencePass
from optimum_cap.pruning.matrix_pruner import MatrixPruner
from optimum_cap.pruning.refinement import EXAMPLES_PER_STEP, LayerRefiner, Refinement
from optimum_cap.pruning.sensitivity import temporary_weights
from optimum_cap.runtime import ALONE, ProcessGroup

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _SharedMatrices:
    """Matrices shared by several layers, which are pruned in the first of them.

    Attributes:
        dense: Their dense weights, `[out, in]`, which later layers need to compute the dense model.
        statistics: The statistics of their inputs in all of these layers of the dense model.
    """

    dense: Mapping[Matrix, torch.Tensor]
    statistics: Mapping[Matrix, InputStatistics]


class LayerByLayerPruning:
    """Prunes each layer based on the inputs it receives after all layers before it are pruned.

    Args:
        view: The model, which is changed.
        layers: The matrices to prune, by decoder layer.
        zeros: Number of zeros of each.
        examples: The calibration examples.
        config: Target, order, answer weight and memory budget.
        pruner: Prunes one matrix.
        store: Stores finished layers, and returns those of an interrupted run.
        process_group: The processes that share the batches and the matrices; each ends up with the
            whole pruned model. Only the first one's store is used.

    Attributes:
        tokens: Number of calibration tokens for each matrix; complete after `run_`.
        refinements: The refinement of each layer, except layers restored from an interrupted run.
    """

    def __init__(
        self,
        view: ModelView,
        layers: Mapping[int, list[Matrix]],
        zeros: Mapping[Matrix, int],
        examples: list[CalibrationExample],
        config: CAPConfig,
        pruner: MatrixPruner,
        store: LayerStore | None,
        process_group: ProcessGroup = ALONE,
    ) -> None:
        self.view = view
        self.layers = layers
        self.zeros = zeros
        self.examples = examples
        self.config = config
        self.pruner = pruner
        self.store = store
        self.process_group = process_group
        self.tokens: dict[Matrix, int] = {}
        self.refinements: dict[int, Refinement] = {}

    def run_(self) -> dict[Matrix, int]:
        """Prune all layers.

        Returns:
            `tokens`.
        """
        view, method = self.view, self.config.method
        count, stages = len(view.layers), view.stages_by_layer
        with (
            evaluation_mode(view.model),
            float32_on_cpu(view.model) as stored_dtypes,
            progress_bar(total=count, desc=self.pruner.activity, unit="layer") as progress,
        ):
            shared = self._shared()
            layerwise = self._pass()
            refiner = self._refiner(layerwise)
            for index in range(count):
                whole_layer = [self.layers[index]]
                steps = stages[index] if method.order == "projection" else whole_layer
                try:
                    with temporary_weights(view.model, shared.dense):
                        layerwise.begin(index)
                        if refiner:
                            refiner.begin(index)
                    if not self._restore_layer_(index, stored_dtypes):
                        self._prune_layer_(layerwise, index, steps, stored_dtypes, shared)
                        if refiner and self.layers[index]:
                            self._refine_layer_(refiner, index, stored_dtypes)
                        self._store_layer(index, stored_dtypes)
                    layerwise.advance(index)
                except BaseException:
                    resumes = self.store is not None and self.store.complete
                    logger.warning(
                        f"pruning stopped in layer {index} of {count}; the layers before it are "
                        "pruned already: load the model again before you use or prune it"
                        + ("; the same call then resumes here" if resumes else "")
                    )
                    raise
                progress.update()
        self._warn_about_few_tokens()
        self._report_refinement()
        return self.tokens

    def _shared(self) -> "_SharedMatrices":
        """Return the data for pruning matrices shared by several layers, from the dense model."""
        chosen = {matrix for matrices in self.layers.values() for matrix in matrices}
        shared = [matrix for matrix in self.view.layers_of_shared if matrix in chosen]
        if not shared:
            return _SharedMatrices({}, {})
        method, budget = self.config.method, self.config.memory_budget
        layerwise = LayerwisePass(
            self.view,
            self.examples,
            method.answer_weight,
            budget,
            process_group=self.process_group if method.target != "dense" else ALONE,
        )
        gram = self.pruner.criterion.updates_weights
        return _SharedMatrices(
            {matrix: self.view.oriented(matrix).clone() for matrix in shared},
            shared_statistics(layerwise, shared, gram),
        )

    def _pass(self) -> LayerwisePass:
        method, budget = self.config.method, self.config.memory_budget
        most = EXAMPLES_PER_STEP if method.refine else None
        options = (self.view, self.examples, method.answer_weight, budget, most)
        if method.target == "dense":
            return DenseReferencePass(*options)
        return LayerwisePass(*options, self.process_group)

    def _prune_layer_(
        self,
        layerwise: LayerwisePass,
        index: int,
        steps: list[list[Matrix]],
        stored_dtypes: Mapping[str, torch.dtype],
        shared: "_SharedMatrices",
    ) -> None:
        layer_matrices = self.layers[index]
        for step in steps:
            chosen = [matrix for matrix in step if matrix in layer_matrices]
            if chosen:  # some modules may stay dense
                gram = self.pruner.criterion.updates_weights
                own = [matrix for matrix in chosen if matrix not in shared.statistics]
                statistics = layerwise.statistics(index, own, gram=gram) if own else {}
                statistics = {**shared.statistics, **statistics}
                owners = self._owners(chosen)
                for matrix in chosen:
                    self.tokens[matrix] = statistics[matrix].tokens
                    if owners.get(matrix, self.process_group.rank) == self.process_group.rank:
                        self._prune_matrix_(matrix, statistics[matrix], stored_dtypes)
                for matrix, owner in owners.items():
                    weight = self.view.writable_weights(matrix)
                    self.process_group.broadcast_(weight, owner)

    def _owners(self, matrices: list[Matrix]) -> dict[Matrix, int]:
        """Return which process prunes which matrix; empty if every process prunes all."""
        if self.process_group.size == 1 or self.pruner.criterion.solve is None:
            return {}
        shapes = (self.view.oriented(matrix).shape for matrix in matrices)
        # Solvers invert a Hessian of the inputs and multiply the matrix by it a few times.
        costs = [inputs**2 * (inputs + 4 * outputs) for outputs, inputs in shapes]
        return dict(zip(matrices, self.process_group.deal(costs), strict=True))

    def _prune_matrix_(
        self,
        matrix: Matrix,
        statistics: InputStatistics,
        stored_dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """Prune a matrix in its stored dtype: later ones are calibrated on the saved weights."""
        pruned = self.pruner.pruned(matrix, statistics, self.zeros[matrix])
        weight = self.view.writable_weights(matrix)
        weight.copy_(pruned.to(stored_dtypes.get(matrix.parameter, weight.dtype)))

    def _refiner(self, layerwise: LayerwisePass) -> LayerRefiner | None:
        config, passes = self.config, self.config.method.refine
        if not passes:
            return None
        return LayerRefiner(
            self.view,
            layerwise,
            passes,
            config.refine_learning_rate,
            config.seed,
            self.process_group,
        )

    def _refine_layer_(
        self, refiner: LayerRefiner, index: int, stored_dtypes: Mapping[str, torch.dtype]
    ) -> None:
        """Refine a pruned layer, and round its weights to their stored dtype."""
        # Weights shared with later layers are not fitted to this layer alone.
        own = [m for m in self.layers[index] if m not in self.view.layers_of_shared]
        if not own:
            return
        self.refinements[index] = refiner.refine_(index, own)
        for matrix in own:
            weight = self.view.writable_weights(matrix)
            weight.copy_(weight.to(stored_dtypes.get(matrix.parameter, weight.dtype)))

    def _store_layer(self, index: int, stored_dtypes: Mapping[str, torch.dtype]) -> None:
        """Store the pruned weights of a layer, so that an interrupted run resumes after it."""
        if not self.store:
            return
        for matrix in self.layers[index]:
            weight = self.view.weights(matrix)
            self.store.put(matrix, weight.to(stored_dtypes.get(matrix.parameter, weight.dtype)))
        self.store.commit(index, {matrix: self.tokens[matrix] for matrix in self.layers[index]})

    def _restore_layer_(self, index: int, stored_dtypes: Mapping[str, torch.dtype]) -> bool:
        """Load a layer's weights stored by an interrupted run; return whether there are any."""
        layer_matrices = self.layers[index]
        stored = self._stored_layer(index, stored_dtypes)
        # The first process decides for all, because the others may not have access to its folder.
        tokens = self.process_group.broadcast(
            None if stored is None else [stored.tokens[matrix] for matrix in layer_matrices]
        )
        if tokens is None:
            return False
        self.tokens.update(zip(layer_matrices, tokens, strict=True))
        for matrix in layer_matrices:
            weight = self.view.writable_weights(matrix)
            if stored is not None:
                weight.copy_(stored.weights[matrix])
            self.process_group.broadcast_(weight, 0)
        return True

    def _stored_layer(
        self, index: int, stored_dtypes: Mapping[str, torch.dtype]
    ) -> StoredLayer | None:
        """Return a layer of an interrupted run; `None` if there is none and in other processes."""
        if self.store is None or self.process_group.rank != 0:
            return None
        expected = {}
        for matrix in self.layers[index]:
            weight = self.view.oriented(matrix)
            dtype = stored_dtypes.get(matrix.parameter, weight.dtype)
            expected[matrix] = ExpectedWeights(tuple(weight.shape), dtype, self.zeros[matrix])
        return self.store.get(index, expected)

    def _warn_about_few_tokens(self) -> None:
        few = [
            f"{matrix.name}: {tokens} tokens, {inputs} inputs"
            for matrix, tokens in self.tokens.items()
            if tokens < (inputs := self.view.oriented(matrix).shape[1])
        ]
        if few:
            logger.warning(
                f"{len(few)} of {len(self.tokens)} matrices saw fewer calibration tokens than they "
                f"have inputs ({'; '.join(few[:3])}{'; ...' if len(few) > 3 else ''}): use more or "
                "longer calibration examples, at least as many tokens as inputs; the record has "
                "all numbers"
            )

    def _report_refinement(self) -> None:
        """Log the gain from refinement, and warn if there is none in most layers."""
        if not (results := list(self.refinements.values())):
            return
        before = sum(result.error_before for result in results) / len(results)
        after = sum(result.error_after for result in results) / len(results)
        logger.info(
            f"refinement lowered the error of the hidden states from {before:.4f} to {after:.4f}, "
            "relative to their squares (mean over layers, on calibration examples left out)"
        )
        in_vain = [index for index, result in self.refinements.items() if result.passes == 0]
        if 2 * len(in_vain) > len(results):
            logger.warning(
                f"refinement improved {len(results) - len(in_vain)} of {len(results)} layers on "
                "the calibration examples that it leaves out; the others have the weights of the "
                "solver: use more calibration examples, or a lower refine_learning_rate"
            )
