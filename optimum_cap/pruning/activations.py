"""What the inputs of the prunable matrices look like on the calibration set, layer by layer.

`LayerwisePass` takes the calibration set through the model one decoder layer at a time, so that a
layer can be pruned before the next one is looked at, as the reference codes of Wanda and SparseGPT
do (https://github.com/locuslab/wanda, `lib/prune.py`). Only the hidden states between two layers
are kept.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
    activation_bytes_per_token,
    device_of,
    gated,
    hidden_states_of,
    onloaded,
    only_last_logits,
    recorded_calls,
    repack_output,
    replaced_forward,
    routed,
    split_hidden,
)

_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


class LayerwisePass:
    """The calibration set on its way through the decoder layers of a model.

    Args:
        view: The model, in evaluation mode and without gradients.
        examples: The calibration examples.
        answer_weight: Added to the weight 1 of every token that is scored or predicts one that is.
        memory_budget: Bytes for the activations of a batch, as a number or as text such as
            `"4GB"`; `"auto"` does not limit them.

    Attributes:
        layers: The decoder layers.
        output_templates: What each layer returned once, which says how it returns its hidden
            states.
        streams: The batches, between two layers.
    """

    def __init__(
        self,
        view: ModelView,
        examples: list[CalibrationExample],
        answer_weight: float = 0.0,
        memory_budget: int | str = "auto",
    ) -> None:
        self.model = view.model
        self.layers = view.layers
        longest = max(len(example.input_ids) for example in examples)
        size = max(1, _tokens_per_batch(view.model, longest, memory_budget) // longest)
        # How each layer returns its output is seen on a single token.
        named = {str(index): layer for index, layer in enumerate(self.layers)}
        with recorded_calls(named) as calls:
            view.model(input_ids=examples[0].input_ids[None, :1].to(view.device), use_cache=False)
        self.output_templates = [calls[name].output for name in named]
        with onloaded(view.model, besides=[*self.layers, view.model.get_output_embeddings()]):
            self.streams = [
                LayerBatch(
                    batch,
                    _token_weights(batch, answer_weight),
                    *_first_input(view.model, self.layers, self.output_templates, batch.input_ids),
                )
                for batch in batches(examples, size)
            ]

    def begin(self, index: int) -> None:
        """Be told that layer `index` is about to be pruned."""

    def statistics(
        self, index: int, matrices: Iterable[Matrix], gram: bool = False, advance: bool = False
    ) -> dict[Matrix, InputStatistics]:
        """Run layer `index` as it is now and return the statistics of its matrices' inputs.

        Args:
            index: The layer; all before it have been passed with `advance`.
            matrices: Prunable matrices of this layer. Those that have the same input share their
                statistics.
            gram: Whether to sum x_i x_j too.
            advance: Whether to pass the layer as well, as `advance` does.

        Raises:
            ValueError: A matrix is run in a way whose inputs cannot be seen.
        """
        collector = _Collector(self.model, list(matrices), gram)
        with onloaded(self.layers[index]):
            for stream in self.streams:
                with collector.collecting(stream):
                    output = self.run(index, stream, stream.hidden)
                if advance:
                    stream.hidden = output
        return collector.statistics

    def advance(self, index: int) -> None:
        """Run layer `index` as it is now; its outputs become the inputs of the next one."""
        with onloaded(self.layers[index]):
            for stream in self.streams:
                stream.hidden = self.run(index, stream, stream.hidden)

    def run(self, index: int, stream: "LayerBatch", hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = stream.arguments[index]
        return hidden_states_of(self.layers[index](hidden, *args, **kwargs))


@dataclass
class LayerBatch:
    """One batch between two layers.

    Attributes:
        batch: The examples.
        weights: Weight of each real position, float32 `[positions]`; `None` if all are 1.
        hidden: Hidden states, `[examples, tokens, hidden]`.
        arguments: The other arguments of every layer.
    """

    batch: Batch
    weights: torch.Tensor | None
    hidden: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def real_rows(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        """Those of `[examples, tokens, width]` that are no padding: `[positions, width]`.

        Args:
            hidden: What a module sees or returns.
            name: Of what is looked at, for the error.

        Raises:
            ValueError: These are not the tokens of the stream.
        """
        rows = hidden.reshape(-1, hidden.shape[-1])
        real = self.batch.real.flatten().to(hidden.device)
        if len(rows) != len(real):
            raise ValueError(
                f"{name} saw {len(rows)} tokens of {len(real)}: which of them are padding cannot "
                "be told, so criteria that look at inputs cannot prune it"
            )
        return rows[real]

    def weights_on(self, device: torch.device) -> torch.Tensor | None:
        """`weights`, on a device."""
        return None if self.weights is None else self.weights.to(device)


def _tokens_per_batch(model: PreTrainedModel, longest: int, memory_budget: int | str) -> int:
    """Tokens that pass a layer together, so that their activations fit the budget."""
    tokens = _TOKENS_PER_BATCH.get(device_of(model).type, 2048)
    if memory_budget == "auto":
        return tokens
    return min(tokens, parse_size(memory_budget) // activation_bytes_per_token(model, longest))


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
    input_ids: torch.Tensor,
) -> tuple[torch.Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Input of the first layer, and the other arguments of every layer, which do not run.

    `output_templates` are outputs of the layers, which say how each returns its hidden states.
    """
    inputs: list[torch.Tensor] = []
    arguments = []

    def skip(output_template: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest, keywords = split_hidden(args, kwargs)
            inputs.append(hidden)
            arguments.append((rest, keywords))
            return repack_output(output_template, hidden)

        return forward

    with ExitStack() as stack:
        head = model.get_output_embeddings()
        stack.enter_context(replaced_forward(head, lambda hidden: hidden))
        for layer, output_template in zip(layers, output_templates, strict=True):
            stack.enter_context(replaced_forward(layer, skip(output_template)))
        model(input_ids=input_ids.to(device_of(model)), use_cache=False, **only_last_logits(model))
    return inputs[0], arguments


class _Collector:
    """Adds up statistics while a layer runs."""

    def __init__(self, model: PreTrainedModel, matrices: list[Matrix], gram: bool) -> None:
        self.statistics: dict[Matrix, InputStatistics] = {}
        self._gram = gram
        self._projections: list[tuple[nn.Module, Matrix]] = []
        self._experts: dict[nn.Module, list[Matrix]] = {}
        for matrix in matrices:
            module = model.get_submodule(matrix.module)
            if matrix.expert is None:
                self._projections.append((module, matrix))
            else:
                _rule_of(matrix)
                self._experts.setdefault(module, []).append(matrix)

    @contextmanager
    def collecting(self, stream: LayerBatch) -> Iterator[None]:
        """Add what the layer sees of a stream in this context."""
        seen: list[tuple[torch.Tensor, InputStatistics]] = []

        def projection_hook(matrix: Matrix) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                inputs = args[0]
                for tensor, statistics in seen:
                    if tensor is inputs:
                        self.statistics[matrix] = statistics
                        return
                rows = stream.real_rows(inputs, matrix.name)
                statistics = self._of(matrix, rows)
                statistics.add_(rows, stream.weights_on(rows.device))
                seen.append((inputs, statistics))

            return hook

        def experts_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            name = self._experts[module][0].name
            rows, chosen = stream.real_rows(args[0], name), stream.real_rows(args[1], name)
            weights = stream.weights_on(rows.device)
            for matrix in self._experts[module]:
                assert matrix.expert is not None
                tokens, _ = routed(chosen, matrix.expert)
                inputs = expert_input(module, matrix, rows[tokens])
                own_weights = None if weights is None else weights[tokens]
                self._of(matrix, inputs).add_(inputs, own_weights)

        with ExitStack() as stack:
            for module, matrix in self._projections:
                handle = module.register_forward_pre_hook(projection_hook(matrix))
                stack.callback(handle.remove)
            for module in self._experts:
                stack.callback(module.register_forward_pre_hook(experts_hook).remove)
            yield

    def _of(self, matrix: Matrix, inputs: torch.Tensor) -> InputStatistics:
        if matrix not in self.statistics:
            self.statistics[matrix] = InputStatistics.empty(
                inputs.shape[-1], inputs.device, self._gram
            )
        return self.statistics[matrix]


def expert_input(module: nn.Module, matrix: Matrix, hidden: torch.Tensor) -> torch.Tensor:
    """Return the input of an expert's matrix, from the tokens `[tokens, hidden]` routed to it.

    Raises:
        ValueError: How it comes about is not known.
    """
    return _rule_of(matrix)(module, matrix, hidden)


def _rule_of(matrix: Matrix) -> Callable[[nn.Module, Matrix, torch.Tensor], torch.Tensor]:
    name = matrix.parameter.rpartition(".")[2]
    if name not in _EXPERT_INPUTS:
        raise ValueError(
            f"{matrix.name}: how an expert's input of {name!r} comes about is not known (known: "
            f"{', '.join(_EXPERT_INPUTS)}); criteria that look at inputs cannot prune it. Add it "
            "to _EXPERT_INPUTS in optimum_cap/pruning/activations.py"
        )
    return _EXPERT_INPUTS[name]


# Inputs of an expert's projection, from the tokens `[tokens, hidden]` that are routed to it.


def _hidden_states(module: nn.Module, matrix: Matrix, hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _gated(module: nn.Module, matrix: Matrix, hidden: torch.Tensor) -> torch.Tensor:
    assert matrix.expert is not None
    return gated(module, matrix.expert, hidden)


_EXPERT_INPUTS: dict[str, Callable[[nn.Module, Matrix, torch.Tensor], torch.Tensor]] = {
    "gate_up_proj": _hidden_states,
    "down_proj": _gated,
}
