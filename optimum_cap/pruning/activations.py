"""Statistics of the inputs of prunable matrices on the calibration set, layer by layer.

`LayerwisePass` runs the calibration set through the model one decoder layer at a time, so that a
layer can be pruned before the next one gets its outputs, as in the reference implementations of
Wanda and SparseGPT (https://github.com/locuslab/wanda, `lib/prune.py`). It stores only the hidden
states between two layers.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.config import parse_size
from optimum_cap.data import Batch, CalibrationExample, batches
from optimum_cap.methods import InputStatistics
from optimum_cap.models import (
    Matrix,
    ModelView,
    SharedStates,
    activation_bytes_per_token,
    as_layers_take,
    call_model,
    device_of,
    hidden_states_of,
    onloaded,
    oriented,
    repack_output,
    replaced_forward,
    rows_not_finite,
    shared_states,
    split_hidden,
    streams_first,
    with_shared_states,
    without_logits,
)
from optimum_cap.pruning.collector import InputCollector, LayerBatch, Route
from optimum_cap.runtime import ALONE, LANES, ProcessGroup, lane_of

_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


class LayerwisePass:
    """Runs the calibration set through the decoder layers of a model, one at a time.

    Args:
        view: The model, in evaluation mode and without gradients.
        examples: The calibration examples.
        answer_weight: Weight, in addition to 1, of tokens that are scored or predict a scored one.
        memory_budget: Bytes for the activations of a batch, as a number or as text such as
            `"4GB"`; `"auto"` runs 2048 tokens at a time on a CPU and 16384 on a GPU.
        most_examples: Maximum number of examples per batch; `None` for as many as fit the budget.
        process_group: The processes that share the batches.

    Attributes:
        layers: The decoder layers.
        output_templates: An output of each layer, which shows how hidden states are returned.
        planned: All batches.
        batches: The batches of this process, each with the hidden states between two layers.
        process_group: The processes that share them.
    """

    def __init__(
        self,
        view: ModelView,
        examples: list[CalibrationExample],
        answer_weight: float = 0.0,
        memory_budget: int | str = "auto",
        most_examples: int | None = None,
        process_group: ProcessGroup = ALONE,
    ) -> None:
        self.view = view
        self.model = view.model
        self.layers = view.layers
        self.examples = examples
        size = examples_per_batch(view.model, examples, memory_budget)
        size = size if most_examples is None else min(size, most_examples)
        self.output_templates = view.output_templates
        self.process_group = process_group
        self.planned = batches(examples, size)
        head = [view.model.get_output_embeddings()] if view.has_lm_head else []
        with onloaded(view.model, besides=[*self.layers, *head]):
            self.batches = [
                LayerBatch(
                    number,
                    batch,
                    _token_weights(batch, answer_weight),
                    *_first_input(view.model, self.layers, self.output_templates, batch),
                )
                for number, batch in enumerate(self.planned)
                if process_group.owns_lane(lane_of(number))
            ]
        for each in self.batches:
            check_finite(each.hidden, each.batch, examples, "the embedding of the model")

    def begin(self, index: int) -> None:
        """Prepare for pruning layer `index`; call this while the whole layer is still dense."""

    def statistics(
        self, index: int, matrices: Iterable[Matrix], gram: bool = False, advance: bool = False
    ) -> dict[Matrix, InputStatistics]:
        """Run layer `index` in its current state and return the statistics of its matrices' inputs.

        Args:
            index: The layer; `advance` must have been called for all layers before it.
            matrices: Prunable matrices of this layer. Matrices with the same input share their
                statistics.
            gram: Whether to sum x_i x_j too.
            advance: Whether to also advance past the layer, as `advance` does.

        Raises:
            ValueError: The inputs of a matrix cannot be collected, or are not finite.
        """
        matrices = list(matrices)
        collector = self.collector(index, matrices)
        of_lanes: list[dict[Matrix, InputStatistics]] = [{} for _ in range(LANES)]

        def add(matrix: Matrix, inputs: torch.Tensor, route: Route) -> None:
            add_inputs_(of_lanes[batch.lane], matrix, inputs, route.token_weights, gram)

        with onloaded(self.layers[index]):
            for batch in self.batches:
                with collector.collecting(batch, add):
                    output = self.run(index, batch, batch.hidden)
                if advance:
                    self._check_finite(index, batch, output)
                    batch.hidden = output
        leaders = self.process_group.broadcast(collector.leaders)
        of_leaders = self._merged(of_lanes, set(leaders.values()), matrices, gram)
        of_matrices = {matrix: of_leaders[leaders[matrix]] for matrix in matrices}
        check_statistics(of_matrices)
        return of_matrices

    def collector(self, index: int, matrices: Iterable[Matrix]) -> InputCollector:
        """Return a collector for the inputs of matrices while layer `index` runs."""
        return InputCollector(self.model, matrices, self.view.names_in_layers.get(index))

    def _merged(
        self,
        of_lanes: list[dict[Matrix, InputStatistics]],
        leaders: set[Matrix],
        matrices: list[Matrix],
        gram: bool,
    ) -> dict[Matrix, InputStatistics]:
        """Add up the statistics of all lanes, in this process and the others.

        Args:
            of_lanes: The statistics of each lane, empty for lanes of other processes; modified.
            leaders: The matrices that have statistics.
            matrices: The matrices of the layer, which give the order.
            gram: Whether the statistics have sums of products.
        """
        merged = {}
        for matrix in (matrix for matrix in matrices if matrix in leaders):
            own = [statistics.pop(matrix) for statistics in of_lanes if matrix in statistics]
            if own:
                total = own[0]
                for other in own[1:]:
                    total.merge_(other)
            else:
                width = oriented(self.model, matrix).shape[1]
                total = InputStatistics.empty(width, device_of(self.model), gram)
            merged[matrix] = total
        if self.process_group.size > 1:
            counts = [statistics.tokens for statistics in merged.values()]
            totals = map(sum, zip(*self.process_group.all_gather(counts), strict=True))
            for statistics, tokens in zip(merged.values(), totals, strict=True):
                statistics.tokens = tokens
                for each in statistics.sums:
                    self.process_group.sum_(each)
                statistics.update_()
        return merged

    def advance(self, index: int) -> None:
        """Run layer `index` in its current state; its outputs become the inputs of the next one.

        Raises:
            ValueError: They are not finite.
        """
        with onloaded(self.layers[index]):
            for batch in self.batches:
                batch.hidden = self.run(index, batch, batch.hidden)
                self._check_finite(index, batch, batch.hidden)

    def _check_finite(self, index: int, batch: LayerBatch, output: torch.Tensor) -> None:
        check_finite(output, batch.batch, self.examples, f"layer {index}")

    def run(
        self,
        index: int,
        batch: LayerBatch,
        hidden: torch.Tensor,
        shared: SharedStates | None = None,
    ) -> torch.Tensor:
        """Return the output of layer `index` for hidden states and the arguments of a batch.

        Args:
            index: The layer.
            batch: The batch.
            hidden: Input of the layer.
            shared: Keys and values from earlier layers; the layer may add its own. `None` uses
                those of the batch.
        """
        args, kwargs = with_shared_states(
            *batch.arguments[index], batch.shared if shared is None else shared
        )
        if (added := batch.added.get(index)) is not None:
            hidden = hidden + added
        template = self.output_templates[index]
        output = self.layers[index](as_layers_take(hidden, template), *args, **kwargs)
        return streams_first(hidden_states_of(output), template)


def shared_statistics(
    layerwise: LayerwisePass, matrices: Iterable[Matrix], gram: bool
) -> dict[Matrix, InputStatistics]:
    """Return the statistics of matrices shared by several layers, over all of these layers.

    Args:
        layerwise: A pass over the model that has not started; it ends after the last of these
            layers.
        matrices: The matrices.
        gram: As for `LayerwisePass.statistics`.
    """
    chosen = set(matrices)
    layers = {m: own for m, own in layerwise.view.layers_of_shared.items() if m in chosen}
    last = max((own[-1] for own in layers.values()), default=-1)
    found: dict[Matrix, list[InputStatistics]] = {matrix: [] for matrix in layers}
    for index in range(last + 1):
        here = [matrix for matrix, own in layers.items() if index in own]
        if here:
            of_layer = layerwise.statistics(index, here, gram, advance=True)
            for matrix, of_matrix in of_layer.items():
                found[matrix].append(of_matrix)
        else:
            layerwise.advance(index)
    totals: dict[tuple[int, ...], InputStatistics] = {}
    merged = {}
    for matrix, parts in found.items():
        key = tuple(map(id, parts))  # matrices with the same inputs have the same statistics
        if key not in totals:
            totals[key] = copy.deepcopy(parts[0])
            for part in parts[1:]:
                totals[key].merge_(part)
        merged[matrix] = totals[key]
    return merged


def add_inputs_(
    statistics: dict[Matrix, InputStatistics],
    matrix: Matrix,
    inputs: torch.Tensor,
    weights: torch.Tensor | None,
    gram: bool,
) -> None:
    """Add inputs `[tokens, in]` of a matrix to its statistics, which may not exist yet."""
    if matrix not in statistics:
        statistics[matrix] = InputStatistics.empty(inputs.shape[-1], inputs.device, gram)
    statistics[matrix].add_(inputs, weights)


def check_statistics(statistics: Mapping[Matrix, InputStatistics]) -> None:
    """Check that the statistics of the inputs of matrices are finite.

    Raises:
        ValueError: They are not finite; the message names the matrix.
    """
    for matrix, of_matrix in statistics.items():
        if not of_matrix.squares.isfinite().all():
            raise ValueError(
                f"{matrix.name} receives inputs that are NaN, infinite or too large to square, so "
                "it cannot be pruned by its inputs: check the weights and the dtype of the model, "
                "leave it dense (modules_to_leave_dense), or choose criterion 'magnitude'"
            )


def examples_per_batch(
    model: PreTrainedModel, examples: list[CalibrationExample], memory_budget: int | str
) -> int:
    """Return how many examples to run through a layer at a time so that activations fit the budget.

    Args:
        model: The model.
        examples: The calibration examples.
        memory_budget: As for `LayerwisePass`.
    """
    longest = max(len(example.input_ids) for example in examples)
    tokens = _TOKENS_PER_BATCH.get(device_of(model).type, 2048)
    if memory_budget != "auto":
        affordable = parse_size(memory_budget) // activation_bytes_per_token(model, longest)
        tokens = min(tokens, affordable)
    return max(1, tokens // longest)


def check_finite(
    hidden: torch.Tensor, batch: Batch, examples: list[CalibrationExample], module: str
) -> None:
    """Check that hidden states are finite, except those of padding.

    Args:
        hidden: `[..., examples, tokens, hidden]`.
        batch: Their batch.
        examples: The examples that the positions of the batch refer to.
        module: Name of the module that returned them, for the error message.

    Raises:
        ValueError: They are not finite; the message names the module and the first such example.
    """
    if rows := rows_not_finite(hidden, batch.real):
        example = examples[batch.positions[rows[0]]]
        raise ValueError(
            f"{module} returns NaN or infinite values on row {example.index} of {example.source!r}"
            f" ({len(rows)} of {len(batch.positions)} examples of its batch), so nothing can be "
            "calibrated on it: check the weights and the dtype of the model (float16 overflows "
            "where bfloat16 does not)"
        )


def _token_weights(batch: Batch, answer_weight: float) -> torch.Tensor | None:
    if answer_weight == 0:
        return None
    answers = batch.scored.clone()
    answers[:, :-1] |= batch.scored[:, 1:]
    return (1 + answer_weight * answers.float())[batch.real]


def _first_input(
    model: PreTrainedModel,
    layers: list[nn.Module],
    output_templates: list[Any],
    batch: Batch,
) -> tuple[
    torch.Tensor,
    list[tuple[tuple[Any, ...], dict[str, Any]]],
    SharedStates | None,
    dict[int, torch.Tensor],
]:
    """Return the input of the first layer and the other arguments of all layers, running no layer.

    The third value holds the keys and values that layers share, which are not computed yet. The
    last one holds what the model adds to the hidden states before layers (if anything), which is
    known because the layers before return their input.

    Args:
        model: The model.
        layers: Its decoder layers.
        output_templates: An output of each layer, which shows how hidden states are returned.
        batch: The examples.
    """
    inputs: list[torch.Tensor] = []
    arguments = []

    def skip(output_template: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest, keywords = split_hidden(args, kwargs)
            inputs.append(streams_first(hidden, output_template))
            arguments.append((rest, keywords))
            return repack_output(output_template, hidden)

        return forward

    with without_logits(model), ExitStack() as stack:
        for layer, output_template in zip(layers, output_templates, strict=True):
            stack.enter_context(replaced_forward(layer, skip(output_template)))
        call_model(model, batch.input_ids.to(device_of(model)), batch.inputs)
    added = {
        index: after - before.to(after.device)
        for index, (before, after) in enumerate(itertools.pairwise(inputs), start=1)
        if batch.inputs and not torch.equal(before.to(after.device), after)
    }
    return inputs[0], arguments, shared_states(*arguments[0]), added
