"""The cost of each step: the work of a model divided by the rates of the hardware.

The assumptions are the constants here and in `hardware.py`, explained in
`docs/appendix/estimate.md`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from optimum_cap.config import COMPILING, RECIPES, CAPConfig, Method
from optimum_cap.estimation.disk import SIZES
from optimum_cap.estimation.hardware import LAYERWISE_ROWS, ROWS, Hardware
from optimum_cap.estimation.work import AlpsWork, ModelWork, OperationCount, SparseGPTWork, Workload
from optimum_cap.evaluation import TASKS
from optimum_cap.generation import LARGEST_BATCH
from optimum_cap.methods import CRITERIA
from optimum_cap.pruning import (
    EXAMPLES_PER_STEP,
    LEFT_OUT,
    examples_to_estimate,
    examples_to_measure,
)
from optimum_cap.runtime import LANES

USABLE = 0.9  # fraction of a device's memory, as accelerate uses for device_map="auto"
LAUNCHES_PER_LAYER = 60  # small operations per layer run
# Small operations per column pruned by SparseGPT; on a CPU, views count too.
LAUNCHES_PER_COLUMN = {"cpu": 22, "cuda": 12}
# Float32 numbers read or written per weight (or per input of a matrix, where noted):
THRESHOLD_PASSES = 40  # to find a threshold
RANKING_PASSES = 30  # to rank rows, without the sort
STEP_PASSES = 25  # in a step of ALPS, without its matrix products
INPUT_PASSES = 6  # per input of a matrix: selected, squared and summed
CHECK_PASSES = 12  # per prunable weight: checked, masked, stored, and zeros counted
ADAM_PASSES = 12  # in a step of the refinement: gradients masked, states and weights updated
SAVED = 3  # memory that a layer saves for its backward pass, in units of its activations
MASK_PASSES = 8  # to apply a known threshold: importance, comparison, new weights
BLOCK = 4096  # block size of the file system in bytes
HEADER = 200  # bytes of a chunk's file in addition to its losses
CACHE_PASSES = 3  # times that generation moves keys and values: read, and copied to grow


@dataclass(frozen=True)
class Cost:
    """The cost of one step.

    Attributes:
        step: `"score"`, `"prune"`, `"answer"`, `"eval"`, `"choose"` or `"refine"`.
        name: Name of the estimator, the recipe or the tasks.
        operations: Floating-point operations in matrix products.
        seconds: Time on as many devices as one copy of the model needs; shared work uses all
            devices if a copy fits on one.
        memory: Bytes for weights and activations of one copy of the model.
        disk: Bytes written to disk.
        devices: Minimum number of devices for one copy of the model.
    """

    step: str
    name: str
    operations: float
    seconds: float
    memory: float
    disk: float
    devices: int


class CostModel:
    """Computes the cost of each step from a model's work and the hardware's rates.

    Args:
        work: The work of the model.
        hardware: The rates.
        value: Bytes per weight and activation.
        stored: Dtype of the weights on disk; `None` is the usual dtype of `value` bytes.
    """

    def __init__(
        self, work: ModelWork, hardware: Hardware, value: int, stored: torch.dtype | None = None
    ) -> None:
        self.work = work
        self.hardware = hardware
        self.value = value
        self.stored = stored or (torch.bfloat16 if value == 2 else torch.float32)
        self.weights = float(work.parameters * value)
        self.rows = ROWS[hardware.kind]

    def scoring(
        self, name: str, shape: Workload, exact_examples: int = CAPConfig.exact_examples
    ) -> Cost:
        """Return the cost of scoring all units that `work` counts as scored.

        Processes, each with a whole copy of the model on its own device, share the exact
        measurements (`optimum_cap/runtime/distributed.py`); each of them does all other work.

        Args:
            name: The estimator. For `"adaptive"`, the cost is the maximum, with all losses
                measured.
            shape: The calibration set.
            exact_examples: Examples that `"control_variate"` measures exactly.
        """
        alone, shared = ESTIMATOR_COSTS[name](self.work, shape, exact_examples)
        activations = ACTIVATIONS[name]
        # Chunks are reduced to the available memory, down to one stream of one example.
        devices = self.devices_for(self.weights + activations(self, replace(shape, examples=1), 1))
        wanted = self.weights + activations(self, shape, self.rows)
        half_of_free = (self.weights + devices * self.hardware.memory) / 2
        return Cost(
            step="score",
            name=name,
            operations=alone.operations + shared.operations,
            seconds=self.seconds(alone) + self.seconds(shared) / self.processes(devices),
            memory=min(wanted, half_of_free),
            disk=8.0 * (1 + self.work.scored) * shape.examples
            + self._chunks(name, shape, exact_examples),
            devices=devices,
        )

    def _chunks(self, name: str, shape: Workload, exact_examples: int) -> float:
        """Return the file size of finished chunks in bytes."""
        if name not in COMPILING:  # the estimators that measure exactly, in chunks
            return 0.0
        if name == "control_variate":
            shape = replace(shape, examples=min(shape.examples, exact_examples))
        # With a prefix, a batch has all tokens of a chunk; otherwise a quarter (`batch_sizes.py`).
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
        """Return the cost of pruning one copy of the model and saving it packed, excluding scoring.

        Args:
            name: Name of the cost.
            method: The pruning method.
            shape: The calibration set.
            sparsity: Sparsity of the checkpoint.
            measured: Examples for measuring sensitivities; `None` is the default number.
        """
        parts = [
            PRUNING_COSTS[CRITERIA[method.criterion].cost](self, method, shape),
            self.checking(),
        ]
        if method.layer_by_layer:
            parts.append(self._layerwise_passes(method, shape))
            if method.refine:
                parts.append(self.refinement(method, shape))
        if method.allocation == "owl":
            parts.append(self._outliers(shape))
        elif method.by_sensitivity:
            parts.append(self._sensitivities(method, shape, measured))
        # Pruned layers are stored in resume_dir until the checkpoint is saved.
        layers = self.stored.itemsize * self.work.prunable if method.layer_by_layer else 0
        disk = SIZES["packed"](self.work, sparsity, self.stored) + layers
        return self.cost("prune", name, parts, self.weights, disk)

    def cost(self, step: str, name: str, parts: "list[Part]", weights: float, disk: float) -> Cost:
        """Return the cost of a step made of parts.

        Args:
            step: Name of the step.
            name: Name of the cost.
            parts: The parts.
            weights: Bytes of all weights in memory.
            disk: Bytes written to disk.
        """
        memory = weights + sum(part.memory for part in parts)
        devices = self.devices_for(memory)
        processes = self.processes(devices)
        shared = sum(part.shared / processes for part in parts)
        in_lanes = sum(part.in_lanes / min(processes, LANES) for part in parts)
        return Cost(
            step=step,
            name=name,
            operations=sum(part.operations for part in parts),
            seconds=sum(part.seconds for part in parts) + shared + in_lanes,
            memory=memory,
            disk=disk,
            devices=devices,
        )

    def processes(self, devices: int) -> int:
        """Return the number of processes that share work if a model copy needs `devices`."""
        return self.hardware.count if devices == 1 else 1

    def checking(self) -> "Part":
        """Return the cost of checking all weights before and after pruning."""
        return Part(0.0, self.through_memory(CHECK_PASSES * self.work.prunable))

    def _layerwise_passes(self, method: Method, shape: Workload) -> "Part":
        """Return the cost of layer-by-layer passes and of the statistics of inputs."""
        work, tokens = self.work, shape.examples * shape.tokens
        by_projection = method.order == "projection"
        held = self.layer_activations(shape)
        if method.target == "local":
            counted = work.layerwise_pass(shape, None if by_projection else 1)
            compared = 0.0
        else:
            counted, compared = (
                work.dense_reference_pass(shape, by_projection),
                tokens * work.compared,
            )
            # The hidden states of the dense model before and after the layer, and its weights.
            hidden = tokens * work.layers[0].hidden * self.value
            held += 2 * hidden + self.value * max(layer.prunable for layer in work.layers)
        rows = EXAMPLES_PER_STEP * shape.tokens if method.refine else self.rows
        seconds = self.seconds(counted, min(rows, self.rows))
        seconds += compared / self.hardware.float32 + self.input_statistics(shape)
        operations = counted.operations + compared
        if method.target == "dense":
            return Part(operations, seconds, held)
        return Part(operations, 0.0, held, in_lanes=seconds)

    def refinement(self, method: Method, shape: Workload) -> "Part":
        """Return the cost of refining every layer."""
        work = self.work
        counted = work.refinement(shape, method.refine, 1 / LEFT_OUT)
        fitted = shape.examples * (1 - 1 / LEFT_OUT)
        steps = method.refine * math.ceil(fitted / EXAMPLES_PER_STEP)
        updates = self.through_memory(ADAM_PASSES * steps * work.prunable)
        # In float32: Adam's states of both lanes, the gradient, the weights before the pass, their
        # sum over the lanes and the best so far. In addition, the activations saved for the
        # backward pass, and the hidden states of the dense model.
        hidden = shape.examples * shape.tokens * work.layers[0].hidden * self.value
        rows = EXAMPLES_PER_STEP * shape.tokens
        saved = SAVED * rows * self.per_token
        memory = 32 * max(layer.prunable for layer in work.layers) + saved + hidden
        seconds = self.seconds(counted, rows) + updates
        return Part(counted.operations, 0.0, memory, in_lanes=seconds)

    def input_statistics(self, shape: Workload) -> float:
        """Return the seconds for the statistics of all inputs, excluding the products x_i x_j."""
        products = (product for layer in self.work.layers for product in layer.distinct_inputs)
        inputs = sum(product.inputs * product.active for product in products)
        return self.through_memory(INPUT_PASSES * shape.examples * shape.tokens * inputs)

    def _outliers(self, shape: Workload) -> "Part":
        """Return the cost of allocation `owl`: a pass through the layers, plus all importances."""
        counted = self.work.layerwise_pass(shape, stages=0)
        ranking = self.through_memory(RANKING_PASSES * self.work.prunable)
        return Part(
            counted.operations, self.seconds(counted) + self.input_statistics(shape) + ranking
        )

    def _sensitivities(self, method: Method, shape: Workload, measured: int | None) -> "Part":
        """Return the cost of sensitivities: pruning each site alone, or one backward pass."""
        work = self.work
        if method.allocation == "fisher":
            count = min(measured or examples_to_estimate(shape.examples), shape.examples)
            few = replace(shape, examples=count)
            estimated = work.estimated_sensitivities(shape, count)
            ranking = self.through_memory((THRESHOLD_PASSES + MASK_PASSES) * work.prunable)
            seconds = self.seconds(estimated) + self.input_statistics(few)
            memory = self._one_layer_backward(few)
            return Part(estimated.operations, ranking, memory, in_lanes=seconds)
        per_layer = [layer.sites for layer in work.layers]
        count = min(measured or examples_to_measure(per_layer, shape.examples), shape.examples)
        measured_alone = work.measured_sensitivities(shape, count)
        shared_passes = work.sensitivity_passes(shape, count)
        alone = PRUNING_COSTS[CRITERIA[method.criterion].cost](
            self, replace(method, target="local"), shape
        )
        # The hidden states before the layer, and those with one site pruned.
        hidden = count * shape.tokens * work.layers[0].hidden * self.value
        shared = self.seconds(measured_alone) - self.seconds(shared_passes)
        return Part(
            measured_alone.operations + alone.operations,
            self.seconds(shared_passes) + self.input_statistics(shape),
            2 * hidden,
            shared=shared + alone.seconds + alone.in_lanes,
        )

    def _one_layer_backward(self, shape: Workload) -> float:
        """Return the bytes of a backward pass that runs one layer at a time.

        The inputs of all layers are stored in CPU memory. In addition, there are the gradients at
        the outputs of a layer, its pruned matrices, and its saved activations for a batch.
        """
        layers, tokens = self.work.layers, shape.examples * shape.tokens
        hidden = tokens * layers[0].hidden * self.value
        stored = hidden * len(layers) if self.hardware.kind == "cpu" else 0
        batch = min(tokens, LAYERWISE_ROWS[self.hardware.kind])
        pruned = self.value * max(layer.prunable for layer in layers)
        return stored + hidden + pruned + SAVED * batch * self.per_token

    def paper(self, shape: Workload, sparsity: float) -> Cost:
        """Return the cost of recipe `paper`: exact scores, then one threshold."""
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

    def answering(self, shape: Workload, longest: int) -> Cost:
        """Return the cost of one model answer per calibration prompt, if all have maximum length.

        Processes share the prompts.

        Args:
            shape: The calibration set with published answers; its unscored tokens are the prompts.
            longest: Longest answer, in tokens.
        """
        prompt = max(1, shape.tokens - shape.scored)
        read = self.work.forward(Workload(shape.examples, prompt, 0))
        batch = LARGEST_BATCH[self.hardware.kind]
        operations, seconds, cache = self._writing(shape.examples, prompt, longest, batch)
        memory = self.weights + cache + min(shape.examples, batch) * prompt * self.per_token
        devices = self.devices_for(memory)
        return Cost(
            step="answer",
            name="own",
            operations=read.operations + operations,
            seconds=(self.seconds(read) + seconds) / self.processes(devices),
            memory=memory,
            disk=0.0,
            devices=devices,
        )

    def evaluation(
        self, limits: Mapping[str, int | None], batch_size: int, num_fewshot: int = 0
    ) -> Cost:
        """Return the cost of evaluating one copy of the model.

        Args:
            limits: Number of questions, documents or windows of each task; `None` is all.
            batch_size: Questions per batch.
            num_fewshot: Worked examples per prompt in tasks with questions.
        """
        task_costs = [
            self._task(name, limit, batch_size, num_fewshot) for name, limit in limits.items()
        ]
        memory = self.weights + max(held for _, _, held in task_costs)
        return Cost(
            step="eval",
            name=", ".join(limits),
            operations=sum(operations for operations, _, _ in task_costs),
            seconds=sum(seconds for _, seconds, _ in task_costs),
            memory=memory,
            disk=0.0,
            devices=self.devices_for(memory),
        )

    def seconds(self, work: OperationCount, rows: int | None = None) -> float:
        """Return the seconds for an amount of work on one device.

        Args:
            work: The work.
            rows: Tokens of a chunk; `None` is the number that scoring uses.
        """
        hardware, rows = self.hardware, rows or self.rows
        computed = work.products / hardware.matmul + work.attention / hardware.attention
        moved = work.moved * self.value / hardware.bandwidth
        launched = work.passed / rows * LAUNCHES_PER_LAYER * hardware.launch
        return self.together(computed + moved, launched)

    def together(self, computed: float, launched: float) -> float:
        """Return the total seconds of both, which overlap on a GPU but not on a CPU."""
        return max(computed, launched) if self.hardware.kind == "cuda" else computed + launched

    def through_memory(self, numbers: float) -> float:
        """Return the seconds for reading or writing a number of float32 numbers."""
        return 4 * numbers / self.hardware.bandwidth

    def layer_activations(self, shape: Workload) -> float:
        """Return the bytes of the hidden states of all examples and of a layer on one batch."""
        tokens = shape.examples * shape.tokens
        hidden = tokens * self.work.layers[0].hidden * self.value
        return hidden + min(tokens, LAYERWISE_ROWS[self.hardware.kind]) * self.per_token

    @property
    def largest(self) -> int:
        """Number of weights of the largest matrix."""
        return max(p.inputs * p.outputs for layer in self.work.layers for p in layer.products)

    @property
    def per_token(self) -> float:
        """Bytes of activations per token while one layer runs."""
        layer = self.work.layers[0]
        outputs = sum(product.outputs * product.active for product in layer.products)
        return float(self.value * (8 * layer.hidden + 2 * outputs))

    @property
    def per_logits(self) -> float:
        """Bytes of the logits of a token, including a copy in float32."""
        return float(self.work.head.outputs * (self.value + 4))

    def devices_for(self, memory: float) -> int:
        """Return the minimum number of devices with this much memory in total."""
        return math.ceil(memory / (USABLE * self.hardware.memory))

    def _task(
        self, name: str, limit: int | None, batch_size: int, num_fewshot: int
    ) -> tuple[float, float, float]:
        """Return the operations, seconds, and bytes without weights of an evaluation task."""
        items = min(AMOUNTS[name].items, limit or AMOUNTS[name].items)
        tokens, longest = AMOUNTS[name].tokens, TASKS[name].max_new_tokens
        if TASKS[name].shows_examples:
            tokens *= 1 + num_fewshot
        read = self.work.forward(Workload(items, tokens, 0))
        if not longest:  # nothing is generated
            held = tokens * (self.per_token + self.per_logits)
            return read.operations, self.seconds(read), held
        operations, seconds, cache = self._writing(items, tokens, longest, batch_size)
        held = cache + min(items, batch_size) * tokens * (self.per_token + self.per_logits)
        # Questions are read twice: with the worked answer for its loss, and for generation.
        return 2 * read.operations + operations, 2 * self.seconds(read) + seconds, held

    def _writing(
        self, items: int, tokens: int, longest: int, batch_size: int
    ) -> tuple[float, float, float]:
        """Return operations, seconds and key/value bytes of answers of maximum length.

        Args:
            items: Number of answers.
            tokens: Tokens of a prompt.
            longest: Tokens of an answer.
            batch_size: Answers per batch.
        """
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
        return written.operations, steps * step, 2 * cache


# Estimators: (work of every process, work shared by the processes)


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
    """Return the maximum, where every loss of every unit is measured."""
    return work.first_order(shape), work.exact(shape)


ESTIMATOR_COSTS: dict[
    str, Callable[[ModelWork, Workload, int], tuple[OperationCount, OperationCount]]
] = {
    "exact": _exact,
    "plain": _plain,
    "first_order": _first_order,
    "control_variate": _control_variate,
    "adaptive": _adaptive,
}


# Bytes of activations, for chunks of `rows` tokens


def _tokens_per_batch(shape: Workload, rows: int) -> int:
    """Return the tokens of a batch: a quarter of a chunk, but at least one example."""
    return min(shape.examples, max(1, rows // 4 // shape.tokens)) * shape.tokens


def _streams(cost_model: CostModel, shape: Workload, rows: int) -> float:
    """Return the bytes recorded in a batch's intact pass, plus a chunk of masked streams."""
    batch = _tokens_per_batch(shape, rows)
    layers = cost_model.work.layers
    # Four tensors for attention and its layer, and two for other scored blocks.
    tensors = sum(4 + 2 * bool(layer.others) for layer in layers)
    recorded = batch * tensors * layers[0].hidden * cost_model.value
    return recorded + max(batch, rows) * cost_model.per_token


def _one_forward(cost_model: CostModel, shape: Workload, rows: int) -> float:
    return _tokens_per_batch(shape, rows) * (cost_model.per_token + cost_model.per_logits)


def _all_layers(cost_model: CostModel, shape: Workload, rows: int) -> float:
    """Return the bytes that all layers save for the backward pass of a batch."""
    saved = len(cost_model.work.layers) * cost_model.per_token
    return _tokens_per_batch(shape, rows) * (saved + cost_model.per_logits)


ACTIVATIONS: dict[str, Callable[[CostModel, Workload, int], float]] = {
    "exact": _streams,
    "plain": _one_forward,
    "first_order": _all_layers,
    "control_variate": _all_layers,
    "adaptive": _all_layers,
}


# Criteria, without the statistics of inputs


@dataclass(frozen=True)
class Part:
    """A part of the cost of pruning.

    Attributes:
        operations: Floating-point operations in matrix products.
        seconds: Seconds on one device.
        memory: Bytes in addition to the weights.
        shared: Additional seconds of work that processes share.
        in_lanes: Additional seconds of work that at most `LANES` processes share.
    """

    operations: float
    seconds: float
    memory: float = 0.0
    shared: float = 0.0
    in_lanes: float = 0.0


def _threshold(cost_model: CostModel, method: Method, shape: Workload) -> Part:
    seconds = cost_model.through_memory(THRESHOLD_PASSES * cost_model.work.prunable)
    return Part(0.0, seconds, 12.0 * cost_model.largest)


def _rows(cost_model: CostModel, method: Method, shape: Workload) -> Part:
    weights = cost_model.work.prunable
    ranking = weights / cost_model.hardware.ranked + cost_model.through_memory(
        RANKING_PASSES * weights
    )
    return Part(0.0, ranking, 24.0 * cost_model.largest)


def _sparsegpt(cost_model: CostModel, method: Method, shape: Workload) -> Part:
    hardware = cost_model.hardware
    sparsegpt = SparseGPTWork.of(cost_model.work, shape.examples * shape.tokens)
    products = (
        sparsegpt.grams + sparsegpt.updates
    ) / hardware.float32 + sparsegpt.factors / hardware.factor
    launched = sparsegpt.columns * LAUNCHES_PER_COLUMN[hardware.kind] * hardware.launch
    columns = cost_model.together(cost_model.through_memory(sparsegpt.moved), launched)
    masks = cost_model.through_memory(THRESHOLD_PASSES * cost_model.work.prunable)
    return Part(
        sparsegpt.grams + sparsegpt.factors + sparsegpt.updates,
        0.0,
        _of_solver(cost_model, 12.0 * cost_model.largest),
        in_lanes=products + columns + masks,
    )


def _alps(cost_model: CostModel, method: Method, shape: Workload) -> Part:
    hardware = cost_model.hardware
    grams = SparseGPTWork.of(cost_model.work, shape.examples * shape.tokens).grams
    alps = AlpsWork.of(cost_model.work, method.target == "dense")
    products = (grams + alps.products) / hardware.float32
    solved = alps.factors / hardware.factor
    moved = STEP_PASSES * alps.steps + THRESHOLD_PASSES * cost_model.work.prunable
    return Part(
        grams + alps.products + alps.factors,
        0.0,
        _of_solver(cost_model, 32.0 * cost_model.largest),
        in_lanes=products + solved + cost_model.through_memory(moved),
    )


def _of_solver(cost_model: CostModel, per_matrix: float) -> float:
    """Return the bytes of a layer's sums x_i x_j, and of solving for its widest matrix.

    Args:
        cost_model: The cost model.
        per_matrix: Bytes used in solving, without the Hessian and its inverses.
    """
    inputs = cost_model.work.layers[0].distinct_inputs
    sums = float(sum(4 * product.copies * product.inputs**2 for product in inputs))
    solving = per_matrix + 12.0 * _widest(cost_model) ** 2
    # While collecting, each lane has its own sums.
    return max(LANES * sums, sums + solving)


def _widest(cost_model: CostModel) -> int:
    """Return the number of inputs of the widest matrix of the first layer."""
    return max(product.inputs for product in cost_model.work.layers[0].products)


PRUNING_COSTS: dict[str, Callable[[CostModel, Method, Workload], Part]] = {
    "threshold": _threshold,
    "rows": _rows,
    "sparsegpt": _sparsegpt,
    "alps": _alps,
}


# Evaluation tasks


@dataclass(frozen=True)
class Amount:
    """The size of an evaluation task.

    Attributes:
        items: Number of questions or texts.
        tokens: Tokens of a question with its worked answer, or of a text; assumed.
    """

    items: int
    tokens: int


# Sizes of the published test sets; rounded token counts with the Llama 2 and 3 tokenizers.
AMOUNTS: dict[str, Amount] = {
    "gsm8k": Amount(1319, 220),
    "strategyqa": Amount(2290, 90),
    "arc_challenge": Amount(1172, 110),
    # Each choice is read with its question, but two single-token choices are read together.
    "strategyqa_choices": Amount(2290, 20),
    "arc_challenge_choices": Amount(1172, 160),
    "wikitext2": Amount(166, 2048),
    "tinystories": Amount(1097, 250),
    "tiny_reasoner_arithmetic": Amount(300, 60),
    "tiny_reasoner_yes_no": Amount(300, 60),
    "tiny_reasoner_multiple_choice": Amount(300, 60),
}
AMOUNTS |= {f"{name}_loss": AMOUNTS[name] for name in ("gsm8k", "strategyqa", "arc_challenge")}
