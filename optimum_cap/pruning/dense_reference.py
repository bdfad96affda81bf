"""Runs the calibration set through the pruned model and the dense one, side by side.

Later matrices can compensate for the errors of pruned ones. For that, `DenseReferencePass` adds to
the input statistics of a matrix the error of its outputs relative to the dense model and, where a
projection joins the residual stream, the error of the stream up to that point.

No second copy of the model is needed: only the dense weights of the current layer are kept until
both models have passed it.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import nn

from optimum_cap.data import CalibrationExample
from optimum_cap.methods import InputStatistics
from optimum_cap.models import (
    Matrix,
    ModelView,
    RecordedCall,
    SharedStates,
    Site,
    StopForwardError,
    hidden_states_of,
    onloaded,
    prunable_matrices,
    recorded_calls,
)
from optimum_cap.pruning.activations import LayerwisePass, add_inputs_, check_statistics
from optimum_cap.pruning.collector import InputCollector, LayerBatch, Route
from optimum_cap.pruning.residual import modules_that_join

Calls = dict[str, RecordedCall]
"""Calls of output modules, by path."""


class DenseReferencePass(LayerwisePass):
    """A `LayerwisePass` that also runs the dense model, as a reference.

    Call `begin` before anything in a layer is pruned, `statistics` for matrices that are still
    dense (earlier matrices may be pruned), and `advance` when the layer is finished.

    Args:
        view: The model, in evaluation mode and without gradients.
        examples: The calibration examples.
        answer_weight: As for `LayerwisePass`.
        memory_budget: As for `LayerwisePass`.
        most_examples: As for `LayerwisePass`.
    """

    def __init__(
        self,
        view: ModelView,
        examples: list[CalibrationExample],
        answer_weight: float = 0.0,
        memory_budget: int | str = "auto",
        most_examples: int | None = None,
    ) -> None:
        super().__init__(view, examples, answer_weight, memory_budget, most_examples)
        self._dense_hidden = [batch.hidden for batch in self.batches]
        self._dense_shared = [copy.copy(batch.shared) for batch in self.batches]
        self._dense_outputs: list[torch.Tensor] = []  # of the current layer, once computed
        self._dense_weights: dict[str, torch.Tensor] = {}
        self._sites: dict[int, list[Site]] = {}
        self._site_of_output_proj: dict[Matrix, Site] = {}
        for site in view.sites:
            self._sites.setdefault(site.layer, []).append(site)
            self._site_of_output_proj.setdefault(site.output_proj, site)
        self._joining: dict[tuple[str, ...], set[str]] = {}

    def begin(self, index: int) -> None:
        """Store the dense weights of layer `index`; call this while it is still dense."""
        names = dict.fromkeys(matrix.parameter for matrix in prunable_matrices(self._sites[index]))
        with onloaded(self.layers[index]):
            self._dense_weights = {
                name: self.model.get_parameter(name).data.clone() for name in names
            }
            # Decided here, so that a resumed run bases the decision on the same layer of each kind.
            self.joining_modules(index)

    def advance(self, index: int) -> None:
        """Run layer `index` in its current state, and with its dense weights."""
        with onloaded(self.layers[index]):
            super().advance(index)
            if not self._dense_outputs:
                with self._dense(index):
                    self._dense_outputs = [
                        self.run(index, *dense)
                        for dense in zip(
                            self.batches, self._dense_hidden, self._dense_shared, strict=True
                        )
                    ]
        self._dense_hidden, self._dense_outputs = self._dense_outputs, []
        self._dense_weights = {}

    def statistics(
        self, index: int, matrices: Iterable[Matrix], gram: bool = True, advance: bool = False
    ) -> dict[Matrix, InputStatistics]:
        """Return the statistics of the inputs of matrices, with the errors of their outputs.

        The tokens of an expert are those the pruned model routes to it. They are weighted by the
        square of their routing weight, like their errors in the sum over experts.

        Args and raises: as for `LayerwisePass.statistics`.
        """
        matrices = list(matrices)
        collector = self.collector(index, matrices)
        sites = (self._site_of_output_proj.get(matrix) for matrix in matrices)
        # After the last output projections (usually of an MLP), little of the layer remains to
        # compute, so the dense model finishes it here.
        last = max(site.level for site in self._sites[index])
        to_the_end = any(site is not None and site.level == last for site in sites)
        statistics: dict[Matrix, InputStatistics] = {}
        moments: dict[Matrix, torch.Tensor] = {}
        outputs = []
        with onloaded(self.layers[index]):
            for batch, dense_hidden, dense_shared in zip(
                self.batches, self._dense_hidden, self._dense_shared, strict=True
            ):
                inputs, routes, calls, _ = self._inputs(
                    index, collector, batch, batch.hidden, batch.shared
                )
                with self._dense(index):
                    dense_inputs, _, dense_calls, output = self._inputs(
                        index, collector, batch, dense_hidden, dense_shared, routes, to_the_end
                    )
                if output is not None:
                    outputs.append(output)
                stream_errors = self._stream_errors(index, batch, dense_hidden, calls, dense_calls)
                for matrix, x in inputs.items():
                    add_inputs_(statistics, matrix, x, routes[matrix].error_weights, gram)
                for matrix in matrices:
                    leader = collector.leaders[matrix]
                    route, x = routes[leader], inputs[leader]
                    error = self._dense_product(matrix, dense_inputs[leader] - x)
                    site = self._site_of_output_proj.get(matrix)
                    if site is not None and site.output_module in stream_errors:
                        error += route.share_of(stream_errors[site.output_module]).to(x.device)
                    if (weights := route.error_weights) is not None:
                        error *= weights.unsqueeze(1)
                    moment = error.T @ x
                    moments[matrix] = moments[matrix] + moment if matrix in moments else moment
        if outputs:
            self._dense_outputs = outputs
        if advance:
            self.advance(index)
        check_statistics(statistics)
        return {
            matrix: replace(
                statistics[collector.leaders[matrix]], output_error_moment=moments[matrix]
            )
            for matrix in matrices
        }

    def joining_modules(self, index: int) -> set[str]:
        """Return the output modules of a layer whose output joins the residual stream unchanged.

        In other layers, a norm, a factor or a gate follows the module. One batch determines this
        for all layers with the same modules.
        """
        prefix = self._sites[index][0].layer_name
        names = tuple(
            dict.fromkeys(site.output_module.removeprefix(prefix) for site in self._sites[index])
        )
        if names not in self._joining:
            modules = {name: self.model.get_submodule(prefix + name) for name in names}
            shared = copy.copy(self._dense_shared[0])  # the layer runs on changed inputs
            with self._dense(index):
                self._joining[names] = modules_that_join(
                    modules,
                    self._dense_hidden[0],
                    lambda hidden: self.run(index, self.batches[0], hidden, shared),
                )
        return {prefix + name for name in self._joining[names]}

    @contextmanager
    def _dense(self, index: int) -> Iterator[None]:
        """Give layer `index` its dense weights within this context."""
        with onloaded(self.layers[index]):
            parameters = {name: self.model.get_parameter(name) for name in self._dense_weights}
            pruned_weights = {name: parameter.data for name, parameter in parameters.items()}
            try:
                for name, parameter in parameters.items():
                    parameter.data = self._dense_weights[name]
                yield
            finally:
                for name, parameter in parameters.items():
                    parameter.data = pruned_weights[name]

    def _inputs(
        self,
        index: int,
        collector: InputCollector,
        batch: LayerBatch,
        hidden: torch.Tensor,
        shared: SharedStates | None,
        routes: dict[Matrix, Route] | None = None,
        to_the_end: bool = False,
    ) -> tuple[dict[Matrix, torch.Tensor], dict[Matrix, Route], Calls, torch.Tensor | None]:
        """Run a layer until its matrices have received their inputs.

        Args:
            index: The layer.
            collector: Collects the inputs.
            batch: The batch.
            hidden: The input of the layer.
            shared: Keys and values from earlier layers.
            routes: Routes to use for experts instead of this run's.
            to_the_end: Whether to run the whole layer.

        Returns:
            The inputs, float32 `[tokens, in]`, and the routes of the leading matrices; the calls of
            output modules; and the output of the layer, if it ran to the end.
        """
        inputs: dict[Matrix, torch.Tensor] = {}
        used_routes: dict[Matrix, Route] = {}
        last = max(site.level for site in self._sites[index])
        before_last = {
            site.output_module: self.model.get_submodule(site.output_module)
            for site in self._sites[index]
            if site.level < last
        }
        output = None

        def receive(matrix: Matrix, rows: torch.Tensor, route: Route) -> None:
            inputs[matrix], used_routes[matrix] = rows.float(), route

        with (
            suppress(StopForwardError),
            recorded_calls(before_last) as calls,
            collector.collecting(batch, receive, routes, stop_early=not to_the_end),
        ):
            output = self.run(index, batch, hidden, shared)
        return inputs, used_routes, calls, output if to_the_end else None

    def _dense_product(self, matrix: Matrix, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the dense matrix, `[tokens, out]`, for inputs `[tokens, in]`."""
        weight = matrix.of(self._dense_weights[matrix.parameter]).float()
        return nn.functional.linear(inputs, self.view.in_orientation(matrix, weight))

    def _stream_errors(
        self,
        index: int,
        batch: LayerBatch,
        dense_hidden: torch.Tensor,
        calls: Calls,
        dense_calls: Calls,
    ) -> dict[str, torch.Tensor]:
        """Return the error of the residual stream at output modules: `[real tokens, hidden]`."""
        joining = self.joining_modules(index)
        levels: dict[int, set[str]] = {}
        for site in self._sites[index]:
            levels.setdefault(site.level, set()).add(site.output_module)
        errors: dict[str, torch.Tensor] = {}
        error = dense_hidden - batch.hidden
        for level in sorted(levels):
            paths = levels[level] & joining
            for path in paths:
                errors[path] = batch.real_rows(error, path) / len(paths)
            known = all(path in calls and calls[path].output is not None for path in levels[level])
            if not known or not levels[level] <= joining:
                break  # the stream after this level is unknown
            for path in levels[level]:
                dense_output = hidden_states_of(dense_calls[path].output)
                change = dense_output - hidden_states_of(calls[path].output)
                error = error + change.to(error.device).view_as(error)
        return errors
