"""Measures sensitivities: how much the predictions change when a site is pruned alone.

Causal scores come from masking a unit, sensitivities from pruning a site.
"""

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from math import nan, sqrt

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.data import CalibrationExample
from optimum_cap.methods import InputStatistics
from optimum_cap.models import (
    Matrix,
    ModelView,
    SharedStates,
    Site,
    Targets,
    evaluation_mode,
    float32_on_cpu,
    is_offloaded,
    logits_of,
    onloaded,
    oriented,
    positions_per_chunk,
    prunable_matrices,
)
from optimum_cap.progress import progress_bar
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.cache import SensitivityStore
from optimum_cap.runtime import ALONE, ProcessGroup, check_same_inputs, resume_hint_on_stop

_PASSES = 1.0  # cost of measuring, in passes over the calibration set
FEWEST_EXAMPLES = 16
_SETS_AT_A_TIME = 8  # sets of pruned matrices per load of a layer, if layers are offloaded

logger = logging.get_logger(__name__)

Prune = Callable[[Matrix, InputStatistics], torch.Tensor]
"""Returns the pruned weights of a matrix, `[out, in]`, and leaves the matrix unchanged."""


@dataclass(frozen=True)
class Sensitivity:
    """The effect of pruning one site alone.

    Attributes:
        site: The site.
        matrices: Its matrices to prune.
        sizes: Number of weights of each.
        divergence: Kullback-Leibler divergence of the predictions with the site pruned from those
            of the dense model, in nats per scored token, averaged over examples. Not finite if
            pruning the site breaks the model.
        standard_error: Standard error of that mean; NaN for a single example.
    """

    site: Site
    matrices: tuple[Matrix, ...]
    sizes: tuple[int, ...]
    divergence: float
    standard_error: float

    @property
    def weights(self) -> int:
        """Number of weights of all matrices."""
        return sum(self.sizes)


def measure_sensitivities(
    view: ModelView,
    layers: Mapping[int, list[Matrix]],
    examples: list[CalibrationExample],
    prune: Prune,
    count: int | None = None,
    gram: bool = True,
    answer_weight: float = 0.0,
    store: SensitivityStore | None = None,
    memory_budget: int | str = "auto",
    process_group: ProcessGroup = ALONE,
) -> list[Sensitivity]:
    """Prune each site alone and measure how much the predictions of scored tokens change.

    The divergence from the dense model's predictions is the expected increase of the loss on
    answers drawn from the dense model. Unlike the increase on the answers in the data, it is never
    negative and can be measured on a few examples.

    Args:
        view: The dense model; it is left unchanged.
        layers: The matrices to prune, by decoder layer.
        examples: The calibration examples, in random order: all are used for the input statistics,
            the first ones for measuring.
        prune: Prunes a matrix.
        count: Number of examples to measure on; `None` uses `examples_to_measure`.
        gram: Whether `prune` needs x_i x_j of the inputs.
        answer_weight: As for `LayerwisePass`, in these statistics.
        store: Stores divergences, so that an interrupted run resumes.
        memory_budget: As for `LayerwisePass`.
        process_group: The processes that share the sites; all of them must call this.

    Returns:
        One sensitivity for each site with matrices to prune, in the order of the model.

    Raises:
        ValueError: The processes of the group were given different inputs.
        ConnectionError: Another process of the group has stopped.
    """
    groups = group_by_layer(view.sites, layers)
    if count is None:
        count = examples_to_measure([len(groups[layer]) for layer in sorted(groups)], len(examples))
    count = min(count, len(examples))
    all_groups = [group for layer_groups in groups.values() for group in layer_groups]
    divergences: dict[Site, torch.Tensor] = {}
    if store:
        for site, _ in all_groups:
            stored = store.get_measured(site, count)
            if stored is not None:
                divergences[site] = stored
    check_same_inputs(process_group, view.model, examples, count)
    to_measure = {
        # Shifted by layer, because attention takes less time than the MLP after it.
        layer: [
            group
            for group in layer_groups[
                (process_group.rank + layer) % process_group.size :: process_group.size
            ]
            if group[0] not in divergences
        ]
        for layer, layer_groups in groups.items()
    }

    def status() -> str:
        done = f"{len(divergences)} of {len(all_groups)} sites"
        return f"measuring sensitivities was stopped after {done}"

    with resume_hint_on_stop(status, store):
        # Closed even on interruption, so that the model is restored.
        with closing(
            _measure_divergences(
                view, to_measure, examples, prune, count, gram, answer_weight, memory_budget
            )
        ) as measurements:
            for site, of_site in measurements:
                divergences[site] = of_site
                if store:
                    store.put_measured(site, of_site)
        for of_process in process_group.all_gather(divergences):
            divergences |= of_process
    return [
        sensitivity_of(view.model, site, matrices, divergences[site])
        for site, matrices in all_groups
    ]


def _measure_divergences(
    view: ModelView,
    groups: dict[int, list[tuple[Site, list[Matrix]]]],
    examples: list[CalibrationExample],
    prune: Prune,
    count: int,
    gram: bool,
    answer_weight: float,
    memory_budget: int | str,
) -> Generator[tuple[Site, torch.Tensor], None, None]:
    """Yield the divergences of sites on the first `count` examples.

    Args:
        view: As for `measure_sensitivities`.
        groups: The sites to measure with their matrices, by layer.
        examples: As for `measure_sensitivities`.
        prune: As for `measure_sensitivities`.
        count: Number of examples to measure on.
        gram: As for `measure_sensitivities`.
        answer_weight: As for `measure_sensitivities`.
        memory_budget: As for `measure_sensitivities`.
    """
    if not any(groups.values()):
        return
    with (
        evaluation_mode(view.model),
        float32_on_cpu(view.model),
        progress_bar(
            total=sum(map(len, groups.values())), desc="Measuring sites", unit="site"
        ) as progress,
    ):
        layerwise = LayerwisePass(view, examples, answer_weight, memory_budget)
        evaluator = DivergenceEvaluator(view, examples[:count], memory_budget)
        for layer, layer_groups in groups.items():
            if not layer_groups:
                layerwise.advance(layer)
                continue
            chosen = [matrix for _, matrices in layer_groups for matrix in matrices]
            statistics = layerwise.statistics(layer, chosen, gram, advance=True)
            pruned = (
                {matrix: prune(matrix, statistics[matrix]) for matrix in matrices}
                for _, matrices in layer_groups
            )
            divergences = evaluator.divergences(layer, pruned)
            for (site, _), of_site in zip(layer_groups, divergences, strict=True):
                yield site, of_site
                progress.update()


def group_by_layer(
    sites: list[Site], layers: Mapping[int, list[Matrix]]
) -> dict[int, list[tuple[Site, list[Matrix]]]]:
    """Return the sites of each layer that have matrices to prune, with these matrices."""
    return {
        layer: [
            (site, chosen)
            for site in sites
            if site.layer == layer
            and (chosen := [matrix for matrix in prunable_matrices([site]) if matrix in to_prune])
        ]
        for layer, to_prune in layers.items()
    }


def sensitivity_of(
    model: PreTrainedModel, site: Site, matrices: list[Matrix], divergences: torch.Tensor
) -> Sensitivity:
    """Return the sensitivity of a site from its divergences on the examples, nats, `[examples]`."""
    count = len(divergences)
    if not divergences.isfinite().all():
        logger.warning(
            f"pruning {site.name} alone gives predictions that are not finite; it counts as the "
            "most sensitive site"
        )
    error = float(divergences.std()) / sqrt(count) if count > 1 else nan
    sizes = tuple(oriented(model, matrix).numel() for matrix in matrices)
    return Sensitivity(site, tuple(matrices), sizes, float(divergences.mean()), error)


def examples_to_measure(sites_per_layer: list[int], examples: int) -> int:
    """Return the number of examples for which measuring all sites costs about one pass over all.

    Measuring a site of layer l costs a pass through layer l and all later ones.
    """
    layers = len(sites_per_layer)
    passed = sum(count * (layers - layer) for layer, count in enumerate(sites_per_layer))
    affordable = int(_PASSES * examples * layers / max(1, passed))
    return min(examples, max(FEWEST_EXAMPLES, affordable))


@dataclass
class _LayerInput:
    """The input of a decoder layer for a batch.

    Attributes:
        hidden: Hidden states, `[..., examples, tokens, hidden]`.
        shared: Keys and values that layers share; a layer may add its own.
    """

    hidden: torch.Tensor
    shared: SharedStates | None


class DivergenceEvaluator:
    """Measures how far pruned matrices move the predictions away from the dense model's.

    Args:
        view: The dense model, in evaluation mode.
        examples: The examples to measure on.
        memory_budget: As for `LayerwisePass`.
    """

    def __init__(
        self,
        view: ModelView,
        examples: list[CalibrationExample],
        memory_budget: int | str,
    ) -> None:
        self.model = view.model
        self._memory_budget = memory_budget
        self.layerwise = LayerwisePass(view, examples, memory_budget=memory_budget)
        self.targets = [Targets.of(batch.batch) for batch in self.layerwise.batches]
        self.next_layer = 0
        self.sets_at_a_time = _SETS_AT_A_TIME if is_offloaded(view.model) else 1
        self._first_inputs = self._inputs()
        self.dense_final = self._to_the_end(0, [self._inputs()])[0]

    def restart(self) -> None:
        """Go back to the first layer."""
        for batch, first in zip(self.layerwise.batches, self._first_inputs, strict=True):
            batch.hidden, batch.shared = first.hidden, copy.copy(first.shared)
        self.next_layer = 0

    def advance(self) -> None:
        """Run the next layer in its current state; its outputs become the next one's inputs."""
        self.layerwise.advance(self.next_layer)
        self.next_layer += 1

    def divergences_in(
        self, contexts: Iterable[AbstractContextManager[None]]
    ) -> Iterator[torch.Tensor]:
        """Yield the divergences, `[examples]`, with the next layer run in each context in turn.

        All other layers run in their current state.
        """
        for context in contexts:
            outputs = self._inputs()
            with context:
                self._run(self.next_layer, outputs)
            [final] = self._to_the_end(self.next_layer + 1, [outputs])
            yield self._divergence(final)

    def divergences(
        self, layer: int, pruned: Iterable[dict[Matrix, torch.Tensor]]
    ) -> Iterator[torch.Tensor]:
        """Yield the divergences, `[examples]`, with each set of pruned matrices in turn.

        Args:
            layer: The layer; not before that of the previous call.
            pruned: Sets of pruned matrices of this layer, `[out, in]`.
        """
        while self.next_layer < layer:
            self.advance()
        besides = [*self.layerwise.layers, self.model.get_input_embeddings()]
        sets = iter(pruned)
        while chosen := list(islice(sets, self.sets_at_a_time)):
            outputs = list(self._layer_outputs(layer, chosen))
            # Weights shared with later layers are pruned there too; such sets are processed one at
            # a time.
            shared = {
                matrix: weight
                for weights in chosen
                for matrix, weight in weights.items()
                if matrix in self.layerwise.view.layers_of_shared
            }
            with temporary_weights(self.model, shared):
                finals = self._to_the_end(layer + 1, outputs)
            with onloaded(self.model, besides=besides):
                divergences = [self._divergence(final) for final in finals]
            yield from divergences

    def divergence_of(self, view: ModelView) -> torch.Tensor:
        """Return the divergences, `[examples]`, of another model from the dense one.

        Args:
            view: A model with the dense one's embeddings, final norm and LM head that is not
                larger.
        """
        dense = self.layerwise
        most = max(len(batch.batch.positions) for batch in dense.batches)
        other = LayerwisePass(
            view, dense.examples, memory_budget=self._memory_budget, most_examples=most
        )
        for layer in progress_bar(range(len(view.layers)), desc="Comparing", unit="layer"):
            other.advance(layer)
        return self._divergence(
            [
                targets.select(batch.hidden).unsqueeze(-2)
                for batch, targets in zip(other.batches, self.targets, strict=True)
            ]
        )

    def _inputs(self) -> list[_LayerInput]:
        """Return the inputs of the next layer for all batches, which may be overwritten."""
        return [_LayerInput(b.hidden, copy.copy(b.shared)) for b in self.layerwise.batches]

    def _layer_outputs(
        self, layer: int, pruned: Iterable[dict[Matrix, torch.Tensor]]
    ) -> Iterator[list[_LayerInput]]:
        """Yield the outputs of a layer for all batches, with each set of matrices in turn."""
        layerwise = self.layerwise
        for weights in pruned:
            outputs = self._inputs()
            with onloaded(layerwise.layers[layer]), temporary_weights(self.model, weights):
                self._run(layer, outputs)
            yield outputs

    def _run(self, layer: int, carried: list[_LayerInput]) -> None:
        """Replace the inputs of a layer, for all batches, with those of the next one."""
        for each, batch in zip(carried, self.layerwise.batches, strict=True):
            each.hidden = self.layerwise.run(layer, batch, each.hidden, each.shared)

    def _to_the_end(self, layer: int, carried: list[list[_LayerInput]]) -> list[list[torch.Tensor]]:
        """Return the final hidden states at scored positions for each set and batch.

        Args:
            layer: The next layer to run.
            carried: Its input for each set and batch; overwritten.

        Returns:
            `[..., scored, 1, hidden]` for each set and batch.
        """
        layers = self.layerwise.layers
        for index in range(layer, len(layers)):
            with onloaded(layers[index]):
                for of_set in carried:
                    self._run(index, of_set)
        return [
            [
                targets.select(each.hidden).unsqueeze(-2)
                for each, targets in zip(of_set, self.targets, strict=True)
            ]
            for of_set in carried
        ]

    def _divergence(self, final: list[torch.Tensor]) -> torch.Tensor:
        """Return the divergences, `[examples]`, from the final hidden states of each batch."""
        output_template = self.layerwise.output_templates[-1]
        divergences = []
        for dense, changed, targets in zip(self.dense_final, final, self.targets, strict=True):
            parts = []
            step = positions_per_chunk(self.model, dense.device)
            for start in range(0, dense.shape[-3], step):
                part = ..., slice(start, start + step), slice(None), slice(None)
                dense_log, changed_log = (
                    logits_of(self.model, self.layerwise.layers, output_template, hidden[part])
                    .float()
                    .log_softmax(dim=-1)
                    for hidden in (dense, changed)
                )
                parts.append((dense_log.exp() * (dense_log - changed_log)).sum(dim=-1))
            divergences.append(targets.example_means(torch.cat(parts)))
        return torch.cat(divergences)


@contextmanager
def temporary_weights(
    model: PreTrainedModel, pruned: Mapping[Matrix, torch.Tensor]
) -> Iterator[None]:
    """Replace the weights of matrices in memory, `[out, in]`, within this context."""
    views = {matrix: oriented(model, matrix) for matrix in pruned}
    original = {matrix: view.clone() for matrix, view in views.items()}
    try:
        for matrix, view in views.items():
            view.copy_(pruned[matrix])
        yield
    finally:
        for matrix, view in views.items():
            view.copy_(original[matrix])
