"""Work of a model, counted from the shapes of its weights: no weight is read, none allocated.

The products of weights and the two products of attention are counted exactly, as
`torch.utils.flop_counter` does: 2 m k n for `[m, k] @ [k, n]`, and attention over all pairs of
tokens, whatever a kernel spares of them. Of a mixture of experts, the active ones count. What lies
between the products (norms, activations, residuals) is counted in elements that go through memory.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_cap.methods import ALPS_INVERSES, ALPS_STEPS, FITTING_STEPS
from optimum_cap.methods import BLOCK as OBS_BLOCK
from optimum_cap.models import QUERIES, Site, prunable_matrices
from optimum_cap.scoring import WORTHWHILE_SHARE

# Elements read or written per channel of the hidden state and per output of a projection. By
# reading the code of Llama: norms widen, square, average, scale and narrow; a gate is activated and
# multiplied, queries and keys are rotated; and both were checked against benchmarks/estimate.py.
_PER_CHANNEL = 12
_PER_OUTPUT = 4
_PER_LOGIT = 2
_PER_LOSS = 10  # per logit of a scored token: widened, exponentiated, summed

_STREAMS = 4  # per chunk, of a batch of the size that `wavefront.py` wants


@dataclass(frozen=True)
class OperationCount:
    """An amount of work; amounts add up, and a number of times an amount is an amount.

    Attributes:
        products: Operations in products with weights.
        attention: Operations in products of queries and keys, and of their weights and values.
        moved: Elements of activations that go through memory between the products.
        passed: Tokens times the layers that they pass.
    """

    products: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    passed: float = 0.0

    @property
    def operations(self) -> float:
        """Floating-point operations."""
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
    """A matrix of weights, or the same matrix of every expert.

    Attributes:
        inputs: Its inputs.
        outputs: Its outputs.
        pruned: Whether it is prunable.
        active: Copies that a token goes through.
        copies: Copies that there are.
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
    """A decoder layer.

    Attributes:
        input_projs: Products that feed its attention (queries, keys, values).
        output_proj: The product of its attention site.
        rest: The other products (MLP, router, experts).
        closing: Those of them that mix: the last ones of MLP and experts.
        hidden: Channels of the hidden state.
        width: Channels of the attention site.
        heads: Number of heads.
        groups: Number of units of its MLP; 0 where it has experts alone.
        experts: Number of experts.
        others: Number of units of its MLP and experts that are scored.
        masking: Work for one token of what its MLP and experts return with each of these masked.
        queries: The product that makes queries and nothing else; `None` if it makes keys too.
        window: Tokens that a token attends to, itself included; `None` is all before it.
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

    @property
    def products(self) -> tuple[Product, ...]:
        """All products of the layer."""
        return (*self.input_projs, self.output_proj, *self.rest)

    @property
    def distinct_inputs(self) -> tuple[Product, ...]:
        """One product for each input of prunable matrices; those with the same input share it."""
        parts = (self.input_projs, (self.output_proj,), self.rest)
        return tuple(
            product
            for part in parts
            for product in {p.inputs: p for p in part if p.pruned}.values()
        )

    @property
    def norms(self) -> OperationCount:
        """Work of what lies between the products, for one token."""
        return OperationCount(moved=_PER_CHANNEL * self.hidden, passed=1)

    @property
    def cached(self) -> int:
        """Keys and values of a token."""
        return sum(product.outputs for product in self.input_projs) - self.width

    @property
    def prunable(self) -> int:
        """Number of prunable weights."""
        return sum(product.weights for product in self.products if product.pruned)

    @property
    def sites(self) -> int:
        """Number of sites: the attention, the MLP, every expert."""
        return 1 + bool(self.groups) + self.experts

    @property
    def routers(self) -> tuple[Product, ...]:
        """Products that choose experts."""
        return tuple(product for product in self.rest if not product.pruned)

    @property
    def experts_again(self) -> OperationCount:
        """Work for one token of the inputs of the experts' last products, computed on their own."""
        return _per_token(tuple(p for p in self.rest if p.copies > 1 and p not in self.closing))

    def attention(self, tokens: float, pairs: float) -> OperationCount:
        """Work of the attention: queries, keys, values, their products, the output projection."""
        return (
            tokens * _per_token(self.input_projs)
            + OperationCount(attention=4.0 * self.width * pairs)
            + tokens * self.output_proj.per_token
        )

    def last_attention(self, shape: "Workload") -> OperationCount:
        """Work of the attention of a stream in the last layer, as `LastAttention` does it."""
        querying = shape.querying
        keys = _per_token(self.input_projs)
        if self.queries is not None:
            keys += -1 * self.queries.per_token
        kept = shape.tokens - querying / shape.examples
        if self.window is not None:
            kept = min(kept, self.window - 1)
        pairs = querying * (kept + querying / shape.examples)
        return (shape.rows - querying) * keys + self.attention(querying, pairs)

    def remainder(self, tokens: float) -> OperationCount:
        """Work of all but the attention."""
        return tokens * (_per_token(self.rest) + self.norms)

    def starting(self, tokens: float) -> OperationCount:
        """Work of all streams that start in the MLP or in experts: no attention, little of both."""
        return tokens * (self.masking + self.others * (_per_token(self.routers) + self.norms))

    def forward(self, tokens: float, pairs: float) -> OperationCount:
        """Work of the layer for tokens that make so many pairs of query and key."""
        return self.attention(tokens, pairs) + self.remainder(tokens)


@dataclass(frozen=True)
class Workload:
    """Examples that have the same length.

    Attributes:
        examples: Number of examples.
        tokens: Tokens per example.
        scored: Scored tokens per example.
        prefix: Tokens at the start that all examples share, computed once for all of them.
    """

    examples: int
    tokens: int
    scored: int
    prefix: int = 0

    @property
    def rows(self) -> float:
        """Tokens that are computed."""
        return self.prefix + self.examples * (self.tokens - self.prefix)

    @property
    def pairs(self) -> float:
        """Pairs of query and key."""
        own = self.examples * (self.tokens - self.prefix) * self.tokens
        return float(self.prefix**2 + own)

    @property
    def querying(self) -> float:
        """Tokens with queries in the last layer: those from the first scored position on.

        Scored tokens are taken to be the last ones. Where few come before them, all have queries,
        but for the prefix.
        """
        suffix = self.tokens - self.prefix
        last = min(self.scored + 1, suffix)
        pays = suffix - last >= WORTHWHILE_SHARE * suffix
        return self.examples * (last if pays else suffix)

    @property
    def targets(self) -> float:
        """Scored tokens of all examples."""
        return self.examples * self.scored


@dataclass(frozen=True)
class ModelWork:
    """A causal language model.

    Attributes:
        layers: Its decoder layers.
        stem: Products outside the layers that every token passes.
        head: The product that makes logits.
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
    def heads(self) -> int:
        """Number of attention heads."""
        return sum(layer.heads for layer in self.layers)

    @property
    def scored(self) -> int:
        """Number of units that are scored."""
        return self.heads + sum(layer.others for layer in self.layers)

    def logits(self, positions: float) -> OperationCount:
        """Work of the logits at so many positions."""
        return positions * OperationCount(
            self.head.per_token.products, moved=_PER_LOGIT * self.head.outputs
        )

    def losses(self, shape: Workload) -> OperationCount:
        """Work of the cross-entropies of the scored tokens, their logits given."""
        return OperationCount(moved=_PER_LOSS * self.head.outputs * shape.targets)

    def forward(self, shape: Workload, logits: float | None = None) -> OperationCount:
        """Work of one forward pass.

        Args:
            shape: The examples.
            logits: Positions at which logits are computed; `None` is all of them.
        """
        work = shape.rows * _per_token(self.stem)
        for layer in self.layers:
            work += layer.forward(shape.rows, shape.pairs)
        return work + self.logits(shape.rows if logits is None else logits)

    def plain(self, shape: Workload) -> OperationCount:
        """Work of `plain_losses`: one forward pass intact, and one per scored unit."""
        whole = Workload(shape.examples, shape.tokens, shape.scored)
        return (1 + self.scored) * (self.forward(whole) + self.losses(whole))

    def exact(self, shape: Workload) -> OperationCount:
        """Work of `exact_losses`: each masked stream from where it leaves the intact one.

        In the last layer, what follows the attention runs at scored positions only, and the
        attention itself has queries from the first of them on.
        """
        work = self.forward(shape, logits=shape.examples)
        streams = 0
        for layer in self.layers[:-1]:
            started = shape.rows * layer.output_proj.per_token + layer.remainder(shape.rows)
            work += streams * layer.forward(shape.rows, shape.pairs) + layer.heads * started
            work += layer.starting(shape.rows)
            streams += layer.heads + layer.others
        last = self.layers[-1]
        # One more, and the tokens up to the first layer: whether the attention comes out the same.
        work += (streams + 1) * last.last_attention(shape)
        entering = tuple(p for p in self.stem if p.outputs == last.hidden)
        work += (shape.rows - shape.prefix) * _per_token(entering)
        work += last.heads * shape.targets * last.output_proj.per_token
        streams += last.heads
        work += streams * last.remainder(shape.targets) + last.starting(shape.targets)
        streams += last.others
        # Logits come from the model with its layers short-circuited, so the stem runs again.
        scored = shape.targets * _per_token(self.stem) + self.logits(shape.targets)
        return work + (1 + streams) * (scored + self.losses(shape))

    def first_order(self, shape: Workload) -> OperationCount:
        """Work of one forward and one backward pass.

        The weights are frozen, so a product with weights has one product as its gradient; one of
        attention has two. Experts that are scored are computed once more, by themselves.
        """
        whole = Workload(shape.examples, shape.tokens, shape.scored)
        work = self.forward(whole, logits=whole.targets) + self.losses(whole)
        backward = OperationCount(work.products, 2 * work.attention, 2 * work.moved, work.passed)
        for layer in self.layers:
            if layer.others:
                work += whole.rows * _per_token(tuple(p for p in layer.rest if p.copies > 1))
        return work + backward

    def layer_walk(self, shape: Workload, stages: int = 1) -> OperationCount:
        """Work of pruning layer by layer: each runs before each of its stages, and at the end."""
        return (1 + stages) * self._layers(shape) + self._experts_again(shape)

    def paired_walk(self, shape: Workload, by_projection: bool) -> OperationCount:
        """Work of a `DenseReferencePass`: both models run, only as far as is needed."""
        rows, pairs = _apart(shape)
        work = 3 * self._layers(shape) + self._experts_again(shape)
        for layer in self.layers:
            work += -rows * _per_token(layer.closing)
            if by_projection:
                work += 4 * layer.attention(rows, pairs) + -2 * rows * layer.output_proj.per_token
                # A run ends at the last of the matrices that it is for.
                entering = (p for p in layer.rest if p.pruned and p not in layer.closing)
                single = tuple(product for product in entering if product.copies == 1)
                ran = (*layer.input_projs[:-1], *layer.routers, *single[:-1])
                work += 2 * rows * _per_token(ran)
        return work

    def interventions(self, shape: Workload, measured: int) -> OperationCount:
        """Work of `responses` but for the pruning: a walk, and each site from its layer on.

        Args:
            shape: The calibration set.
            measured: Examples that the predictions are compared on.
        """
        few = replace(shape, examples=measured)
        rows, pairs = _apart(few)
        work = self.intervention_walks(shape, measured)
        for index, layer in enumerate(self.layers):
            # All sites up to here, and the dense model, which the last layer need not pass.
            passing = sum(before.sites for before in self.layers[: index + 1])
            dense = index + 1 < len(self.layers)
            work += (passing + dense) * layer.forward(rows, pairs)
        sites = sum(layer.sites for layer in self.layers)
        scored = few.targets * _per_token(self.stem) + self.logits(few.targets) + self.losses(few)
        return work + 2 * sites * scored

    def intervention_walks(self, shape: Workload, measured: int) -> OperationCount:
        """The part of `interventions` that does not depend on the sites that are tried."""
        few = replace(shape, examples=measured)
        return self._layers(shape) + self._experts_again(shape) + self._layers(few)

    def estimated_interventions(self, shape: Workload, measured: int) -> OperationCount:
        """Work of `estimate_sensitivities` but for the pruning: each block runs once more.

        Experts run twice, one by one on the tokens that reach them: dense, and pruned.

        Args:
            shape: The calibration set.
            measured: Examples that are used.
        """
        few = replace(shape, examples=measured)
        rows, pairs = _apart(few)
        work = self.layer_walk(few, stages=0) + self.first_order(few)
        for layer in self.layers:
            work += layer.attention(rows, pairs) + min(layer.sites - 1, 2) * layer.remainder(rows)
        return work

    def _layers(self, shape: Workload) -> OperationCount:
        rows, pairs = _apart(shape)
        return sum((layer.forward(rows, pairs) for layer in self.layers), OperationCount())

    def _experts_again(self, shape: Workload) -> OperationCount:
        rows, _ = _apart(shape)
        return sum((rows * layer.experts_again for layer in self.layers), OperationCount())

    @property
    def compared(self) -> float:
        """Operations per token of what outputs miss, in float32: its outputs, times its inputs."""
        pruned = (p for layer in self.layers for p in layer.products if p.pruned)
        return sum(2 * product.per_token.products for product in pruned)


def _apart(shape: Workload) -> tuple[float, float]:
    """Tokens, and pairs of query and key, where no prefix is shared."""
    rows = shape.examples * shape.tokens
    return rows, rows * shape.tokens


@dataclass(frozen=True)
class ObsWork:
    """Work of SparseGPT's statistics and updates (`reconstruction.sparsegpt`), all in float32.

    Attributes:
        grams: Operations of the sums x_i x_j.
        factors: Operations of the inverse Cholesky factors, of 4/3 n^3 each.
        updates: Operations of the updates of the columns behind a block.
        moved: Elements that go through memory inside the blocks.
        columns: Columns that are pruned one after the other.
    """

    grams: float
    factors: float
    updates: float
    moved: float
    columns: int

    @classmethod
    def of(cls, work: ModelWork, tokens: float) -> "ObsWork":
        """Count the work for so many calibration tokens."""
        inputs = [product for layer in work.layers for product in layer.distinct_inputs]
        pruned = [p for layer in work.layers for p in layer.products if p.pruned]
        return cls(
            grams=sum(2.0 * tokens * product.active * product.inputs**2 for product in inputs),
            factors=sum(4 / 3 * product.copies * product.inputs**3 for product in pruned),
            updates=sum(float(product.weights) * product.inputs for product in pruned),
            # A column changes half of its block on average: products written and read, weights
            # read and written.
            moved=sum(4 * OBS_BLOCK / 2 * product.weights for product in pruned),
            columns=sum(product.copies * product.inputs for product in pruned),
        )


@dataclass(frozen=True)
class AlpsWork:
    """Work of ALPS once the statistics are there (`reconstruction.alps`), all in float32.

    Attributes:
        products: Operations of the steps of both of its phases.
        factors: Operations of Cholesky factors, of which most become inverses.
        steps: Weights times the steps that they go through.
    """

    products: float
    factors: float
    steps: float

    @classmethod
    def of(cls, work: ModelWork, correct_toward_dense: bool) -> "AlpsWork":
        """Count the work; `correct_toward_dense`: matrices are first fitted to the dense model."""
        pruned = [p for layer in work.layers for p in layer.products if p.pruned]
        squares = sum(2.0 * product.weights * product.inputs for product in pruned)
        cubes = sum(float(product.copies) * product.inputs**3 for product in pruned)
        # The target, one product in every step, the residual, one product in each fitting.
        products = (2 + ALPS_STEPS + FITTING_STEPS) * squares
        return cls(
            products=products + correct_toward_dense * squares,
            # One factor finds the damping, one more that of the correction; an inverse is 1 n^3.
            factors=((1 + correct_toward_dense) / 3 + ALPS_INVERSES) * cubes,
            steps=float(work.prunable * (ALPS_STEPS + FITTING_STEPS)),
        )


def count_work(model: PreTrainedModel, sites: list[Site], scored_units: str = "heads") -> ModelWork:
    """Count the work of a model, which may be on the meta device.

    Args:
        model: A causal language model.
        sites: All its sites (`find_sites`).
        scored_units: The units to score: `"heads"` or `"all"`.
    """
    attention = {site.layer_name: site for site in sites if site.kind == "attention"}
    config = model.config.get_text_config(decoder=True)
    pruned = {matrix.parameter for matrix in prunable_matrices(sites)}
    cached = DynamicCache(config=model.config).layers
    found = _products(model, getattr(config, "num_experts_per_tok", None) or 1, pruned)
    head = found.pop(_name_of(model, model.get_output_embeddings()))
    layers = []
    for name, site in attention.items():
        own = {path: found.pop(path) for path in list(found) if path.startswith(f"{name}.")}
        output_proj = own.pop(site.projection)
        inside = f"{site.block}."
        others = [other for other in sites if other.layer == site.layer and other is not site]
        layers.append(
            LayerWork(
                input_projs=tuple(p for path, p in own.items() if path.startswith(inside)),
                output_proj=output_proj,
                rest=tuple(p for path, p in own.items() if not path.startswith(inside)),
                closing=tuple(own[path] for path in dict.fromkeys(o.projection for o in others)),
                hidden=config.hidden_size,
                width=site.width,
                heads=len(site.units),
                groups=sum(len(other.units) for other in others if other.kind == "mlp"),
                experts=sum(other.kind == "expert" for other in others),
                queries=own.get(f"{inside}{QUERIES}"),
                window=getattr(cached[site.layer], "sliding_window", None),
                **(_masking(own, others) if scored_units == "all" else {}),
            )
        )
    return ModelWork(
        layers=tuple(layers),
        stem=tuple(found.values()),
        head=head,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _masking(own: dict[str, Product], others: list[Site]) -> dict[str, Any]:
    """Number and work of the masked MLPs and experts of a layer, as `Wavefront` computes them.

    Each chunk of streams computes an MLP once more for the input of its projection. Tokens that
    reach an expert are computed without it, and what is left of it is added for each of its units.

    Args:
        own: The products of the layer, by path.
        others: Its sites beside attention.
    """
    work = OperationCount()
    for site in others:
        output_proj, units = own[site.projection], len(site.units)
        inside = [p for path, p in own.items() if path.startswith(f"{site.block}.") and p.pruned]
        if site.expert is not None:
            alone = _per_token(tuple(replace(p, active=1) for p in inside if p is not output_proj))
            each = replace(output_proj, active=1).per_token
            reached = output_proj.active / output_proj.copies
            work += reached * (_per_token(tuple(inside)) + alone + units * each)
        else:
            chunks, input_projs = max(1.0, units / _STREAMS), tuple(inside)
            if site.output_module != site.block:
                # The projection alone is given, so what feeds it runs for each of the streams.
                beside = (p for path, p in own.items() if path.rpartition(".")[0] == site.block)
                work += units * _per_token(tuple(p for p in beside if p is not output_proj))
                input_projs = (output_proj,)
            work += chunks * _per_token(input_projs) + units * output_proj.per_token
    return {"others": sum(len(site.units) for site in others), "masking": work}


def _products(model: PreTrainedModel, active_experts: int, pruned: set[str]) -> dict[str, Product]:
    """Return every product of the model by its path: all parameters that are matrices.

    Embeddings are looked up, not multiplied; where one is tied to the head, the head counts.
    """
    found = {}
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
            found[path if name == "weight" else f"{path}.{name}"] = product
    return found


def _name_of(model: PreTrainedModel, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _per_token(products: tuple[Product, ...]) -> OperationCount:
    return sum((product.per_token for product in products), OperationCount())
