"""Estimates the sensitivities of all sites with one backward pass, one layer at a time."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import torch
from torch import nn

from optimum_cap.config import parse_size
from optimum_cap.data import CalibrationExample
from optimum_cap.methods import CriterionInputs, InputStatistics, kth_smallest, wanda
from optimum_cap.models import (
    Matrix,
    ModelView,
    RecordedCall,
    SharedStates,
    Site,
    Targets,
    evaluation_mode,
    expert_output,
    experts_call,
    float32_on_cpu,
    gated,
    hidden_states_of,
    logits_of,
    onloaded,
    positions_per_chunk,
    recorded_calls,
    routed,
    without_parameter_grads,
)
from optimum_cap.progress import progress_bar
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.cache import SensitivityStore
from optimum_cap.pruning.collector import LayerBatch
from optimum_cap.pruning.sensitivity import (
    FEWEST_EXAMPLES,
    Sensitivity,
    group_by_layer,
    sensitivity_of,
    temporary_weights,
)
from optimum_cap.runtime import ALONE, LANES, ProcessGroup, check_same_inputs

_SAVED = 3  # memory that a layer saves for its backward pass, in units of its activations

Group = tuple[Site, list[Matrix]]
"""A site, and its matrices to prune."""


@dataclass(frozen=True)
class FisherEstimate:
    """The results of one backward pass.

    Attributes:
        sensitivities: The sensitivities of all sites, as `measure_sensitivities` returns them.
        output_weights: For each matrix outside experts, the mean square of the gradients at each
            of its outputs, float32 `[out]`: the weight of a squared error there.
    """

    sensitivities: list[Sensitivity]
    output_weights: dict[Matrix, torch.Tensor]


def estimate_sensitivities(
    view: ModelView,
    layers: Mapping[int, list[Matrix]],
    examples: list[CalibrationExample],
    zeros_per_matrix: Mapping[Matrix, int],
    count: int | None = None,
    seed: int = 0,
    answer_weight: float = 0.0,
    memory_budget: int | str = "auto",
    store: SensitivityStore | None = None,
    process_group: ProcessGroup = ALONE,
) -> FisherEstimate:
    """Estimate the sensitivities of all sites with one backward pass.

    To second order, the divergence caused by a change d in the output of a block is d F d / 2,
    where F is the Fisher information (Martens 2020, arXiv 1412.1193, section 5). d F d is the mean
    of (g d)^2, where g is the gradient of a random combination of the logits whose coefficients
    have the covariance diag(p) - p p^T of the likelihood's gradient. Labels drawn from p would give
    the same covariance, but a confident model nearly always draws the same label. The change d is
    the change of the block's output when its site is pruned with Wanda, the fastest criterion that
    uses inputs.

    The backward pass runs layer by layer, from the last to the first, each from its stored input,
    so only one layer has to be in memory, with the activations of one batch.

    Args:
        view: The dense model; it is left unchanged.
        layers: The matrices to prune, by decoder layer.
        examples: The calibration examples, in random order; the first ones are used.
        zeros_per_matrix: Number of zeros of each matrix.
        count: Number of examples to use; `None` uses `examples_to_estimate`.
        seed: Seed of the random combinations.
        answer_weight: As for `measure_sensitivities`.
        memory_budget: Bytes for the activations of a batch, text such as `"4GB"`, or `"auto"` for
            the batches of `LayerwisePass`.
        store: Stores the estimates for a resumed run.
        process_group: The processes that share the examples; all of them must call this.

    Returns:
        The sensitivities, and the weights of outputs from the same gradients.

    Raises:
        ConnectionError: Another process of the group has stopped.
    """
    check_same_inputs(process_group, view.model, examples, count, seed)
    by_layer = group_by_layer(view.sites, layers)
    groups = [group for layer_groups in by_layer.values() for group in layer_groups]
    if count is None:
        count = examples_to_estimate(len(examples))
    chosen = examples[:count]
    sizes = {
        matrix: view.oriented(matrix).shape[0]
        for _, matrices in groups
        for matrix in matrices
        if matrix.expert is None
    }
    outputs = sum(sizes.values())
    estimates = store.get_estimated(len(groups), len(chosen), outputs, seed) if store else None
    # Other processes may not have access to the first one's folder.
    estimates = process_group.broadcast(estimates)
    if estimates is None:
        settings = _Settings(zeros_per_matrix, seed, answer_weight, memory_budget, process_group)
        estimates = _estimate(view, by_layer, chosen, sizes, settings)
        if store:
            store.put_estimated(*estimates, seed)
    divergences, flat = estimates
    return FisherEstimate(
        [
            sensitivity_of(view.model, *group, of_site)
            for group, of_site in zip(groups, divergences, strict=True)
        ],
        dict(zip(sizes, flat.split(list(sizes.values())), strict=True)),
    )


@dataclass(frozen=True)
class _Settings:
    """Settings of an estimate; as for `estimate_sensitivities`."""

    zeros_per_matrix: Mapping[Matrix, int]
    seed: int
    answer_weight: float
    memory_budget: int | str
    process_group: ProcessGroup


def _estimate(
    view: ModelView,
    by_layer: Mapping[int, list[Group]],
    chosen: list[CalibrationExample],
    sizes: Mapping[Matrix, int],
    settings: _Settings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergences, float64 `[sites, examples]`, and the weights of outputs, `[outputs]`.

    Args:
        view: The model.
        by_layer: The sites with their matrices.
        chosen: The examples.
        sizes: Number of outputs of each matrix outside experts, in the order of the weights.
        settings: The settings.
    """
    count = len(view.layers)
    rows = _positions_of(by_layer)
    process_group = settings.process_group
    divergences = torch.zeros(len(rows), len(chosen), dtype=torch.float64)
    weights_by_lane: list[dict[Matrix, torch.Tensor]] = [{} for _ in range(LANES)]
    budget = settings.memory_budget
    with (
        evaluation_mode(view.model),
        float32_on_cpu(view.model),
        without_parameter_grads(view.model),
        progress_bar(
            total=2 * count, desc="Estimating sensitivities", unit="layer", delay=5
        ) as progress,
    ):
        approximation = WandaApproximation(view, settings.zeros_per_matrix)
        budget = budget if budget == "auto" else max(1, parse_size(budget) // _SAVED)
        layerwise = LayerwisePass(
            view, chosen, settings.answer_weight, budget, process_group=process_group
        )
        backward = BackwardPass(view, layerwise, settings.seed)
        for layer in range(count):
            matrices = [matrix for _, group in by_layer.get(layer, []) for matrix in group]
            backward.record(layer)
            approximation.fit(layerwise.statistics(layer, matrices, advance=True))
            progress.update()
        backward.begin()
        products: dict[tuple[str, int], torch.Tensor] = {}  # for sites of earlier layers
        for layer in reversed(range(count)):
            groups = by_layer.get(layer, [])
            again = _uses_of_earlier(view, by_layer, layer)
            with onloaded(view.layers[layer]):
                pruned = {
                    matrix: approximation.pruned(matrix)
                    for _, matrices in (*groups, *(group for _, group in again))
                    for matrix in matrices
                }
                for position, batch in enumerate(layerwise.batches):
                    here = [*groups, *((site, matrices) for site, (_, matrices) in again)]
                    backward.run(layer, position, here, weights_by_lane[batch.lane])
                    for site, (first, matrices) in again:
                        of_site = {matrix: pruned[matrix] for matrix in matrices}
                        product = backward.product_with_change(site, of_site, position)
                        key = first.name, position
                        products[key] = products[key] + product if key in products else product
                    for site, matrices in groups:
                        of_site = {matrix: pruned[matrix] for matrix in matrices}
                        product = backward.product_with_change(site, of_site, position)
                        product = product + products.get((site.name, position), 0)
                        divergences[rows[site.name], batch.batch.positions] = product.square() / 2
            progress.update()
    weights = torch.zeros(sum(sizes.values()))
    for of_lane in weights_by_lane:
        for matrix, of_outputs in zip(sizes, weights.split(list(sizes.values())), strict=True):
            if matrix in of_lane:
                of_outputs += of_lane[matrix]
    process_group.sum_(divergences)
    process_group.sum_(weights)
    return divergences, weights


def _uses_of_earlier(
    view: ModelView, by_layer: Mapping[int, list[Group]], layer: int
) -> list[tuple[Site, Group]]:
    """Return the sites of a layer that share their output projection with an earlier layer's site.

    Each comes with the earlier site and its matrices to prune.
    """
    by_output = {
        site.output_proj: (site, matrices)
        for index, groups in by_layer.items()
        if index < layer
        for site, matrices in groups
    }
    sites = [site for site in view.sites if site.layer == layer and site.aliases]
    return [(site, by_output[site.output_proj]) for site in sites if site.output_proj in by_output]


def _positions_of(by_layer: Mapping[int, list[Group]]) -> dict[str, int]:
    """Return the position of each site in the list of all sites."""
    names = [site.name for groups in by_layer.values() for site, _ in groups]
    return {name: position for position, name in enumerate(names)}


class BackwardPass:
    """Runs the backward pass of a random combination of logits, one decoder layer at a time.

    Call `record` before `layerwise` advances past each layer, `begin` after the last one, and then
    `run` for each batch of each layer, from the last layer to the first.

    Args:
        view: The model, in evaluation mode and without gradients of parameters.
        layerwise: The forward pass.
        seed: Seed of the random combinations.
    """

    def __init__(self, view: ModelView, layerwise: LayerwisePass, seed: int) -> None:
        self._view = view
        self._layerwise = layerwise
        self._seed = seed
        self._inputs: dict[int, list[torch.Tensor]] = {}
        self._gradients: list[torch.Tensor] = []  # at the outputs of the layer that runs next
        self._shared_gradients: list[dict[Any, list[torch.Tensor]]] = []
        self._calls: dict[str, RecordedCall] = {}
        self._of_outputs: dict[str, torch.Tensor] = {}
        self._layer: _LayerRun

    def record(self, index: int) -> None:
        """Store the inputs of layer `index` in CPU memory."""
        self._inputs[index] = [batch.hidden.cpu() for batch in self._layerwise.batches]

    def begin(self) -> None:
        """Compute the gradients at the outputs of the last layer."""
        self._gradients = [self._gradient_of_draw(batch) for batch in self._layerwise.batches]
        self._shared_gradients = [{} for _ in self._layerwise.batches]

    def _gradient_of_draw(self, batch: LayerBatch) -> torch.Tensor:
        """Return the gradient of a random combination of the logits of each example.

        It is divided by the square root of the example's number of scored tokens, so that squares
        are means over these tokens. Logits are computed for a few positions at a time.
        """
        view, targets = self._view, Targets.of(batch.batch)
        hidden = batch.hidden
        gradient = torch.zeros_like(hidden)
        size = positions_per_chunk(view.model, hidden.device)
        template = view.output_templates[-1]
        for row, position in enumerate(batch.batch.positions):
            columns = targets.columns[targets.rows == row].to(hidden.device)
            generator = _generator(self._seed, position)
            for chunk in columns.split(size):
                chosen = hidden[..., row, chunk, :].unsqueeze(-2).requires_grad_()
                with torch.enable_grad():
                    # A copy, because the model may change the assumed output of a layer in place.
                    logits = logits_of(view.model, view.layers, template, chosen.clone())
                draw = fisher_draw(logits.detach().float().softmax(dim=-1), generator)
                draw *= len(columns) ** -0.5
                [of_chosen] = torch.autograd.grad(logits, chosen, draw.to(logits.dtype))
                gradient[..., row, chunk, :] = of_chosen.squeeze(-2)
        return gradient

    def run(
        self,
        index: int,
        position: int,
        groups: Iterable[Group],
        output_weights: dict[Matrix, torch.Tensor],
    ) -> None:
        """Run layer `index` forward and backward on a batch.

        Args:
            index: The layer, in memory.
            position: Position of the batch.
            groups: Sites of the layer with their matrices to prune.
            output_weights: Sums to which the squared gradients at the outputs of these matrices are
                added.
        """
        layerwise = self._layerwise
        batch = layerwise.batches[position]
        groups = list(groups)
        paths = dict.fromkeys(site.output_module for site, _ in groups)
        modules = {path: self._view.model.get_submodule(path) for path in paths}
        shared = None if batch.shared is None else _Leaves(batch.shared)
        with ExitStack() as stack:
            calls = stack.enter_context(recorded_calls(modules))
            offsets = _offsets(stack, modules)
            _sum_squares(stack, self._view, groups, output_weights)
            stack.enter_context(torch.enable_grad())
            hidden = self._inputs[index][position].to(batch.hidden.device).requires_grad_()
            self._inputs[index][position] = torch.empty(0)  # no longer needed
            # A copy, because a layer may change its input in place.
            output = layerwise.run(
                index, batch, hidden.clone(), None if shared is None else shared.states
            )
            outputs, gradients = [output], [self._gradients[position].to(output.device)]
            if shared is not None:
                of_shared = self._shared_gradients[position]
                for produced, gradient in shared.produced(of_shared):
                    outputs.append(produced)
                    gradients.append(gradient)
            leaves = [hidden, *offsets.values(), *(shared.leaves if shared is not None else ())]
            found = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
        if shared is not None:
            shared.add_gradients(self._shared_gradients[position], found[1 + len(offsets) :])
        self._layer = _LayerRun(index, hidden.detach(), output.detach(), gradients[0])
        self._gradients[position] = torch.zeros_like(hidden) if found[0] is None else found[0]
        self._calls = calls
        self._of_outputs = {
            path: torch.zeros_like(offset) if gradient is None else gradient
            for (path, offset), gradient in zip(offsets.items(), found[1:], strict=False)
        }

    def product_with_change(
        self, site: Site, pruned: Mapping[Matrix, torch.Tensor], position: int
    ) -> torch.Tensor:
        """Return the product of the gradient and the change of a pruned site's output.

        The output is that of the site's output module or, where no module around the site can run
        alone, that of the layer. An expert runs on the tokens routed to it.

        Args:
            site: A site of the layer and batch of the last `run`.
            pruned: Its pruned matrices, `[out, in]`.
            position: Position of the batch.

        Returns:
            float64 `[examples]`.
        """
        model, batch = self._view.model, self._layerwise.batches[position]
        examples = len(batch.batch.positions)
        if not site.runs_alone:
            layer = self._layer
            with temporary_weights(model, pruned):
                shared = copy.copy(batch.shared)
                changed = self._layerwise.run(layer.index, batch, layer.hidden, shared)
            return _sums(layer.gradient, changed - layer.output, examples)
        call, gradient = self._calls[site.output_module], self._of_outputs[site.output_module]
        output_module = model.get_submodule(site.output_module)
        if site.expert is None:
            with temporary_weights(model, pruned):
                changed = hidden_states_of(output_module(call.hidden, *call.args, **call.kwargs))
            return _sums(gradient, changed - hidden_states_of(call.output), examples)
        routes = experts_call(output_module, site.block, (call.hidden, *call.args), call.kwargs)
        tokens, slots = routed(routes.chosen, site.expert)
        if not len(tokens):
            return torch.zeros(examples, dtype=torch.float64)
        expert, inputs = site.expert, routes.inputs(site.expert, tokens)

        def output() -> torch.Tensor:
            return expert_output(output_module, expert, gated(output_module, expert, inputs))

        change = -output()
        with temporary_weights(model, pruned):
            change += output()
        # For the tokens of this expert, if each expert has its own tokens.
        gradient = gradient.reshape(-1, len(routes.chosen), gradient.shape[-1])
        at_tokens = gradient[site.expert if len(gradient) > 1 else 0, tokens]
        weighted = at_tokens.float() * routes.weights[tokens, slots, None].float()
        of_tokens = (weighted * change.float()).sum(dim=1)
        example = tokens // (len(routes.chosen) // examples)
        return torch.bincount(example.cpu(), of_tokens.double().cpu(), minlength=examples)


@dataclass(frozen=True)
class _LayerRun:
    """One run of a layer on a batch, with the gradient at its output."""

    index: int
    hidden: torch.Tensor
    output: torch.Tensor
    gradient: torch.Tensor


def _sums(gradient: torch.Tensor, change: torch.Tensor, examples: int) -> torch.Tensor:
    """Return the dot products of each example, float64 `[examples]`."""
    products = gradient.float() * change.float()
    if products.ndim < 3 or products.shape[-3] != examples:  # concatenated tokens of all examples
        return products.reshape(examples, -1).sum(dim=1).double().cpu()
    return (
        products.sum(dim=[d for d in range(products.ndim) if d != products.ndim - 3]).double().cpu()
    )


class _Leaves:
    """Keys and values that layers share, as leaves of one layer's graph.

    Args:
        shared: All of them; a layer reads some and may replace others with its own.
    """

    def __init__(self, shared: SharedStates) -> None:
        self.states = copy.copy(shared)
        self._given = {
            key: tuple(tensor.detach().requires_grad_() for tensor in tensors)
            for key, tensors in shared.items()
        }
        self.states.update(self._given)

    @property
    def leaves(self) -> list[torch.Tensor]:
        """All of them, as passed to the layer."""
        return [tensor for tensors in self._given.values() for tensor in tensors]

    def produced(
        self, gradients: dict[Any, list[torch.Tensor]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the tensors that the layer replaced and that have gradients, with their gradients.

        Args:
            gradients: The gradients from later layers; those returned are removed.
        """
        pairs = []
        for key, tensors in self.states.items():
            if tensors is not self._given.get(key) and key in gradients:
                of_key = zip(tensors, gradients.pop(key), strict=True)
                pairs += [(tensor, gradient) for tensor, gradient in of_key if tensor.requires_grad]
        return pairs

    def add_gradients(
        self,
        gradients: dict[Any, list[torch.Tensor]],
        found: Iterable[torch.Tensor | None],
    ) -> None:
        """Add the gradients of the leaves to those from other layers."""
        remaining = iter(found)
        for key, tensors in self._given.items():
            of_key = [next(remaining) for _ in tensors]
            if all(gradient is None for gradient in of_key):
                continue
            before = gradients.get(key) or [torch.zeros_like(tensor) for tensor in tensors]
            gradients[key] = [
                total if gradient is None else total + gradient
                for total, gradient in zip(before, of_key, strict=True)
            ]


def _offsets(stack: ExitStack, modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Add zeros with gradients to the outputs of modules; return them for the modules that run."""
    offsets: dict[str, torch.Tensor] = {}

    def offset(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = hidden_states_of(output)
            offsets[path] = torch.zeros_like(hidden, requires_grad=True)
            shifted = hidden + offsets[path]
            if isinstance(output, tuple | list):
                return type(output)([shifted, *output[1:]])
            return shifted

        return hook

    for path, module in modules.items():
        stack.callback(module.register_forward_hook(offset(path)).remove)
    return offsets


def _sum_squares(
    stack: ExitStack,
    view: ModelView,
    groups: Iterable[Group],
    sums: dict[Matrix, torch.Tensor],
) -> None:
    """Add the squared gradients at the outputs of matrices to `sums`, float32 `[out]`."""

    def hook_of(matrix: Matrix) -> Callable[..., None]:
        def add(gradient: torch.Tensor) -> None:
            squares = gradient.float().reshape(-1, gradient.shape[-1]).square().sum(dim=0).cpu()
            sums[matrix] = sums[matrix] + squares if matrix in sums else squares

        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return hook

    for site, matrices in groups:
        for matrix in matrices:
            if matrix.expert is None:
                name = site.aliases.get(matrix.parameter, matrix.parameter)
                module = view.model.get_submodule(name.rpartition(".")[0])
                stack.callback(module.register_forward_hook(hook_of(matrix)).remove)


class WandaApproximation:
    """Prunes with Wanda, storing one threshold and the input statistics per matrix.

    Args:
        view: The model.
        zeros_per_matrix: Number of zeros of each matrix.
    """

    def __init__(self, view: ModelView, zeros_per_matrix: Mapping[Matrix, int]) -> None:
        self._view = view
        self._zeros = zeros_per_matrix
        self._thresholds: dict[Matrix, float] = {}
        self._inputs: dict[Matrix, InputStatistics] = {}

    def fit(self, statistics: Mapping[Matrix, InputStatistics]) -> None:
        """Compute the thresholds of dense matrices from the statistics of their inputs."""
        self._inputs.update(statistics)
        self._thresholds.update({matrix: self._threshold(matrix) for matrix in statistics})

    def _threshold(self, matrix: Matrix) -> float:
        zeros = self._zeros[matrix]
        return kth_smallest(lambda: (self._importance(matrix),), zeros).value if zeros else -inf

    def pruned(self, matrix: Matrix) -> torch.Tensor:
        """Return a pruned matrix, `[out, in]`, with all weights up to the threshold set to zero."""
        pruned = self._importance(matrix) <= self._thresholds[matrix]
        return self._view.weights(matrix).masked_fill(pruned, 0)

    def _importance(self, matrix: Matrix) -> torch.Tensor:
        inputs = CriterionInputs(matrix.name, statistics=self._inputs[matrix])
        return wanda(self._view.weights(matrix), inputs)


def fisher_draw(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw vectors with mean 0 and covariance diag(p) - p p^T.

    Args:
        probabilities: p of each position, float32 `[positions, vocabulary]`.
        generator: Generator of the draw, on the CPU.

    Returns:
        float32 `[positions, vocabulary]`.
    """
    draw = probabilities.sqrt()
    draw *= torch.randn(draw.shape, generator=generator).to(draw)
    return draw.addcmul_(probabilities, draw.sum(dim=1, keepdim=True), value=-1)


def _generator(seed: int, position: int) -> torch.Generator:
    """Return the random generator of an example, independent of its batch."""
    example_seed = int(np.random.SeedSequence([seed, position]).generate_state(1)[0])
    return torch.Generator().manual_seed(example_seed)


def examples_to_estimate(examples: int) -> int:
    """Return the number of examples for one backward pass: one in eight, at least 16."""
    return max(FEWEST_EXAMPLES, examples // 8)
