"""The cost of removing experts, heads, channels or layers, and the resulting model size.

The smaller model is built on the meta device just as pruning builds it. Its size is therefore
exact, and shapes or sparsities that pruning would refuse are refused here as well.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from optimum_cap.config import CAPConfig, Method
from optimum_cap.estimation.costs import RANKING_PASSES, Cost, CostModel, Part
from optimum_cap.estimation.hardware import LAYERWISE_ROWS
from optimum_cap.estimation.work import (
    LayerWork,
    ModelWork,
    OperationCount,
    Product,
    Workload,
    apart,
    count_work,
)
from optimum_cap.methods import COLUMN_ROUNDS, CRITERIA
from optimum_cap.models import auto_class, find_sites, have_own_tokens, positions_per_chunk
from optimum_cap.pruning import (
    CANDIDATES,
    COMPARED_BYTES,
    COMPARED_TOKENS,
    EXAMPLES_PER_STEP,
    MEASURED_EXAMPLES,
    MEASURED_EXAMPLES_FOR_LAYERS,
    MOST_ROUNDS,
    PartRemoval,
)
from optimum_cap.runtime import ALONE, LANES

# Float32 numbers read or written in a round of `remove_columns`, per weight of the matrix and per
# element of the inverse Hessian: errors, and both updates; measured for 1024 to 4096 inputs.
WEIGHT_PASSES = 5
INVERSE_PASSES = 6
FITTED_PASSES = 10  # per weight of a fitted matrix: copied, replaced, and restored
COPY_PASSES = 4  # per weight of the smaller model, built once as a check and once as the result
SLOT_PASSES = 7  # over hidden states, to add one expert's output for each token
ERROR_PASSES = 7  # over hidden states, to compare two outputs of a mixture
INFLUENCE_PASSES = 10  # over hidden states, to compare them before and after a layer
LOGIT_COPIES = 5  # float32 copies of a chunk of logits while comparing two predictions


def model_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model from its config on the meta device."""
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def methods_of(pattern: str) -> dict[str, Method]:
    """Return the recipes `causal` and `causal_fast` with a pattern that removes parts."""
    return {
        recipe: CAPConfig(0.5, recipe=recipe, pattern=pattern).method
        for recipe in ("causal", "causal_fast")
    }


@dataclass(frozen=True)
class RemovedParts:
    """The parts a model loses, and the remaining model.

    Attributes:
        pattern: `"experts"`, `"heads"`, `"channels"` or `"layers"`.
        before: Number of parts of each layer, or of layers.
        count: How many of them are removed.
        dense: The work of the dense model.
        smaller: The work of the smaller model.
        dense_bytes: Bytes of the weights of the dense model on disk.
        stored_bytes: Bytes of the weights of the smaller model on disk.
        alike: Whether the size does not depend on which parts are removed.
        own_tokens: Whether each expert gets its own tokens, so that errors are not compared.
        logit_positions: Positions at which logits are computed at a time, by kind of device.
    """

    pattern: str
    before: int
    count: int
    dense: ModelWork
    smaller: ModelWork
    dense_bytes: int
    stored_bytes: int
    alike: bool
    own_tokens: bool
    logit_positions: dict[str, int]

    @classmethod
    def of(cls, model_config: PretrainedConfig, config: CAPConfig) -> "RemovedParts":
        """Return the parts a model loses.

        Args:
            model_config: The config of the dense model, which is built on the meta device.
            config: Pattern and sparsity.

        Raises:
            CannotRemoveError: The model has no such parts or no smaller model, or the sparsity
                rounds to none or all of them.
        """
        return cls.by(PartRemoval(model_on_meta(model_config), config, ALONE), config.pattern)

    @classmethod
    def by(cls, removal: PartRemoval, pattern: str) -> "RemovedParts":
        """Return what a model on the meta device loses by a removal.

        Args:
            removal: The removal.
            pattern: What it removes.
        """
        smaller, view = removal.sample(), removal.view
        model = view.model
        blocks = {site.block for site in view.sites if site.expert is not None}
        sizes = {sum(each.numel() for each in layer.parameters()) for layer in view.layers}
        return cls(
            pattern=pattern,
            before=removal.before,
            count=removal.count,
            dense=count_work(model, view.sites),
            smaller=count_work(smaller, find_sites(smaller)),
            dense_bytes=sum(parameter.nbytes for parameter in model.parameters()),
            stored_bytes=sum(parameter.nbytes for parameter in smaller.parameters()),
            alike=pattern != "layers" or len(sizes) == 1,
            own_tokens=any(have_own_tokens(model.get_submodule(block)) for block in blocks),
            logit_positions={
                kind: positions_per_chunk(model, torch.device(kind)) for kind in LAYERWISE_ROWS
            },
        )

    @property
    def thinned(self) -> list[Product]:
        """The output projections that lose inputs."""
        return [
            before
            for old, new in zip(self.dense.layers, self.smaller.layers, strict=False)
            for before, after in zip(old.products, new.products, strict=False)
            if self.pattern in ("heads", "channels") and before.inputs != after.inputs
        ]

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria that the recipes `causal` and `causal_fast` choose these parts with."""
        return tuple(dict.fromkeys(method.criterion for method in self.methods.values()))

    @property
    def methods(self) -> dict[str, Method]:
        """The recipes `causal` and `causal_fast`, if their criterion can choose these parts."""
        return {
            recipe: method
            for recipe, method in methods_of(self.pattern).items()
            if not (self.own_tokens and method.criterion == "routed_error")
        }


@dataclass(frozen=True)
class Smaller:
    """The size of a model that has lost parts.

    Attributes:
        pattern: `"experts"`, `"heads"`, `"channels"`, `"layers"` or `"structured"`.
        before: Number of parts of each layer, or of layers; `None` with `"structured"`, where a
            measurement decides on them.
        after: How many of them are left; `None` likewise.
        parameters: Number of parameters that are left; with `"structured"` about.
        disk: Bytes of its weights on disk; likewise.
        weights_left: Fraction of the weights that multiply a token, which bounds the speed; `None`
            with `"structured"`.
        alike: Whether it makes no difference to the size which parts are removed.
    """

    pattern: str
    before: int | None
    after: int | None
    parameters: int
    disk: int
    weights_left: float | None
    alike: bool


class RemovalCosts:
    """Computes the cost of removing parts.

    Args:
        parts: What is removed.
        dense: The cost model of the dense model.
    """

    def __init__(self, parts: RemovedParts, dense: CostModel) -> None:
        self.parts = parts
        self.dense = dense
        self.smaller = CostModel(parts.smaller, dense.hardware, dense.value, dense.stored)

    @property
    def left(self) -> Smaller:
        """The size of what is left."""
        parts = self.parts
        return Smaller(
            pattern=parts.pattern,
            before=parts.before,
            after=parts.before - parts.count,
            parameters=parts.smaller.parameters,
            disk=parts.stored_bytes,
            weights_left=parts.smaller.multiplied / parts.dense.multiplied,
            alike=parts.alike,
        )

    def all(self, shape: Workload) -> list[Cost]:
        """Return the cost of each step, and of the recipes `causal` and `causal_fast`."""
        methods = self.parts.methods
        steps = [self.choosing(criterion, shape) for criterion in self.parts.criteria]
        steps += [self.refining(m.refine, shape) for m in methods.values() if m.refine]
        return steps + [self.pruning(name, method, shape) for name, method in methods.items()]

    def choosing(self, criterion: str, shape: Workload) -> Cost:
        """Return the cost of choosing the parts, and of fitting the kept weights of matrices."""
        part = CHOICES[criterion](self, shape)
        return self.dense.cost("choose", criterion, [part], self.dense.weights, 0.0)

    def refining(self, passes: int, shape: Workload) -> Cost:
        """Return the cost of fitting all layers that are left in some passes."""
        part = self.refinement(passes, shape)
        weights, disk = self.dense.weights + self.smaller.weights, self.resumable(passes)
        return self.dense.cost("refine", f"{passes} passes", [part], weights, disk)

    def pruning(self, name: str, method: Method, shape: Workload) -> Cost:
        """Return the cost of the whole run, excluding scoring and loading.

        Args:
            name: Name of the cost.
            method: The pruning method.
            shape: The calibration set.
        """
        chosen = CHOICES[method.criterion](self, shape)
        fitted = self._fitted if CRITERIA[method.criterion].removes_columns else 0.0
        memory = [chosen.memory, 2 * fitted + self.smaller.weights]
        steps = [chosen, self.checks(method, shape)]
        if method.refine:
            steps.append(self.refinement(method.refine, shape))
            memory.append(fitted + self.smaller.weights + steps[-1].memory)
        return self.dense.cost(
            "prune",
            name,
            [replace(step, memory=0.0) for step in steps],
            self.dense.weights + max(memory),
            self.parts.stored_bytes + self.resumable(method.refine),
        )

    def resumable(self, passes: int) -> float:
        """Return the bytes of refined layers in the resume folder."""
        return float(self.dense.stored.itemsize * self.parts.smaller.prunable) if passes else 0.0

    @property
    def _fitted(self) -> float:
        """Bytes of new weights, in float32, of the output projections that lose inputs."""
        return 4.0 * sum(product.weights for product in self.parts.thinned)

    def checks(self, method: Method, shape: Workload) -> Part:
        """Return the cost of the checks before and after, and of building the smaller model.

        The first batch runs twice (`check_first_batch`), and one example runs through both models:
        with arbitrary parts removed, and again with the chosen ones unless weights were fitted.
        """
        work, smaller = self.parts.dense, self.parts.smaller
        one = replace(shape, examples=1)
        first = replace(shape, examples=max(1, self.rows(shape) // shape.tokens))
        compared = 1 if self.parts.pattern in ("heads", "channels") else 2
        counted = compared * (work.layer_passes(one) + smaller.layer_passes(one))
        if method.needs_data:
            counted += 2 * work.layer_passes(first)
        seconds = self.dense.seconds(counted, shape.tokens) + self.dense.checking().seconds
        seconds += self.dense.through_memory(COPY_PASSES * smaller.parameters)
        return Part(counted.operations, seconds)

    def refinement(self, passes: int, shape: Workload) -> Part:
        """Return the cost of fitting every layer that is left, while the dense model runs too."""
        method = Method("divergence", "uniform", refine=passes)  # only the passes matter
        fitting = self.smaller.refinement(method, shape)
        dense = self.parts.dense.layer_passes(shape)
        seconds = self.dense.seconds(dense, EXAMPLES_PER_STEP * shape.tokens)
        return replace(
            fitting,
            operations=fitting.operations + dense.operations,
            memory=fitting.memory + self.hidden(shape),
            in_lanes=fitting.in_lanes + seconds,
        )

    def rows(self, shape: Workload) -> int:
        """Return the tokens of a batch of a layer-by-layer pass."""
        most = max(1, LAYERWISE_ROWS[self.dense.hardware.kind] // shape.tokens)
        return min(shape.examples, most) * shape.tokens

    def hidden(self, shape: Workload) -> float:
        """Return the bytes of the hidden states of all examples."""
        tokens = shape.examples * shape.tokens
        return float(tokens * self.parts.dense.layers[0].hidden * self.dense.value)

    def seconds(self, work: OperationCount, shape: Workload) -> float:
        """Return the seconds that work takes in layer-by-layer passes."""
        return self.dense.seconds(work, self.rows(shape))

    def layerwise(self, passes: int, shape: Workload) -> Part:
        """Return the cost of running all layers a number of times, one after the other."""
        counted = passes * self.parts.dense.layer_passes(shape)
        held = self.dense.layer_activations(shape)
        return Part(counted.operations, self.seconds(counted, shape), held)


# Choices of channels and heads


def _by_columns(costs: RemovalCosts, shape: Workload) -> Part:
    """Return the cost of `remove_columns` after a layer-by-layer pass, for each layer."""
    parts, dense = costs.parts, costs.dense
    passes = _input_statistics(costs, shape)
    tokens = shape.examples * shape.tokens
    products, factors, moved, launches = 0.0, 0.0, 0.0, 0
    held, of_layer = 0.0, len(parts.thinned) / len(parts.dense.layers)
    for product in parts.thinned:
        inputs, outputs, copies = product.inputs, product.outputs, product.copies
        size = inputs // parts.before
        at_once = math.ceil(parts.count / COLUMN_ROUNDS)
        rounds = math.ceil(parts.count / at_once)
        products += 2.0 * tokens * product.active * inputs**2
        products += copies * 2.0 * parts.count * size * (outputs + inputs) * inputs
        if size > 1:  # solve a small system of equations for each group
            each = 2 / 3 * size**3 + 2.0 * size**2 * outputs
            products += copies * rounds * parts.before * each
            launches += copies * rounds * parts.before
        factors += copies * inputs**3
        per_round = WEIGHT_PASSES * inputs * outputs + INVERSE_PASSES * inputs**2
        moved += copies * (rounds * per_round + FITTED_PASSES * inputs * outputs)
        sums = 4.0 * copies * inputs**2
        solving = 12.0 * (inputs**2 + inputs * outputs)
        held = max(held, max(1.0, of_layer) * max(LANES * sums, sums + solving))
    computed = products / dense.hardware.float32 + factors / dense.hardware.factor
    seconds = dense.together(
        computed + dense.through_memory(moved), launches * dense.hardware.launch
    )
    return Part(
        passes.operations + products + factors,
        passes.seconds + seconds,
        passes.memory + held + costs._fitted,
    )


def _input_statistics(costs: RemovalCosts, shape: Workload) -> Part:
    """Return the cost of a pass that collects the inputs of the thinned matrices."""
    passes = costs.layerwise(2, shape)
    if not any(product.copies > 1 for product in costs.parts.thinned):
        return passes
    again = costs.parts.dense.experts_again(shape)
    return replace(
        passes,
        operations=passes.operations + again.operations,
        seconds=passes.seconds + costs.seconds(again, shape),
    )


def _by_importance_of_inputs(costs: RemovalCosts, shape: Workload) -> Part:
    passes = _input_statistics(costs, shape)
    return replace(passes, seconds=passes.seconds + _by_importance(costs, shape).seconds)


def _by_importance(costs: RemovalCosts, shape: Workload) -> Part:
    weights = sum(product.weights for product in costs.parts.thinned)
    return Part(0.0, costs.dense.through_memory(RANKING_PASSES * weights))


# Choices of layers and experts


def _few(shape: Workload, pattern: str) -> Workload:
    """Return the examples on which divergences are measured."""
    most = MEASURED_EXAMPLES_FOR_LAYERS if pattern == "layers" else MEASURED_EXAMPLES
    return replace(shape, examples=min(most, shape.examples))


def _by_divergence(costs: RemovalCosts, shape: Workload) -> Part:
    """Return the cost of measuring the model's predictions without each part, repeatedly."""
    few, dense = _few(shape, costs.parts.pattern), costs.dense
    trials = _layer_trials if costs.parts.pattern == "layers" else _expert_trials
    counted, ranking = trials(costs.parts, few), Part(0.0, 0.0)
    if costs.parts.pattern == "experts" and _has_shortlist(costs.parts):
        ranking = _compared_errors(costs, few)
    # The hidden states before a layer, the initial ones, those of a trial, and the final ones.
    hidden = costs.hidden(few)
    positions = dense.hardware.kind
    logits = min(few.targets, costs.parts.logit_positions[positions]) * dense.work.head.outputs
    held = dense.layer_activations(few) + 3 * hidden + 4.0 * LOGIT_COPIES * logits
    return Part(
        counted.operations + ranking.operations,
        costs.seconds(counted, few) + ranking.seconds,
        held + ranking.memory,
    )


def _layer_trials(parts: RemovedParts, few: Workload) -> OperationCount:
    """Return the work of removing layers: all are tried first, then the best candidates again.

    A trial runs the layers after the removed one; in addition, the model runs all layers once.
    """
    work, layers = parts.dense, len(parts.dense.layers)
    one_pass, rows_and_pairs = work.layer_passes(few), apart(few)
    counted = 2 * one_pass + layers * work.divergence(few)
    for index, layer in enumerate(work.layers):
        counted += index * layer.forward(*rows_and_pairs)
    for left in range(layers - 1, layers - parts.count, -1):
        trials = min(CANDIDATES, left)
        passes = (left + trials * (left - 1) / 2) / layers
        counted += passes * one_pass + trials * work.divergence(few)
    return counted


def _has_shortlist(parts: RemovedParts) -> bool:
    """Whether the errors of experts determine which of them are tried."""
    return parts.before > CANDIDATES and not parts.own_tokens


def _rounds(parts: RemovedParts) -> list[tuple[int, int]]:
    """Return the number of experts before each round, and how many the round removes."""
    at_once = math.ceil(parts.count / MOST_ROUNDS)
    return [
        (parts.before - gone, min(at_once, parts.count - gone))
        for gone in range(0, parts.count, at_once)
    ]


def _expert_trials(parts: RemovedParts, few: Workload) -> OperationCount:
    """Return the work of removing experts from the first layer to the last.

    A trial runs the expert's layer and all later ones.
    """
    work, rows_and_pairs = parts.dense, apart(few)
    of_layer = sum(
        min(left, CANDIDATES + removed - 1) if _has_shortlist(parts) else left
        for left, removed in _rounds(parts)
    )
    counted = 2 * work.layer_passes(few)
    passing = 0
    for layer in work.layers:
        if layer.experts:
            passing += of_layer
            counted += of_layer * work.divergence(few)
        counted += passing * layer.forward(*rows_and_pairs)
    return counted


def _compared_errors(costs: RemovalCosts, shape: Workload) -> Part:
    """Return the cost of comparing each mixture's output without each of its experts."""
    parts, dense = costs.parts, costs.dense
    hidden = parts.dense.layers[0].hidden
    batch = costs.rows(shape)
    most = min(COMPARED_TOKENS, COMPARED_BYTES // (4 * hidden * parts.before))
    tokens = min(shape.examples * shape.tokens, math.ceil(max(1, most) / batch) * batch)
    comparisons = 1 + sum(left for left, _ in _rounds(parts))
    counted = OperationCount()
    for layer in parts.dense.layers:
        if layer.experts:
            counted += layer.forward(tokens, tokens * shape.tokens)
            counted += tokens * _all_experts(layer)
            moved = (SLOT_PASSES * _active(layer) + ERROR_PASSES) * layer.hidden
            routed = OperationCount(moved=moved, passed=1)
            for router in layer.routers:
                routed += router.per_token
            counted += comparisons * tokens * routed
    outputs = 2.0 * tokens * hidden * parts.before * dense.value
    return Part(counted.operations, dense.seconds(counted, batch), outputs)


def _all_experts(layer: LayerWork) -> OperationCount:
    """Return the work of running all experts of a layer for one token."""
    counted = OperationCount()
    for product in layer.rest:
        if product.copies > 1:
            counted += replace(product, active=product.copies).per_token
    return counted


def _active(layer: LayerWork) -> int:
    """Return the number of experts that are active for a token."""
    return max(product.active for product in layer.rest if product.copies > 1)


def _by_routed_error(costs: RemovalCosts, shape: Workload) -> Part:
    passes, compared = costs.layerwise(1, shape), _compared_errors(costs, shape)
    return Part(
        passes.operations + compared.operations,
        passes.seconds + compared.seconds,
        passes.memory + compared.memory,
    )


def _by_routes(costs: RemovalCosts, shape: Workload) -> Part:
    """Return the cost of recording the routing of tokens, before the layer runs again."""
    return costs.layerwise(2, shape)


def _by_weighted_outputs(costs: RemovalCosts, shape: Workload) -> Part:
    """Return the cost of running the active experts again, one by one."""
    passes = costs.layerwise(2, shape)
    counted = OperationCount()
    for layer in costs.parts.dense.layers:
        for product in layer.rest:
            if product.copies > 1:
                counted += shape.examples * shape.tokens * product.per_token
    return replace(
        passes,
        operations=passes.operations + counted.operations,
        seconds=passes.seconds + costs.seconds(counted, shape),
    )


def _by_influence(costs: RemovalCosts, shape: Workload) -> Part:
    passes = costs.layerwise(1, shape)
    elements = costs.hidden(shape) / costs.dense.value * len(costs.parts.dense.layers)
    compared = costs.dense.through_memory(INFLUENCE_PASSES * elements)
    return replace(passes, seconds=passes.seconds + compared)


def _free(costs: RemovalCosts, shape: Workload) -> Part:
    """Return no cost: parts are drawn at random, or ranked by existing scores."""
    return Part(0.0, 0.0)


CHOICES: dict[str, Callable[[RemovalCosts, Workload], Part]] = {
    "least_squares": _by_columns,
    "wanda": _by_importance_of_inputs,
    "magnitude": _by_importance,
    "divergence": _by_divergence,
    "routed_error": _by_routed_error,
    "reap": _by_weighted_outputs,
    "frequency": _by_routes,
    "routing_weight": _by_routes,
    "block_influence": _by_influence,
    "causal_score": _free,
    "random": _free,
}
"""The cost of choosing parts, by the criterion."""
