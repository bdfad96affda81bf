"""Refines a model that has lost parts, by fitting its layers to the dense hidden states."""

import dataclasses
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_cap.config import CAPConfig
from optimum_cap.data import CalibrationExample
from optimum_cap.models import Matrix, ModelView, names_before
from optimum_cap.progress import progress_bar
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.cache import ExpectedWeights, LayerStore, PruningCache
from optimum_cap.pruning.refinement import EXAMPLES_PER_STEP, LayerRefiner
from optimum_cap.runtime import ProcessGroup


class SmallerModelRefinement:
    """Refines a smaller model, and casts its weights to the dtypes of the dense one.

    Args:
        dense: The dense model, in evaluation mode and, on CPUs, in float32.
        smaller: The smaller model.
        layers: Indices in the dense model of the layers of the smaller one, in order.
        config: The number of passes, their learning rate, the memory budget and the seed.
        process_group: The processes that share the refinement.
    """

    def __init__(
        self,
        dense: ModelView,
        smaller: PreTrainedModel,
        layers: list[int],
        config: CAPConfig,
        process_group: ProcessGroup,
    ) -> None:
        self._dense = dense
        self._smaller = smaller
        self._layers = layers
        self._config = config
        self._process_group = process_group

    def run_(
        self,
        examples: list[CalibrationExample],
        kept: Mapping[str, list[int]],
        stored_dtypes: Mapping[str, torch.dtype],
        cache: PruningCache | None,
    ) -> LayerStore | None:
        """Refine the smaller model in place, if the method has a refinement.

        Args:
            examples: The calibration examples.
            kept: The kept parts of the dense model, in the form of the record.
            stored_dtypes: Original dtypes of the dense model's weights that were converted to
                float32.
            cache: Stores finished layers.

        Returns:
            The store of finished layers.
        """
        name_before = names_before(self._dense.model, self._layers)
        dtypes = {
            name: stored_dtypes.get(name_before(name), tensor.dtype)
            for name, tensor in (*self._smaller.named_parameters(), *self._smaller.named_buffers())
        }
        store = None
        if self._config.method.refine:
            view = ModelView.of(self._smaller)
            store = self._layer_store(view, kept, cache)
            self._refine_(view, examples, dtypes, store)
        for name, dtype in dtypes.items():
            tensor = attrgetter(name)(self._smaller)
            tensor.data = tensor.data.to(dtype)
        return store

    def _layer_store(
        self, view: ModelView, kept: Mapping[str, list[int]], cache: PruningCache | None
    ) -> LayerStore | None:
        """Return the store for refined layers of the smaller model."""
        if cache is None:
            return None
        config = self._config
        settings: dict[str, Any] = {
            "method": dataclasses.asdict(config.method),
            "refine_learning_rate": config.refine_learning_rate,
            "seed": config.seed,
            "pattern": config.pattern,
            "kept": dict(kept),
        }
        return cache.layers(settings, sum(view.oriented(m).nbytes for m in view.matrices))

    def _refine_(
        self,
        view: ModelView,
        examples: list[CalibrationExample],
        dtypes: Mapping[str, torch.dtype],
        store: LayerStore | None,
    ) -> None:
        """Fit each layer of the smaller model to the hidden states of the dense one.

        Where layers are removed, the layer before them is fitted to their outputs.
        """
        config, process_group = self._config, self._process_group
        dense, pruned = (
            LayerwisePass(
                each,
                examples,
                memory_budget=config.memory_budget,
                most_examples=EXAMPLES_PER_STEP,
                process_group=process_group,
            )
            for each in (self._dense, view)
        )
        refiner = LayerRefiner(
            view,
            pruned,
            config.method.refine,
            config.refine_learning_rate,
            config.seed,
            process_group,
        )
        layers = [*self._layers, len(self._dense.layers)]
        done = 0
        for new in progress_bar(range(len(view.layers)), desc="Refining", unit="layer"):
            while done < layers[new + 1]:
                dense.advance(done)
                done += 1
            refiner.take_target({batch.number: batch.hidden for batch in dense.batches})
            # Weights shared by several layers are not fitted to one of them.
            matrices = [
                matrix
                for matrix in view.matrices_by_layer.get(new, [])
                if matrix not in view.layers_of_shared
            ]
            if matrices and not _restored_(store, view, new, matrices, dtypes, process_group):
                refiner.refine_(new, matrices)
                for matrix in matrices:
                    weight = view.writable_weights(matrix)
                    weight.copy_(weight.to(dtypes[matrix.parameter]))
                _store(store, view, new, matrices, dtypes)
            pruned.advance(new)


def _restored_(
    store: LayerStore | None,
    view: ModelView,
    layer: int,
    matrices: list[Matrix],
    dtypes: Mapping[str, torch.dtype],
    process_group: ProcessGroup,
) -> bool:
    """Load the weights of a layer that an interrupted run stored; return whether there are any."""
    expected = {
        matrix: ExpectedWeights(tuple(view.oriented(matrix).shape), dtypes[matrix.parameter], 0)
        for matrix in matrices
    }
    stored = store.get(layer, expected) if store else None
    if not process_group.broadcast(stored is not None):
        return False
    for matrix in matrices:
        weight = view.writable_weights(matrix)
        if stored is not None:
            weight.copy_(stored.weights[matrix])
        process_group.broadcast_(weight, 0)
    return True


def _store(
    store: LayerStore | None,
    view: ModelView,
    layer: int,
    matrices: list[Matrix],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    if store is None:
        return
    for matrix in matrices:
        store.put(matrix, view.weights(matrix).to(dtypes[matrix.parameter]))
    store.commit(layer, dict.fromkeys(matrices, 0))
