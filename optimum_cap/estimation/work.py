"""The work of a model, counted from the shapes of its weights without allocating them.

Products with weights and the two products of attention are counted exactly, as in
`torch.utils.flop_counter`: 2 m k n for `[m, k] @ [k, n]`, and attention over all token pairs, even
if a kernel skips some. In a mixture of experts, only active experts count. Element-wise operations
(norms, activations, residuals) are counted in elements read from or written to memory.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_cap.methods import ALPS_INVERSES, ALPS_STEPS, FITTING_STEPS
from optimum_cap.methods import BLOCK as SPARSEGPT_BLOCK
from optimum_cap.models import (
    Site,
    decoder_layer_names,
    mixer_units,
    prunable_matrices,
    stages_by_layer,
)
from optimum_cap.scoring import WORTHWHILE_SHARE

# Elements read or written per channel of the hidden state and per output of a projection. Derived
# from the code of Llama (norms cast, square, average, scale and cast back; gates are activated and
# multiplied, queries and keys rotated), and checked with benchmarks/estimate.py.
_PER_CHANNEL = 12
_PER_OUTPUT = 4
_PER_LOGIT = 2
_PER_LOSS = 10  # per logit of a scored token: cast, exponentiated, summed

_STREAMS = 4  # per chunk, at the batch size that `batch_sizes.py` prefers


SEQUENTIAL_STAGES = 4  # inputs and output of the attention, then inputs and output of the MLP


@dataclass(frozen=True)
class OperationCount:
    """An amount of work; supports addition, and multiplication by a number.

    Attributes:
        products: Operations in matrix products with weights.
        attention: Operations in products of queries and keys, and of attention weights and values.
        moved: Elements of activations read or written by element-wise operations.
        passed: Number of tokens times the number of layers they pass through.
    """

    products: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    passed: float = 0.0

    @property
    def operations(self) -> float:
        """Number of floating-point operations."""
        return self.products + self.attention

    def __add__(self, other: "OperationCount") -> "OperationCount":
        return OperationCount(
            self.products + other.products,
            self.attention + other.attention,
            self.moved + other.moved,
            self.passed + other.passed,
        )

    def __rmul__(self, times: float) -> "OperationCount":
        return OperationCount(
            times * self.products,
            times * self.attention,
            times * self.moved,
            times * self.passed,
        )


@dataclass(frozen=True)
class Product:
    """A weight matrix, or the corresponding matrices of all experts.

    Attributes:
        inputs: Number of inputs.
        outputs: Number of outputs.
        pruned: Whether it is prunable.
        active: Number of copies that are active for a token.
        copies: Number of copies, one per expert.
    """

    inputs: int
    outputs: int
    pruned: bool
    active: int = 1
    copies: int = 1

    @property
    def per_token(self) -> OperationCount:
        """Work for one token."""
        operations = 2.0 * self.inputs * self.outputs * self.active
        return OperationCount(operations, moved=_PER_OUTPUT * self.outputs * self.active)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.inputs * self.outputs * self.copies


@dataclass(frozen=True)
class LayerWork:
    """The work of a decoder layer.

    Attributes:
        input_projs: Input projections of the attention (queries, keys, values).
        output_proj: Output projection of the attention.
        rest: The other products (MLP, router, experts).
        closing: The output projections of MLP and experts, which are part of `rest`.
        hidden: Channels of the hidden state.
        width: Channels of the input of `output_proj`.
        heads: Number of heads.
        groups: Number of units of its MLP; 0 if it has only experts.
        experts: Number of experts.
        others: Number of scored units of its MLP and experts.
        masking: Work per token to compute the outputs of MLP and experts with each of these units
            masked.
        queries: The query projection; `None` if it is fused with the key projection.
        window: Number of tokens a token attends to, including itself; `None` is all preceding ones.
        stages: Number of stages in `stages_by_layer`; inputs are measured before each.
    """

    input_projs: tuple[Product, ...]
    output_proj: Product
    rest: tuple[Product, ...]
    closing: tuple[Product, ...]
    hidden: int
    width: int
    heads: int
    groups: int
    experts: int
    others: int = 0
    masking: OperationCount = OperationCount()
    queries: Product | None = None
    window: int | None = None
    stages: int = SEQUENTIAL_STAGES

    @property
    def products(self) -> tuple[Product, ...]:
        """All products of the layer."""
        return (*self.input_projs, self.output_proj, *self.rest)

    @property
    def distinct_inputs(self) -> tuple[Product, ...]:
        """One product per distinct input of prunable matrices."""
        parts = (self.input_projs, (self.output_proj,), self.rest)
        return tuple(
            product
            for part in parts
            for product in {p.inputs: p for p in part if p.pruned}.values()
        )

    @property
    def norms(self) -> OperationCount:
        """Work of element-wise operations for one token."""
        return OperationCount(moved=_PER_CHANNEL * self.hidden, passed=1)

    @property
    def cached(self) -> int:
        """Number of elements in the keys and values of a token."""
        return sum(product.outputs for product in self.input_projs) - self.width

    @property
    def prunable(self) -> int:
        """Number of prunable weights."""
        return sum(product.weights for product in self.products if product.pruned)

    @property
    def sites(self) -> int:
        """Number of sites: the attention, the MLP and every expert."""
        return 1 + bool(self.groups) + self.experts

    @property
    def routers(self) -> tuple[Product, ...]:
        """Products that choose experts."""
        return tuple(product for product in self.rest if not product.pruned)

    @property
    def experts_again(self) -> OperationCount:
        """Work for one token to recompute the inputs of the experts' output projections."""
        return _per_token(tuple(p for p in self.rest if p.copies > 1 and p not in self.closing))

    def attention(self, tokens: float, pairs: float) -> OperationCount:
        """Return the work of the attention, including its projections."""
        return (
            tokens * _per_token(self.input_projs)
            + OperationCount(attention=4.0 * self.width * pairs)
            + tokens * self.output_proj.per_token
        )

    def last_attention(self, shape: "Workload") -> OperationCount:
        """Return the work of a stream's attention in the last layer, as done by `LastAttention`."""
        querying = shape.querying
        keys = _per_token(self.input_projs)
        if self.queries is not None:
            keys += -1 * self.queries.per_token
        before = shape.tokens - querying / shape.examples
        if self.window is not None:
            before = min(before, self.window - 1)
        pairs = querying * (before + querying / shape.examples)
        return (shape.rows - querying) * keys + self.attention(querying, pairs)

    def remainder(self, tokens: float) -> OperationCount:
        """Return the work of everything except the attention."""
        return tokens * (_per_token(self.rest) + self.norms)

    def starting(self, tokens: float) -> OperationCount:
        """Return the work of starting all streams whose unit is in the MLP or an expert."""
        return tokens * (self.masking + self.others * (_per_token(self.routers) + self.norms))

    def forward(self, tokens: float, pairs: float) -> OperationCount:
        """Return the work of the layer for a number of tokens and of query-key pairs."""
        return self.attention(tokens, pairs) + self.remainder(tokens)


@dataclass(frozen=True)
class Workload:
    """A calibration set of examples of the same length.

    Attributes:
        examples: Number of examples.
        tokens: Tokens per example.
        scored: Scored tokens per example.
        prefix: Tokens at the start shared by all examples, which are computed once.
    """

    examples: int
    tokens: int
    scored: int
    prefix: int = 0

    @property
    def rows(self) -> float:
        """Number of tokens to compute."""
        return self.prefix + self.examples * (self.tokens - self.prefix)

    @property
    def pairs(self) -> float:
        """Number of query-key pairs."""
        after_prefix = self.examples * (self.tokens - self.prefix) * self.tokens
        return float(self.prefix**2 + after_prefix)

    @property
    def querying(self) -> float:
        """Number of tokens with queries in the last layer: those from the first scored position on.

        The scored tokens are assumed to come last. If few tokens precede them, all tokens after the
        prefix have queries.
        """
        suffix = self.tokens - self.prefix
        last = min(self.scored + 1, suffix)
        pays = suffix - last >= WORTHWHILE_SHARE * suffix
        return self.examples * (last if pays else suffix)

    @property
    def targets(self) -> float:
        """Number of scored tokens of all examples."""
        return self.examples * self.scored


@dataclass(frozen=True)
class ModelWork:
    """The work of a causal language model.

    Attributes:
        layers: The decoder layers.
        stem: Products outside the layers that are computed for every token.
        head: The product that computes logits.
        parameters: Number of parameters; tied ones count once.
    """

    layers: tuple[LayerWork, ...]
    stem: tuple[Product, ...]
    head: Product
    parameters: int

    @property
    def prunable(self) -> int:
        """Number of prunable weights."""
        return sum(layer.prunable for layer in self.layers)

    @property
    def multiplied(self) -> int:
        """Number of weights that multiply a token; among experts, only the active ones count."""
        products = (*self.stem, self.head, *(p for layer in self.layers for p in layer.products))
        return sum(product.inputs * product.outputs * product.active for product in products)

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return sum(layer.heads for layer in self.layers)

    @property
    def scored(self) -> int:
        """Number of scored units."""
        return self.heads + sum(layer.others for layer in self.layers)

    def logits(self, positions: float) -> OperationCount:
        """Return the work of computing logits at a number of positions."""
        return positions * OperationCount(
            self.head.per_token.products, moved=_PER_LOGIT * self.head.outputs
        )

    def losses(self, shape: Workload) -> OperationCount:
        """Return the work of the cross-entropies of the scored tokens, excluding the logits."""
        return OperationCount(moved=_PER_LOSS * self.head.outputs * shape.targets)

    def forward(self, shape: Workload, logits: float | None = None) -> OperationCount:
        """Return the work of one forward pass.

        Args:
            shape: The examples.
            logits: Positions at which logits are computed; `None` is all of them.
        """
        work = shape.rows * _per_token(self.stem)
        for layer in self.layers:
            work += layer.forward(shape.rows, shape.pairs)
        return work + self.logits(shape.rows if logits is None else logits)

    def plain(self, shape: Workload) -> OperationCount:
        """Return the work of `plain_losses`: an intact forward pass, plus one per scored unit."""
        whole = Workload(shape.examples, shape.tokens, shape.scored)
        return (1 + self.scored) * (self.forward(whole) + self.losses(whole))

    def exact(self, shape: Workload) -> OperationCount:
        """Return the work of `exact_losses`, where each masked stream starts at the masked unit.

        In the last layer, everything after the attention runs only at scored positions, and the
        attention has queries from the first scored position on.
        """
        work = self.forward(shape, logits=shape.examples)
        streams = 0
        for layer in self.layers[:-1]:
            started = shape.rows * layer.output_proj.per_token + layer.remainder(shape.rows)
            work += streams * layer.forward(shape.rows, shape.pairs) + layer.heads * started
            work += layer.starting(shape.rows)
            streams += layer.heads + layer.others
        last = self.layers[-1]
        # Two more streams, plus the tokens up to the first layer, to verify the last attention.
        work += (streams + 2) * last.last_attention(shape)
        entering = tuple(p for p in self.stem if p.outputs == last.hidden)
        work += (shape.rows - shape.prefix) * _per_token(entering)
        work += last.heads * shape.targets * last.output_proj.per_token
        streams += last.heads
        work += streams * last.remainder(shape.targets) + last.starting(shape.targets)
        streams += last.others
        # The model computes logits with its layers bypassed, so the stem runs again.
        scored = shape.targets * _per_token(self.stem) + self.logits(shape.targets)
        return work + (1 + streams) * (scored + self.losses(shape))

    def first_order(self, shape: Workload) -> OperationCount:
        """Return the work of one forward and one backward pass.

        The weights are frozen, so the gradient of a product with weights takes one product; that of
        a product in attention takes two. Scored experts are computed again, one by one.
        """
        whole = Workload(shape.examples, shape.tokens, shape.scored)
        work = self.forward(whole, logits=whole.targets) + self.losses(whole)
        backward = OperationCount(work.products, 2 * work.attention, 2 * work.moved, work.passed)
        for layer in self.layers:
            if layer.others:
                work += whole.rows * _per_token(tuple(p for p in layer.rest if p.copies > 1))
        return work + backward

    def layerwise_pass(self, shape: Workload, stages: int | None = 1) -> OperationCount:
        """Return the work of layer-by-layer passes: a run before each stage, plus a final one.

        Args:
            shape: The calibration set.
            stages: Number of stages of each layer; `None` uses `stages_by_layer`.
        """
        work = (1 + (stages or 0)) * self.layer_passes(shape) + self.experts_again(shape)
        if stages is None:
            for layer in self.layers:
                work += layer.stages * layer.forward(*apart(shape))
        return work

    def refinement(self, shape: Workload, passes: int, left_out: float) -> OperationCount:
        """Return the work of refining all layers, excluding the optimizer steps.

        The dense model runs once. A step runs a layer forward and backward, with gradients of each
        product for both inputs and weights.

        Args:
            shape: The calibration set.
            passes: Passes over the fitted examples.
            left_out: Fraction of held-out examples, which are measured before each pass.
        """
        forward = self.layer_passes(shape)
        backward = OperationCount(
            2 * forward.products, 2 * forward.attention, 2 * forward.moved, forward.passed
        )
        fitted = passes * (1 - left_out)
        return (1 + fitted + (passes + 1) * left_out) * forward + fitted * backward

    def dense_reference_pass(self, shape: Workload, by_projection: bool) -> OperationCount:
        """Return the work of a `DenseReferencePass`, where both models run as far as needed."""
        rows, pairs = apart(shape)
        work = 3 * self.layer_passes(shape) + self.experts_again(shape)
        for layer in self.layers:
            work += -rows * _per_token(layer.closing)
            if by_projection and layer.stages < SEQUENTIAL_STAGES:  # attention and MLP side by side
                work += 2 * layer.attention(rows, pairs)
            elif by_projection:
                work += 4 * layer.attention(rows, pairs) + -2 * rows * layer.output_proj.per_token
                # A run ends at the last matrix whose inputs it measures.
                entering = (p for p in layer.rest if p.pruned and p not in layer.closing)
                single = tuple(product for product in entering if product.copies == 1)
                ran = (*layer.input_projs[:-1], *layer.routers, *single[:-1])
                work += 2 * rows * _per_token(ran)
        return work

    def measured_sensitivities(self, shape: Workload, measured: int) -> OperationCount:
        """Return the work of `measure_sensitivities`, excluding pruning.

        It consists of a layer-by-layer pass, and a run for each site from its layer on.

        Args:
            shape: The calibration set.
            measured: Number of examples for comparing predictions.
        """
        few = replace(shape, examples=measured)
        rows, pairs = apart(few)
        work = self.sensitivity_passes(shape, measured)
        for index, layer in enumerate(self.layers):
            # All sites up to this layer, plus the dense model except in the last layer.
            passing = sum(before.sites for before in self.layers[: index + 1])
            dense = index + 1 < len(self.layers)
            work += (passing + dense) * layer.forward(rows, pairs)
        sites = sum(layer.sites for layer in self.layers)
        return work + sites * self.divergence(few)

    def divergence(self, shape: Workload) -> OperationCount:
        """Return the work of comparing two models' predictions, after their last layers."""
        targets = shape.targets
        return 2 * (targets * _per_token(self.stem) + self.logits(targets) + self.losses(shape))

    def sensitivity_passes(self, shape: Workload, measured: int) -> OperationCount:
        """Return the part of `measured_sensitivities` independent of the number of sites."""
        few = replace(shape, examples=measured)
        return self.layer_passes(shape) + self.experts_again(shape) + self.layer_passes(few)

    def estimated_sensitivities(self, shape: Workload, measured: int) -> OperationCount:
        """Return the work of `estimate_sensitivities`, excluding pruning.

        Each block runs once more. Experts run twice (dense and pruned), one by one, on the tokens
        that reach them.

        Args:
            shape: The calibration set.
            measured: Number of examples for estimating sensitivities.
        """
        few = replace(shape, examples=measured)
        rows, pairs = apart(few)
        work = self.layerwise_pass(few, stages=0) + self.first_order(few)
        for layer in self.layers:
            work += layer.attention(rows, pairs) + min(layer.sites - 1, 2) * layer.remainder(rows)
        return work

    def layer_passes(self, shape: Workload) -> OperationCount:
        """Return the work of running all layers once, without a shared prefix."""
        rows, pairs = apart(shape)
        return sum((layer.forward(rows, pairs) for layer in self.layers), OperationCount())

    def experts_again(self, shape: Workload) -> OperationCount:
        """Return the work of recomputing the inputs of all experts' output projections."""
        rows, _ = apart(shape)
        return sum((rows * layer.experts_again for layer in self.layers), OperationCount())

    @property
    def compared(self) -> float:
        """Float32 operations per token for output errors: the outputs, and products with inputs."""
        pruned = (p for layer in self.layers for p in layer.products if p.pruned)
        return sum(2 * product.per_token.products for product in pruned)


def apart(shape: Workload) -> tuple[float, float]:
    """Return the number of tokens and of query-key pairs without a shared prefix."""
    rows = shape.examples * shape.tokens
    return rows, rows * shape.tokens


@dataclass(frozen=True)
class SparseGPTWork:
    """The work of SparseGPT's statistics and updates (`sparsegpt`), all in float32.

    Attributes:
        grams: Operations of the sums x_i x_j.
        factors: Operations of the inverse Cholesky factors, 4/3 n^3 each.
        updates: Operations of the updates of the columns after a block.
        moved: Elements read or written inside the blocks.
        columns: Number of columns, which are pruned sequentially.
    """

    grams: float
    factors: float
    updates: float
    moved: float
    columns: int

    @classmethod
    def of(cls, work: ModelWork, tokens: float) -> "SparseGPTWork":
        """Count the work for a number of calibration tokens."""
        inputs = [product for layer in work.layers for product in layer.distinct_inputs]
        pruned = [p for layer in work.layers for p in layer.products if p.pruned]
        return cls(
            grams=sum(2.0 * tokens * product.active * product.inputs**2 for product in inputs),
            factors=sum(4 / 3 * product.copies * product.inputs**3 for product in pruned),
            updates=sum(float(product.weights) * product.inputs for product in pruned),
            # On average, a column updates half of its block: products are written and read, weights
            # are read and written.
            moved=sum(4 * SPARSEGPT_BLOCK / 2 * product.weights for product in pruned),
            columns=sum(product.copies * product.inputs for product in pruned),
        )


@dataclass(frozen=True)
class AlpsWork:
    """The work of ALPS (`alps`), excluding the statistics, all in float32.

    Attributes:
        products: Operations in products of both phases.
        factors: Operations of Cholesky factors and of the inverses computed from them.
        steps: Number of weights times number of steps.
    """

    products: float
    factors: float
    steps: float

    @classmethod
    def of(cls, work: ModelWork, correct_toward_dense: bool) -> "AlpsWork":
        """Count the work; `correct_toward_dense` includes the correction toward the dense model."""
        pruned = [p for layer in work.layers for p in layer.products if p.pruned]
        squares = sum(2.0 * product.weights * product.inputs for product in pruned)
        cubes = sum(float(product.copies) * product.inputs**3 for product in pruned)
        # The target, one product per ADMM step, the residual, and one product per fitting step.
        products = (2 + ALPS_STEPS + FITTING_STEPS) * squares
        return cls(
            products=products + correct_toward_dense * squares,
            # One factor for the damped Hessian, and one for the correction; an inverse is 1 n^3.
            factors=((1 + correct_toward_dense) / 3 + ALPS_INVERSES) * cubes,
            steps=float(work.prunable * (ALPS_STEPS + FITTING_STEPS)),
        )


def count_work(model: PreTrainedModel, sites: list[Site], scored_units: str = "heads") -> ModelWork:
    """Count the work of a model, which may be on the meta device.

    Args:
        model: A causal language model.
        sites: All sites of the model (`find_sites`).
        scored_units: Units to score: `"heads"` or `"all"`.
    """
    stages = stages_by_layer(sites)
    mixers = {site.layer_name: site for site in reversed(sites) if site.mixes_tokens}
    config = model.config.get_text_config(decoder=True)
    pruned = {matrix.parameter for matrix in prunable_matrices(sites)}
    windows = {
        index: getattr(layer, "sliding_window", None)
        for index, layer in enumerate(DynamicCache(config=model.config).layers)
    }
    products = _products(model, getattr(config, "num_experts_per_tok", None) or 1, pruned)
    head = products.pop(_name_of(model, model.get_output_embeddings()))
    layers = []
    for index, name in enumerate(decoder_layer_names(model)):
        in_layer = [path for path in products if path.startswith(f"{name}.")]
        layer_products = {path: products.pop(path) for path in in_layer}
        site = mixers.get(name)
        inside = f"{site.block}." if site else None
        output_proj = layer_products.pop(site.projection) if site else Product(0, 0, False)
        others = [other for other in sites if other.layer == index and other is not site]
        of_mixer = {p for p in layer_products if inside is not None and p.startswith(inside)}
        queries = f"{inside}q_proj"
        layers.append(
            LayerWork(
                input_projs=tuple(layer_products[path] for path in in_layer if path in of_mixer),
                output_proj=output_proj,
                rest=tuple(p for path, p in layer_products.items() if path not in of_mixer),
                closing=tuple(
                    layer_products[path] for path in dict.fromkeys(o.projection for o in others)
                ),
                hidden=config.hidden_size,
                width=site.width if site else 0,
                heads=len(mixer_units(each for each in sites if each.layer == index)),
                groups=sum(len(other.units) for other in others if other.kind == "mlp"),
                experts=sum(other.kind == "expert" for other in others),
                queries=layer_products.get(queries),
                window=windows.get(index),
                stages=len(stages.get(index, [])),
                **(_masking(layer_products, others) if scored_units == "all" else {}),
            )
        )
    return ModelWork(
        layers=tuple(layers),
        stem=tuple(products.values()),
        head=head,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _masking(products: dict[str, Product], others: list[Site]) -> dict[str, Any]:
    """Return the number and work of the masked MLPs and experts of a layer, as in `Wavefront`.

    Each chunk of streams recomputes the MLP, for the input of its output projection. For tokens
    that reach an expert, the block is computed without this expert, and for each of the expert's
    units the output of the expert with that unit masked is added.

    Args:
        products: The products of the layer, by path.
        others: The sites of the layer other than attention.
    """
    work = OperationCount()
    for site in others:
        output_proj, units = products[site.projection], len(site.units)
        inside = [
            p for path, p in products.items() if path.startswith(f"{site.block}.") and p.pruned
        ]
        if site.expert is not None:
            alone = _per_token(tuple(replace(p, active=1) for p in inside if p is not output_proj))
            each = replace(output_proj, active=1).per_token
            reached = output_proj.active / output_proj.copies
            work += reached * (_per_token(tuple(inside)) + alone + units * each)
        else:
            chunks, input_projs = max(1.0, units / _STREAMS), tuple(inside)
            if site.output_module != site.block:
                # Only the output of the projection is replaced, so the other products of the block
                # run for every stream.
                siblings = (
                    p for path, p in products.items() if path.rpartition(".")[0] == site.block
                )
                work += units * _per_token(tuple(p for p in siblings if p is not output_proj))
                input_projs = (output_proj,)
            work += chunks * _per_token(input_projs) + units * output_proj.per_token
    return {"others": sum(len(site.units) for site in others), "masking": work}


def _products(model: PreTrainedModel, active_experts: int, pruned: set[str]) -> dict[str, Product]:
    """Return all products of the model by path, one for each parameter that is a matrix.

    Embeddings do not count, because they are looked up, but an output head tied to one does.
    """
    products = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            *copies, outputs, inputs = parameter.shape
            if isinstance(module, Conv1D):
                outputs, inputs = inputs, outputs
            count = prod(copies)
            is_pruned = f"{path}.{name}" in pruned
            product = Product(inputs, outputs, is_pruned, min(active_experts, count), count)
            products[path if name == "weight" else f"{path}.{name}"] = product
    return products


def _name_of(model: PreTrainedModel, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _per_token(products: tuple[Product, ...]) -> OperationCount:
    return sum((product.per_token for product in products), OperationCount())
