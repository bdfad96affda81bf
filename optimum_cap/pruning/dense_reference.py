"""The calibration set on its way through the pruned model and the dense one, side by side.

What a pruned layer gets wrong, the next matrices can make up for, if they know what the dense model
has in the same place. `DenseReferencePass` tells them: to the statistics of the inputs it adds what
the outputs of a matrix lack of the dense model's, and, where a projection joins the residual
stream, what the stream itself lacks by then.

A second copy of the model is not needed: a layer that is being pruned keeps its dense weights until
both have passed it.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from optimum_cap.data import CalibrationExample
from optimum_cap.methods import InputStatistics
from optimum_cap.models import (
    Matrix,
    ModelView,
    RecordedCall,
    Site,
    hidden_states_of,
    is_transposed,
    onloaded,
    prunable_matrices,
    recorded_calls,
    repack_output,
    replaced_forward,
    routed,
    routing,
)
from optimum_cap.pruning.activations import LayerBatch, LayerwisePass, expert_input

_ROUNDING = 4  # times the machine epsilon: what counts as equal

Calls = dict[str, RecordedCall]
"""Calls of the modules of a layer, by path."""


class DenseReferencePass(LayerwisePass):
    """A `LayerwisePass` that takes the dense model along.

    Call `begin` before anything in a layer is pruned, `statistics` for matrices that are still
    dense (those that feed them may be pruned), and `advance` when the layer is done.

    Args:
        view: The model, in evaluation mode and without gradients.
        examples: The calibration examples.
        answer_weight: As for `LayerwisePass`.
        memory_budget: As for `LayerwisePass`.
    """

    def __init__(
        self,
        view: ModelView,
        examples: list[CalibrationExample],
        answer_weight: float = 0.0,
        memory_budget: int | str = "auto",
    ) -> None:
        super().__init__(view, examples, answer_weight, memory_budget)
        self._dense_hidden = [stream.hidden for stream in self.streams]
        self._dense_outputs: list[torch.Tensor] = []  # of the layer, once they are known
        self._dense_weights: dict[str, torch.Tensor] = {}
        self._sites: dict[int, list[Site]] = {}
        self._mixing: dict[Matrix, Site] = {}
        for site in view.sites:
            self._sites.setdefault(site.layer, []).append(site)
            self._mixing[site.output_proj] = site
        self._joining: dict[tuple[str, ...], set[str]] = {}

    def begin(self, index: int) -> None:
        """Keep the dense weights of layer `index`, nothing of which has been pruned so far."""
        names = dict.fromkeys(matrix.parameter for matrix in prunable_matrices(self._sites[index]))
        with onloaded(self.layers[index]):
            self._dense_weights = {
                name: self.model.get_parameter(name).data.clone() for name in names
            }
            # Here, so that the same layer decides for those built alike in a run that goes on.
            self._joining_outlets(index)

    def advance(self, index: int) -> None:
        """Pass layer `index`, by the model as it is now and by the dense one."""
        with onloaded(self.layers[index]):
            super().advance(index)
            if not self._dense_outputs:
                with self._dense(index):
                    self._dense_outputs = [
                        self.run(index, stream, hidden)
                        for stream, hidden in zip(self.streams, self._dense_hidden, strict=True)
                    ]
        self._dense_hidden, self._dense_outputs = self._dense_outputs, []
        self._dense_weights = {}

    def statistics(
        self, index: int, matrices: Iterable[Matrix], gram: bool = True, advance: bool = False
    ) -> dict[Matrix, InputStatistics]:
        """Return the statistics of the inputs of matrices, with what their outputs miss.

        An expert's tokens are those that the pruned model routes to it. They weigh by the square of
        their routing weight, as their errors do in the sum over experts.

        Args and raises: as `LayerwisePass.statistics`.
        """
        own = list(matrices)
        # Once the dense model is as far as that, the rest of the layer costs it little.
        output_proj = (self._mixing[matrix] for matrix in own if matrix in self._mixing)
        to_the_end = any(site.kind != "attention" for site in output_proj)
        found: dict[Matrix, InputStatistics] = {}
        leaders: dict[Matrix, Matrix] = {}
        missing: dict[Matrix, torch.Tensor] = {}
        outputs = []
        with onloaded(self.layers[index]):
            for stream, dense_hidden in zip(self.streams, self._dense_hidden, strict=True):
                calls, _ = self._seen(index, stream, stream.hidden, own)
                routes = {matrix: self._route(matrix, stream, calls) for matrix in own}
                inputs = self._inputs(stream, calls, routes)
                with self._dense(index):
                    dense_calls, output = self._seen(index, stream, dense_hidden, own, to_the_end)
                    if output is not None:
                        outputs.append(output)
                    dense_inputs = self._inputs(stream, dense_calls, routes)
                lost = self._lost(index, stream, dense_hidden, calls, dense_calls)
                for matrix, route in routes.items():
                    x, weights = inputs[matrix].float(), route.weights
                    # Those with the same input share the statistics of the first.
                    leader = next(other for other in own if inputs[other] is inputs[matrix])
                    leaders[matrix] = leader
                    if leader == matrix:
                        if matrix not in found:
                            found[matrix] = InputStatistics.empty(x.shape[1], x.device, gram)
                        found[matrix].add_(x, weights)
                    lacking = self._outputs(matrix, dense_inputs[matrix].float() - x)
                    site = self._mixing.get(matrix)
                    if site is not None and site.output_module in lost:
                        lacking += route.of(lost[site.output_module]).to(x.device)
                    if weights is not None:
                        lacking *= weights.unsqueeze(1)
                    product = lacking.T @ x
                    missing[matrix] = missing[matrix] + product if matrix in missing else product
        if outputs:
            self._dense_outputs = outputs
        if advance:
            self.advance(index)
        return {
            matrix: replace(found[leader], output_error_moment=missing[matrix])
            for matrix, leader in leaders.items()
        }

    @contextmanager
    def _dense(self, index: int) -> Iterator[None]:
        """Give layer `index` its dense weights."""
        with onloaded(self.layers[index]):
            parameters = {name: self.model.get_parameter(name) for name in self._dense_weights}
            own = {name: parameter.data for name, parameter in parameters.items()}
            try:
                for name, parameter in parameters.items():
                    parameter.data = self._dense_weights[name]
                yield
            finally:
                for name, parameter in parameters.items():
                    parameter.data = own[name]

    def _seen(
        self,
        index: int,
        stream: LayerBatch,
        hidden: torch.Tensor,
        matrices: list[Matrix],
        to_the_end: bool = False,
    ) -> tuple[Calls, torch.Tensor | None]:
        """Calls of the modules of matrices and of the attention; output of the layer if it ends."""
        inlets = {matrix.module: self.model.get_submodule(matrix.module) for matrix in matrices}
        attention = {
            site.output_module: self.model.get_submodule(site.output_module)
            for site in self._sites[index]
            if site.kind == "attention"
        }
        with ExitStack() as stack:
            calls = stack.enter_context(recorded_calls({**inlets, **attention}))

            def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
                if inlets.keys() <= calls.keys():
                    raise _AllSeenError

            if not to_the_end:
                for module in inlets.values():
                    stack.callback(module.register_forward_pre_hook(stop).remove)
            try:
                output = self.run(index, stream, hidden)
            except _AllSeenError:
                return calls, None
        if unseen := sorted(inlets.keys() - calls.keys()):
            raise ValueError(
                f"{type(self.model).__name__} did not run {', '.join(unseen)}, whose inputs cannot "
                "be seen: leave it dense (modules_to_leave_dense), or choose target 'local'"
            )
        return calls, output

    def _route(self, matrix: Matrix, stream: LayerBatch, calls: Calls) -> "_Route":
        """Which tokens reach a matrix; the experts get those chosen, and their weights, beside."""
        if matrix.expert is None:
            return _Route(None, stream.weights_on(calls[matrix.module].hidden.device), None)
        given = routing(matrix.module, calls[matrix.module].args)
        chosen, weights = (stream.real_rows(own, matrix.name) for own in given)
        weights = weights.float()
        tokens, slots = routed(chosen, matrix.expert)
        own = weights[tokens, slots]
        squares = own.square()
        if (of_stream := stream.weights_on(squares.device)) is not None:
            squares = squares * of_stream[tokens]
        return _Route(tokens, squares, weights[tokens].sum(dim=1))

    def _inputs(
        self, stream: LayerBatch, calls: Calls, routes: dict[Matrix, "_Route"]
    ) -> dict[Matrix, torch.Tensor]:
        """Inputs of matrices at the real tokens that reach them, `[tokens, in]`."""
        rows: dict[int, torch.Tensor] = {}
        inputs = {}
        for matrix, route in routes.items():
            hidden = calls[matrix.module].hidden
            if id(hidden) not in rows:
                rows[id(hidden)] = stream.real_rows(hidden, matrix.name)
            own = rows[id(hidden)]
            if route.tokens is not None:
                module = self.model.get_submodule(matrix.module)
                own = expert_input(module, matrix, own[route.tokens])
            inputs[matrix] = own
        return inputs

    def _outputs(self, matrix: Matrix, inputs: torch.Tensor) -> torch.Tensor:
        """What the dense matrix makes of inputs `[tokens, in]`, without a bias: `[tokens, out]`."""
        weight = matrix.of(self._dense_weights[matrix.parameter]).float()
        return nn.functional.linear(
            inputs, weight.T if is_transposed(self.model, matrix) else weight
        )

    def _lost(
        self,
        index: int,
        stream: LayerBatch,
        dense_hidden: torch.Tensor,
        calls: Calls,
        dense_calls: Calls,
    ) -> dict[str, torch.Tensor]:
        """What the residual stream lacks at each output module: `[real tokens, hidden]`."""
        joining = self._joining_outlets(index)
        attention = {site.output_module for site in self._sites[index] if site.kind == "attention"}
        lost = {}
        error = dense_hidden - stream.hidden
        if attention <= joining:
            for path in attention:
                lost[path] = stream.real_rows(error, path) / len(attention)
            others = joining - attention
            if all(calls[path].output is not None for path in attention):
                for path in attention:
                    gone = hidden_states_of(dense_calls[path].output) - hidden_states_of(
                        calls[path].output
                    )
                    error = error + gone.to(error.device)
                for path in others:
                    lost[path] = stream.real_rows(error, path) / len(others)
        return lost

    def _joining_outlets(self, index: int) -> set[str]:
        """Outlets of a layer whose output the residual stream takes as it is.

        Not those behind which a norm, a factor or a gate changes it. Seen on one batch, once for
        all layers that are built alike.
        """
        prefix = self._sites[index][0].layer_name
        outlets = dict.fromkeys(
            site.output_module.removeprefix(prefix) for site in self._sites[index]
        )
        key = tuple(outlets)
        if key not in self._joining:
            self._joining[key] = self._find_joining(
                index, [prefix + output_module for output_module in key]
            )
        return {prefix + output_module for output_module in self._joining[key]}

    def _find_joining(self, index: int, outlets: list[str]) -> set[str]:
        """Add a known change to the layer's input and to each output: does it come out again?"""
        prefix = self._sites[index][0].layer_name
        stream, hidden = self.streams[0], self._dense_hidden[0]
        modules = {path: self.model.get_submodule(path) for path in outlets}
        with self._dense(index):
            with recorded_calls(modules) as calls:
                whole = self.run(index, stream, hidden)
            hidden = hidden.to(whole.device)
            random = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
            change = random.to(hidden) * whole.std()

            def comes_out(changed: str | None) -> bool:
                with ExitStack() as stack:
                    for path, module in modules.items():
                        output = hidden_states_of(calls[path].output)
                        if path == changed:
                            output = output + change.view_as(output)
                        given = repack_output(calls[path].output, output)
                        stack.enter_context(replaced_forward(module, _giving(given)))
                    start = hidden if changed else hidden + change
                    off = self.run(index, stream, start) - whole - change
                size = float(whole.abs().mean() + change.abs().mean())
                return float(off.abs().mean()) <= _ROUNDING * torch.finfo(whole.dtype).eps * size

            if not comes_out(None):
                return set()
            return {path.removeprefix(prefix) for path in outlets if comes_out(path)}


@dataclass(frozen=True)
class _Route:
    """Which of the real tokens of a stream reach a matrix.

    Attributes:
        tokens: Their positions, int64 `[tokens]`; `None` if all do.
        weights: How much each counts, float32 `[tokens]`; `None` if all count alike.
        total: Sum of the routing weights of each token, over which experts share an error, float32
            `[tokens]`; `None` if no routing chose them.
    """

    tokens: torch.Tensor | None
    weights: torch.Tensor | None
    total: torch.Tensor | None

    def of(self, lost: torch.Tensor) -> torch.Tensor:
        """What the matrix is to make up for, of `[real tokens, hidden]`."""
        if self.tokens is None or self.total is None:
            return lost.float()
        shared = lost.to(self.tokens.device)[self.tokens].float()
        # Experts whose weights are all zero can make up for nothing.
        total = self.total.unsqueeze(1)
        return (shared / total).where(total > 0, 0)


class _AllSeenError(Exception):
    """Ends a forward pass of which all that is wanted was seen."""


def _giving(output: Any) -> Any:
    return lambda *args, **kwargs: output
