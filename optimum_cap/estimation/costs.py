"""What each step costs: the work of a model over the rates of the hardware.

What is assumed is named in capitals here and in `hardware.py`, and explained in `docs/estimate.md`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from optimum_cap.config import COMPILING, RECIPES, CAPConfig, Method
from optimum_cap.estimation.hardware import ROWS, WALK_ROWS, Hardware
from optimum_cap.estimation.work import AlpsWork, ModelWork, ObsWork, OperationCount, Workload
from optimum_cap.evaluation import TASKS
from optimum_cap.methods import CRITERIA
from optimum_cap.pruning import examples_to_estimate, examples_to_measure

USABLE = 0.9  # of the memory of a device, as accelerate reckons for device_map="auto"
LAUNCHES_PER_LAYER = 60  # small operations that one run of a layer takes
# The same for a column that SparseGPT prunes; on a CPU views count too.
LAUNCHES_PER_COLUMN = {"cpu": 22, "cuda": 12}
THRESHOLD_PASSES = 40  # float32 numbers through memory per weight that a threshold is sought among
RANKING_PASSES = 30  # the same for ranking rows, beside the sort
STEP_PASSES = 25  # the same for a step of ALPS, beside its products
INPUT_PASSES = 6  # the same per input of a matrix: picked, squared and summed
CHECK_PASSES = 12  # the same per prunable weight: checked, masked, stored, and its zeros counted
MASK_PASSES = 8  # the same for a mask whose threshold is known: importance, comparison, new weights
STAGES = 4  # of a layer, before which its inputs are looked at again (`stages_by_layer`)
BLOCK = 4096  # bytes that files take on disk at a time
HEADER = 200  # bytes of a chunk's file beside its losses
CACHE_PASSES = 3  # times that generation moves the keys and values: read, and copied to grow


@dataclass(frozen=True)
class Cost:
    """What one step costs.

    Attributes:
        step: `"score"`, `"prune"` or `"eval"`.
        name: Of the estimator, the recipe or the tasks.
        operations: Floating-point operations in products.
        seconds: On as many devices as one copy needs; exact scoring that fits on one, on all.
        memory: Bytes for weights and activations of one copy of the model.
        disk: Bytes written.
        devices: Devices that one copy of the model needs at least.
    """

    step: str
    name: str
    operations: float
    seconds: float
    memory: float
    disk: float
    devices: int


class CostModel:
    """Turns the work of a model into the cost of each step.

    Args:
        work: The work.
        hardware: What does it.
        value: Bytes per weight and activation.
    """

    def __init__(self, work: ModelWork, hardware: Hardware, value: int) -> None:
        self.work = work
        self.hardware = hardware
        self.value = value
        self.weights = float(work.parameters * value)
        self.rows = ROWS[hardware.kind]

    def scoring(
        self, name: str, shape: Workload, exact_examples: int = CAPConfig.exact_examples
    ) -> Cost:
        """Cost of scoring all units that the work counts as scored.

        Processes, each with a whole copy of the model on a device of its own, share what is exact
        (`distributed.py`); each of them does all of the rest.

        Args:
            name: The estimator; `"adaptive"` as if it measured every loss, which is at most so.
            shape: The calibration set.
            exact_examples: Examples that `"control_variate"` measures exactly.
        """
        alone, shared = ESTIMATORS[name](self.work, shape, exact_examples)
        hold = ACTIVATIONS[name]
        # Chunks shrink to the memory that is there, down to one stream of one example.
        devices = self._devices(self.weights + hold(self, replace(shape, examples=1), 1))
        wanted = self.weights + hold(self, shape, self.rows)
        half_of_free = (self.weights + devices * self.hardware.memory) / 2
        return Cost(
            step="score",
            name=name,
            operations=alone.operations + shared.operations,
            seconds=self.seconds(alone) + self.seconds(shared) / self._processes(devices),
            memory=min(wanted, half_of_free),
            disk=8.0 * (1 + self.work.scored) * shape.examples
            + self._chunks(name, shape, exact_examples),
            devices=devices,
        )

    def _chunks(self, name: str, shape: Workload, exact_examples: int) -> float:
        """Bytes of the files of finished chunks."""
        if name not in COMPILING:  # what compiles measures exactly, chunk by chunk
            return 0.0
        if name == "control_variate":
            shape = replace(shape, examples=min(shape.examples, exact_examples))
        # After a prefix a batch has all tokens of a chunk, else a quarter (`wavefront.py`).
        suffix, parts = shape.tokens - shape.prefix, 1 if shape.prefix else 4
        examples = min(shape.examples, max(1, self.rows // parts // suffix))
        streams = max(1, self.rows // (shape.prefix + examples * suffix))
        blocks = math.ceil((8 * streams * examples + HEADER) / BLOCK)
        chunks = math.ceil(shape.examples / examples) * (1 + math.ceil(self.work.scored / streams))
        return float(BLOCK * blocks * chunks)

    def pruning(
        self,
        name: str,
        method: Method,
        shape: Workload,
        sparsity: float,
        measured: int | None = None,
    ) -> Cost:
        """Cost of pruning one copy of the model, scores given, and of its packed checkpoint.

        Args:
            name: Of the cost.
            method: What is done.
            shape: The calibration set.
            sparsity: Of the checkpoint.
            measured: Examples that it uses; `None`: as many as it takes by itself.
        """
        parts = [
            PRUNING_COSTS[CRITERIA[method.criterion].cost](self, method, shape),
            self._checking(),
        ]
        if method.layer_by_layer:
            parts.append(self._walk(method, shape))
        if method.allocation == "owl":
            parts.append(self._outliers(shape))
        elif method.allocation in ("interventional", "fisher"):
            parts.append(self._sensitivities(method, shape, measured))
        memory = self.weights + sum(part.memory for part in parts)
        devices = self._devices(memory)
        shared = sum(part.shared for part in parts)
        # Pruned layers are kept until the checkpoint is there.
        kept = self.value * self.work.prunable if method.layer_by_layer else 0
        return Cost(
            step="prune",
            name=name,
            operations=sum(part.operations for part in parts),
            seconds=sum(part.seconds for part in parts) + shared / self._processes(devices),
            memory=memory,
            disk=self._checkpoint(sparsity) + kept,
            devices=devices,
        )

    def _processes(self, devices: int) -> int:
        """Processes that share work, where a copy of the model takes so many devices."""
        return self.hardware.count if devices == 1 else 1

    def _checking(self) -> "Part":
        """Looking at all weights before and after they are pruned."""
        return Part(0.0, self.through_memory(CHECK_PASSES * self.work.prunable))

    def _walk(self, method: Method, shape: Workload) -> "Part":
        """The calibration set on its way through the layers, and what their inputs look like."""
        work, tokens = self.work, shape.examples * shape.tokens
        by_projection = method.order == "projection"
        held = self.walking(shape)
        if method.target == "local":
            walk, compared = work.layer_walk(shape, STAGES if by_projection else 1), 0.0
        else:
            walk, compared = work.paired_walk(shape, by_projection), tokens * work.compared
            # The hidden states of the dense model, before and behind the layer, and its weights.
            hidden = tokens * work.layers[0].hidden * self.value
            held += 2 * hidden + self.value * max(layer.prunable for layer in work.layers)
        seconds = self.seconds(walk) + compared / self.hardware.float32 + self._seeing(shape)
        return Part(walk.operations + compared, seconds, held)

    def _seeing(self, shape: Workload) -> float:
        """Seconds for the inputs of all matrices, beside their products."""
        products = (product for layer in self.work.layers for product in layer.distinct_inputs)
        inputs = sum(product.inputs * product.active for product in products)
        return self.through_memory(INPUT_PASSES * shape.examples * shape.tokens * inputs)

    def _outliers(self, shape: Workload) -> "Part":
        """The allocation `owl`: one pass through the layers, and all importances."""
        walk = self.work.layer_walk(shape, stages=0)
        ranking = self.through_memory(RANKING_PASSES * self.work.prunable)
        return Part(walk.operations, self.seconds(walk) + self._seeing(shape) + ranking)

    def _sensitivities(self, method: Method, shape: Workload, measured: int | None) -> "Part":
        """The allocations by sensitivity: sites pruned alone, or one backward pass for all."""
        work = self.work
        if method.allocation == "fisher":
            count = min(measured or examples_to_estimate(shape.examples), shape.examples)
            few = replace(shape, examples=count)
            tried = work.estimated_interventions(shape, count)
            batches = math.ceil(count / max(1, self.rows // shape.tokens))
            passes = THRESHOLD_PASSES + batches * MASK_PASSES
            ranking = self.through_memory(passes * work.prunable)
            seconds = self.seconds(tried) + self._seeing(few) + ranking
            return Part(tried.operations, seconds, _all_layers(self, few, self.rows))
        per_layer = [layer.sites for layer in work.layers]
        count = min(measured or examples_to_measure(per_layer, shape.examples), shape.examples)
        tried, walks = work.interventions(shape, count), work.intervention_walks(shape, count)
        alone = PRUNING_COSTS[CRITERIA[method.criterion].cost](
            self, replace(method, target="local"), shape
        )
        # The hidden states before the layer, and those of the site that is tried.
        hidden = count * shape.tokens * work.layers[0].hidden * self.value
        return Part(
            tried.operations + alone.operations,
            self.seconds(walks) + self._seeing(shape),
            2 * hidden,
            shared=self.seconds(tried) - self.seconds(walks) + alone.seconds,
        )

    def paper(self, shape: Workload, sparsity: float) -> Cost:
        """Cost of the paper's recipe: exact scores, then one threshold."""
        scoring = self.scoring("exact", shape)
        pruning = self.pruning("paper", RECIPES["paper"], shape, sparsity)
        return replace(
            pruning,
            operations=scoring.operations + pruning.operations,
            seconds=scoring.seconds + pruning.seconds,
            memory=max(scoring.memory, pruning.memory),
            disk=scoring.disk + pruning.disk,
            devices=max(scoring.devices, pruning.devices),
        )

    def evaluation(self, tasks: Iterable[str], limit: int | None, batch_size: int) -> Cost:
        """Cost of evaluating one copy of the model."""
        found = [self._task(name, limit, batch_size) for name in tasks]
        memory = self.weights + max(held for _, _, held in found)
        return Cost(
            step="eval",
            name=", ".join(tasks),
            operations=sum(operations for operations, _, _ in found),
            seconds=sum(seconds for _, seconds, _ in found),
            memory=memory,
            disk=0.0,
            devices=self._devices(memory),
        )

    def seconds(self, work: OperationCount) -> float:
        """Time of an amount of work in chunks of `rows` tokens, on one device."""
        hardware = self.hardware
        computed = work.products / hardware.matmul + work.attention / hardware.attention
        moved = work.moved * self.value / hardware.bandwidth
        launched = work.passed / self.rows * LAUNCHES_PER_LAYER * hardware.launch
        return self.together(computed + moved, launched)

    def together(self, computed: float, launched: float) -> float:
        """Seconds of both: a GPU computes while Python launches, a CPU does one after the other."""
        return max(computed, launched) if self.hardware.kind == "cuda" else computed + launched

    def through_memory(self, numbers: float) -> float:
        """Seconds that so many float32 numbers take through memory."""
        return 4 * numbers / self.hardware.bandwidth

    def walking(self, shape: Workload) -> float:
        """Bytes of the hidden states of all examples, and of a layer that runs on some of them."""
        tokens = shape.examples * shape.tokens
        hidden = tokens * self.work.layers[0].hidden * self.value
        return hidden + min(tokens, WALK_ROWS[self.hardware.kind]) * self.per_token

    @property
    def largest(self) -> int:
        """Weights of the largest matrix."""
        return max(p.inputs * p.outputs for layer in self.work.layers for p in layer.products)

    @property
    def per_token(self) -> float:
        """Bytes that one layer holds per token while it runs."""
        layer = self.work.layers[0]
        outputs = sum(product.outputs * product.active for product in layer.products)
        return float(self.value * (8 * layer.hidden + 2 * outputs))

    @property
    def per_logits(self) -> float:
        """Bytes of the logits of a token, with a copy in float32."""
        return float(self.work.head.outputs * (self.value + 4))

    def _devices(self, memory: float) -> int:
        return math.ceil(memory / (USABLE * self.hardware.memory))

    def _checkpoint(self, sparsity: float) -> float:
        """Bytes of kept values, one bit per prunable weight, and all that is not pruned."""
        prunable = self.work.prunable
        kept = self.work.parameters - sparsity * prunable
        return kept * self.value + prunable / 8

    def _task(self, name: str, limit: int | None, batch_size: int) -> tuple[float, float, float]:
        """Operations, seconds and bytes beside the weights of one evaluation task."""
        items = min(AMOUNTS[name].items, limit or AMOUNTS[name].items)
        tokens, longest = AMOUNTS[name].tokens, TASKS[name].max_new_tokens
        read = self.work.forward(Workload(items, tokens, 0))
        if not longest:  # texts to predict
            held = tokens * (self.per_token + self.per_logits)
            return read.operations, self.seconds(read), held
        written = self.work.forward(Workload(items, longest, 0))
        batch = min(items, batch_size)
        steps = math.ceil(items / batch) * longest
        keys = self.value * sum(layer.cached for layer in self.work.layers)
        cache = batch * (tokens + longest / 2) * keys
        step = max(
            (self.weights + CACHE_PASSES * cache) / self.hardware.bandwidth,
            len(self.work.layers) * LAUNCHES_PER_LAYER * self.hardware.launch,
            self.seconds(written) / steps,
        )
        # Questions are read twice: with the worked answer for its loss, and to be answered.
        operations = 2 * read.operations + written.operations
        held = 2 * cache + batch * tokens * (self.per_token + self.per_logits)
        return operations, 2 * self.seconds(read) + steps * step, held


# Estimators: work that every process does, and work that processes share


def _exact(
    work: ModelWork, shape: Workload, exact_examples: int
) -> tuple[OperationCount, OperationCount]:
    return OperationCount(), work.exact(shape)


def _plain(
    work: ModelWork, shape: Workload, exact_examples: int
) -> tuple[OperationCount, OperationCount]:
    return work.plain(shape), OperationCount()


def _first_order(
    work: ModelWork, shape: Workload, exact_examples: int
) -> tuple[OperationCount, OperationCount]:
    return work.first_order(shape), OperationCount()


def _control_variate(
    work: ModelWork, shape: Workload, exact_examples: int
) -> tuple[OperationCount, OperationCount]:
    measured = replace(shape, examples=min(shape.examples, exact_examples))
    return work.first_order(shape), work.exact(measured)


def _adaptive(
    work: ModelWork, shape: Workload, exact_examples: int
) -> tuple[OperationCount, OperationCount]:
    """At most: no unit is known well enough before all its losses are measured."""
    return work.first_order(shape), work.exact(shape)


ESTIMATORS: dict[
    str, Callable[[ModelWork, Workload, int], tuple[OperationCount, OperationCount]]
] = {
    "exact": _exact,
    "plain": _plain,
    "first_order": _first_order,
    "control_variate": _control_variate,
    "adaptive": _adaptive,
}


# Bytes beside the weights, where chunks have so many tokens


def _batch(shape: Workload, rows: int) -> int:
    """Tokens of a batch: a quarter of a chunk, and one example at least."""
    return min(shape.examples, max(1, rows // 4 // shape.tokens)) * shape.tokens


def _streams(meter: CostModel, shape: Workload, rows: int) -> float:
    """What is recorded of the intact pass of a batch, and a chunk of masked streams."""
    batch = _batch(shape, rows)
    layers = meter.work.layers
    # Of attention and its layer four tensors, of each other block that is scored two.
    tensors = sum(4 + 2 * bool(layer.others) for layer in layers)
    recorded = batch * tensors * layers[0].hidden * meter.value
    return recorded + max(batch, rows) * meter.per_token


def _one_forward(meter: CostModel, shape: Workload, rows: int) -> float:
    return _batch(shape, rows) * (meter.per_token + meter.per_logits)


def _all_layers(meter: CostModel, shape: Workload, rows: int) -> float:
    """What every layer keeps of a batch for the backward pass."""
    kept = len(meter.work.layers) * meter.per_token
    return _batch(shape, rows) * (kept + meter.per_logits)


ACTIVATIONS: dict[str, Callable[[CostModel, Workload, int], float]] = {
    "exact": _streams,
    "plain": _one_forward,
    "first_order": _all_layers,
    "control_variate": _all_layers,
    "adaptive": _all_layers,
}


# Pruning by a criterion, what its inputs look like given


@dataclass(frozen=True)
class Part:
    """A part of a pruning.

    Attributes:
        operations: Floating-point operations in products.
        seconds: On one device.
        memory: Bytes beside the weights.
        shared: Seconds more, which processes share.
    """

    operations: float
    seconds: float
    memory: float = 0.0
    shared: float = 0.0


def _threshold(meter: CostModel, method: Method, shape: Workload) -> Part:
    seconds = meter.through_memory(THRESHOLD_PASSES * meter.work.prunable)
    return Part(0.0, seconds, 12.0 * meter.largest)


def _wanda(meter: CostModel, method: Method, shape: Workload) -> Part:
    weights = meter.work.prunable
    ranking = weights / meter.hardware.ranked + meter.through_memory(RANKING_PASSES * weights)
    return Part(0.0, ranking, 24.0 * meter.largest)


def _sparsegpt(meter: CostModel, method: Method, shape: Workload) -> Part:
    hardware = meter.hardware
    obs = ObsWork.of(meter.work, shape.examples * shape.tokens)
    products = (obs.grams + obs.updates) / hardware.float32 + obs.factors / hardware.factor
    launched = obs.columns * LAUNCHES_PER_COLUMN[hardware.kind] * hardware.launch
    columns = meter.together(meter.through_memory(obs.moved), launched)
    masks = meter.through_memory(THRESHOLD_PASSES * meter.work.prunable)
    return Part(
        obs.grams + obs.factors + obs.updates,
        products + columns + masks,
        12.0 * meter.largest + _grams(meter) + 12.0 * _widest(meter) ** 2,
    )


def _alps(meter: CostModel, method: Method, shape: Workload) -> Part:
    hardware = meter.hardware
    grams = ObsWork.of(meter.work, shape.examples * shape.tokens).grams
    alps = AlpsWork.of(meter.work, method.target == "dense")
    products = (grams + alps.products) / hardware.float32
    solved = alps.factors / hardware.factor
    moved = STEP_PASSES * alps.steps + THRESHOLD_PASSES * meter.work.prunable
    return Part(
        grams + alps.products + alps.factors,
        products + solved + meter.through_memory(moved),
        32.0 * meter.largest + _grams(meter) + 12.0 * _widest(meter) ** 2,
    )


def _grams(meter: CostModel) -> float:
    """Bytes of the sums x_i x_j of a layer."""
    inputs = meter.work.layers[0].distinct_inputs
    return float(sum(4 * product.copies * product.inputs**2 for product in inputs))


def _widest(meter: CostModel) -> int:
    """Inputs of the widest matrix."""
    return max(product.inputs for product in meter.work.layers[0].products)


PRUNING_COSTS: dict[str, Callable[[CostModel, Method, Workload], Part]] = {
    "threshold": _threshold,
    "rows": _wanda,
    "sparsegpt": _sparsegpt,
    "alps": _alps,
}


# Evaluation tasks


@dataclass(frozen=True)
class Amount:
    """How much a task asks.

    Attributes:
        items: Questions, or texts to predict.
        tokens: Of a question with its worked answer, or of a text; assumed.
    """

    items: int
    tokens: int


# Items of the published test sets; tokens rounded, as the tokenizers of Llama 2 and 3 make them.
AMOUNTS: dict[str, Amount] = {
    "gsm8k": Amount(1319, 220),
    "strategyqa": Amount(2290, 90),
    "arc_challenge": Amount(1172, 110),
    "wikitext2": Amount(166, 2048),
    "tinystories": Amount(1097, 250),
    "tiny_reasoner_arithmetic": Amount(300, 60),
    "tiny_reasoner_yes_no": Amount(300, 60),
    "tiny_reasoner_multiple_choice": Amount(300, 60),
}
