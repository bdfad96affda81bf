"""Finds the sites, units and regions of a model: where the names of its projections are known.

For nearly every architecture, the tensor-parallel plan of transformers says which projections of a
decoder layer write to the residual stream: `rowwise` projections are output projections, `colwise`
projections of the same block are its input projections. The plan does not say which rows of an
input projection belong to which unit; `ROW_LAYOUTS` does, by the name of the projection.

A new architecture needs an entry in `PLANS` if transformers has no plan for it, and one in
`ROW_LAYOUTS` if a projection has a new name or a new arrangement of rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Range = tuple[int, int]
"""`(start, stop)`, as in a slice."""

QUERIES = "q_proj"
"""Name of the query projection of an attention, where queries have a projection of their own."""

KEYS_AND_VALUES = ("k_proj", "v_proj")
"""Names of the key and value projections, where they are projections of their own."""


@dataclass(frozen=True)
class WeightSlice:
    """A slice of one parameter along one dimension.

    Attributes:
        parameter: Name as in `model.named_parameters()`.
        dim: Dimension of the matrix (0 or 1) along which the range runs; the leading expert
            dimension of a 3-D parameter does not count.
        start: First index.
        stop: One past the last index.
        expert: Index into the leading dimension of a 3-D parameter, otherwise `None`.
    """

    parameter: str
    dim: int
    start: int
    stop: int
    expert: int | None = None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return this slice of `parameter`, as a view."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Unit:
    """A part of a site that can be masked: a head, or a group of channels of an MLP or expert.

    Attributes:
        index: Position among the units of the site.
        channels: Range of the inputs of the site's output projection.
        region: The weights that belong to the unit. Under grouped-query attention, several units
            share key and value rows.
    """

    index: int
    channels: Range
    region: tuple[WeightSlice, ...]


@dataclass(frozen=True)
class Site:
    """An attention block, an MLP or one expert.

    Its units write to the residual stream through one output projection.

    Attributes:
        name: Path of the output projection; an expert adds its index, as in `...down_proj[3]`.
        kind: `"attention"`, `"mlp"` or `"expert"`.
        layer: Index of the decoder layer.
        layer_name: Path of the decoder layer.
        block: Path of the module that contains the projection (attention or MLP); that of the
            layer if there is no such module.
        width: Number of inputs of the output projection.
        units: The units, in the order of their channels; together they cover all channels.
        expert: Index of the expert, otherwise `None`.
    """

    name: str
    kind: str
    layer: int
    layer_name: str
    block: str
    width: int
    units: tuple[Unit, ...]
    expert: int | None = None

    @property
    def projection(self) -> str:
        """Path of the output projection, without an expert's index."""
        return self.name if self.expert is None else self.name.removesuffix(f"[{self.expert}]")

    @property
    def output_proj(self) -> "Matrix":
        """The matrix of the output projection."""
        return Matrix(self.units[0].region[0].parameter, self.expert)

    @property
    def output_module(self) -> str:
        """Path of the module that returns the output of the projection, or the sum over experts."""
        return self.projection if self.block == self.layer_name else self.block


class SiteUnit(NamedTuple):
    """A unit and the site that it belongs to."""

    site: Site
    unit: Unit


@dataclass(frozen=True)
class Matrix:
    """One prunable matrix: a parameter, or one expert of a 3-D parameter."""

    parameter: str
    expert: int | None = None

    @property
    def name(self) -> str:
        """Name of the parameter, with the index of the expert, as in `...down_proj[3]`."""
        return self.parameter if self.expert is None else f"{self.parameter}[{self.expert}]"

    @property
    def module(self) -> str:
        """Path of the module that uses it."""
        return self.parameter.rpartition(".")[0]

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the matrix, a 2-D view of `parameter`."""
        return parameter if self.expert is None else parameter[self.expert]


def find_sites(model: PreTrainedModel, mlp_unit_size: int | None = None) -> list[Site]:
    """Find every site of `model`, layer by layer, attention before MLP.

    Args:
        model: A causal language model.
        mlp_unit_size: Channels per unit of MLP and expert sites (the last unit may have fewer);
            `None` makes each of these sites one unit.

    Raises:
        ValueError: `model` is not a decoder-only language model, or its architecture is not
            supported; the message says what is missing and where to add it.
    """
    decoder_name, decoder = decoder_of(model)
    plan = _plan(model)
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    sites: list[Site] = []
    for layer, layer_name in enumerate(_layer_names(decoder, plan)):
        full_name = f"{decoder_name}.{layer_name}" if decoder_name else layer_name
        layer_sites = [
            site
            for block, (output_proj, input_projs) in _blocks(plan).items()
            for site in _block_sites(
                model, layer, full_name, block, output_proj, input_projs, heads, mlp_unit_size
            )
        ]
        if not any(site.kind == "attention" for site in layer_sites):
            raise ValueError(
                f"{type(model).__name__} is not supported: found no attention in {full_name} "
                f"(looked for {', '.join(sorted(plan))}). Add the architecture to PLANS in "
                "optimum_cap/models/architectures.py"
            )
        sites += sorted(layer_sites, key=lambda site: site.kind != "attention")
    return sites


def prunable_matrices(sites: Iterable[Site]) -> list[Matrix]:
    """Return the matrices that the regions of `sites` cover, in the order of the model."""
    slices = (piece for site in sites for unit in site.units for piece in unit.region)
    return list(dict.fromkeys(Matrix(piece.parameter, piece.expert) for piece in slices))


def heads(sites: Iterable[Site]) -> list[SiteUnit]:
    """Return the attention heads among the units of `sites`, each with its site, in order."""
    return [
        SiteUnit(site, unit) for site in sites if site.kind == "attention" for unit in site.units
    ]


def all_units(sites: Iterable[Site]) -> list[SiteUnit]:
    """Return all units of `sites`, each with its site, in order."""
    return [SiteUnit(site, unit) for site in sites for unit in site.units]


def separable(model: PreTrainedModel, site: Site, unit: Unit) -> list[WeightSlice]:
    """Return the part of a head's region that can be zeroed without affecting other heads.

    If queries or keys are normalised over all heads at once (OLMoE), their rows are not part of it.
    Neither are keys and values that later layers read (Gemma 3n, Gemma 4).
    """
    block = model.get_submodule(site.block)
    start, stop = unit.channels
    inseparable = set()
    for norm, projection in NORMS.items():
        weight = getattr(getattr(block, norm, None), "weight", None)
        if weight is not None and weight.numel() > stop - start:
            inseparable.add(f"{site.block}.{projection}.weight")
    if getattr(block, "store_full_length_kv", False):
        inseparable |= {f"{site.block}.{projection}.weight" for projection in KEYS_AND_VALUES}
    return [piece for piece in unit.region if piece.parameter not in inseparable]


def oriented(model: PreTrainedModel, matrix: Matrix) -> torch.Tensor:
    """Return the weights of a matrix as a view `[out, in]`, even if they are stored transposed."""
    weight = matrix.of(model.get_parameter(matrix.parameter).data)
    return weight.T if is_transposed(model, matrix) else weight


def is_transposed(model: PreTrainedModel, matrix: Matrix) -> bool:
    """Return whether a matrix is stored as `[in, out]`."""
    return isinstance(model.get_submodule(matrix.module), Conv1D)


def matrices_by_layer(sites: Iterable[Site]) -> dict[int, list[Matrix]]:
    """Return the prunable matrices of each decoder layer."""
    sites = list(sites)
    layers = sorted({site.layer for site in sites})
    return {
        layer: prunable_matrices(site for site in sites if site.layer == layer) for layer in layers
    }


def stages_by_layer(sites: Iterable[Site]) -> dict[int, list[list[Matrix]]]:
    """Return the prunable matrices of each decoder layer in the order in which they run.

    The matrices of a stage do not depend on each other. The stages are: input projections of the
    attention, its output projection, input projections of MLP or experts, their output projections.
    """
    stages: dict[int, list[list[Matrix]]] = {}
    sites = list(sites)
    for layer, layer_matrices in matrices_by_layer(sites).items():
        output_projs = {site.output_proj for site in sites if site.layer == layer}
        attention = prunable_matrices(
            site for site in sites if site.layer == layer and site.kind == "attention"
        )
        others = [matrix for matrix in layer_matrices if matrix not in attention]
        stages[layer] = [
            stage
            for block in (attention, others)
            for stage in (
                [matrix for matrix in block if matrix not in output_projs],
                [matrix for matrix in block if matrix in output_projs],
            )
            if stage
        ]
    return stages


def activation_bytes_per_token(model: PreTrainedModel, longest: int) -> int:
    """Return how many bytes a token takes while a decoder layer runs in float32.

    Args:
        model: The model.
        longest: Number of tokens of the longest sequence.
    """
    config = model.config.get_text_config(decoder=True)
    # Attention that is not fused keeps its probabilities and a float32 copy of them.
    attention = 8 * config.num_attention_heads * longest
    widths = 7 * config.hidden_size + layer_input_width(model) + 4 * mlp_width(model)
    return int(4 * widths + attention)


def layer_input_width(model: PreTrainedModel) -> int:
    """Return how many values a decoder layer receives for each token.

    Gemma 3n has several hidden states for each token, and Gemma 3n and 4 have inputs per layer.
    """
    config = model.config.get_text_config(decoder=True)
    hidden_states = getattr(config, "altup_num_inputs", 1)
    per_layer = getattr(config, "hidden_size_per_layer_input", None) or 0
    return int(hidden_states * config.hidden_size + per_layer)


def mlp_width(model: PreTrainedModel) -> int:
    """Return the number of channels of an MLP, the largest if layers differ."""
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    width = max(width) if isinstance(width, Sequence) else width
    return int(width * (2 if getattr(config, "use_double_wide_mlp", False) else 1))


def decoder_layers(model: PreTrainedModel, sites: Iterable[Site]) -> list[nn.Module]:
    """Return the decoder layers of `model` in order, as named by its `sites`."""
    names = {site.layer: site.layer_name for site in sites}
    return [model.get_submodule(names[layer]) for layer in sorted(names)]


def decoder_of(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Return the path of the decoder in `model`, and the decoder.

    Raises:
        ValueError: `model` is not a decoder-only causal language model.
    """
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} is not a decoder-only causal language model, so it has no "
            "loss on answers that CAP could measure: load the model with AutoModelForCausalLM"
        )
    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    return name, decoder


def _plan(model: PreTrainedModel) -> dict[str, str]:
    config = model.config.get_text_config(decoder=True)
    plan = PLANS.get(config.model_type) or getattr(config, "base_model_tp_plan", None) or {}
    if not any(".*." in pattern for pattern in plan):  # a plan may name no layer (dory)
        raise ValueError(
            f"{type(model).__name__} (model_type {config.model_type!r}) is not supported: its "
            "config has no base_model_tp_plan that names projections of the decoder layers, and it "
            f"is not in PLANS ({', '.join(sorted(PLANS))}). Add it to PLANS in "
            "optimum_cap/models/architectures.py"
        )
    return dict(plan)


def _blocks(plan: dict[str, str]) -> dict[str, tuple[str, list[str]]]:
    """Group the plan by block: path in the layer -> (output projection, input projections)."""
    output_projs: dict[str, str] = {}
    input_projs: dict[str, list[str]] = {}
    for pattern, style in plan.items():
        if ".*." not in pattern:
            continue
        block, _, projection = pattern.partition(".*.")[2].rpartition(".")
        if style.startswith("rowwise"):
            output_projs[block] = projection
        elif "colwise" in style:
            input_projs.setdefault(block, []).append(projection)
    return {block: (output_projs[block], input_projs.get(block, [])) for block in output_projs}


def _layer_names(decoder: nn.Module, plan: dict[str, str]) -> Iterator[str]:
    container = next(pattern.partition(".*.")[0] for pattern in plan if ".*." in pattern)
    layers = getattr(decoder, container, None)
    if layers is None:
        raise ValueError(
            f"{type(decoder).__name__} is not supported: its plan names decoder layers "
            f"{container!r}, which it does not have. Add it to PLANS in "
            "optimum_cap/models/architectures.py"
        )
    return (f"{container}.{index}" for index in range(len(layers)))


def _block_sites(
    model: PreTrainedModel,
    layer: int,
    layer_name: str,
    block: str,
    output_proj: str,
    input_projs: list[str],
    heads: int,
    mlp_unit_size: int | None,
) -> Iterator[Site]:
    """Yield the site of a block, or one site per expert; nothing if the layer lacks the block."""
    block_name = f"{layer_name}.{block}" if block else layer_name
    projection = f"{block_name}.{output_proj}"
    weight_name, weight, transposed = _weight(model, projection)
    if weight is None:
        return
    is_attention = any(name in ATTENTION_LAYOUTS for name in input_projs)
    in_dim = 0 if transposed else 1
    width = weight.shape[-2] if transposed else weight.shape[-1]
    if is_attention and width % heads:
        raise ValueError(
            f"{type(model).__name__} is not supported: {projection} takes {width} channels, not a "
            f"multiple of its {heads} attention heads"
        )
    size = width // heads if is_attention else (mlp_unit_size or width)
    bounds = [(start, min(start + size, width)) for start in range(0, width, size)]

    experts: list[int | None] = list(range(weight.shape[0])) if weight.ndim == 3 else [None]
    for expert in experts:
        regions = [[WeightSlice(weight_name, in_dim, *channels, expert)] for channels in bounds]
        for name in input_projs:
            for region, slices in zip(
                regions,
                _input_slices(model, f"{block_name}.{name}", bounds, expert),
                strict=True,
            ):
                region += slices
        yield Site(
            name=projection if expert is None else f"{projection}[{expert}]",
            kind="attention" if is_attention else "mlp" if expert is None else "expert",
            layer=layer,
            layer_name=layer_name,
            block=block_name,
            width=width,
            units=tuple(
                Unit(index, channels, tuple(region))
                for index, (channels, region) in enumerate(zip(bounds, regions, strict=True))
            ),
            expert=expert,
        )


def _input_slices(
    model: PreTrainedModel, projection: str, bounds: list[Range], expert: int | None
) -> list[list[WeightSlice]]:
    """Return the slices of an input projection for each unit."""
    name = projection.rpartition(".")[2]
    layout = ROW_LAYOUTS.get(name)
    if layout is None:
        raise ValueError(
            f"{type(model).__name__} is not supported: no row layout for {name!r} of {projection} "
            f"(supported: {', '.join(sorted(ROW_LAYOUTS))}). Add it to ROW_LAYOUTS in "
            "optimum_cap/models/architectures.py"
        )
    weight_name, weight, transposed = _weight(model, projection)
    if weight is None:
        return [[] for _ in bounds]
    dim = 1 if transposed else 0
    rows = weight.shape[-1] if transposed else weight.shape[-2]
    ranges = layout(rows, bounds)
    if max(stop for unit in ranges for _, stop in unit) != rows:
        raise ValueError(
            f"{type(model).__name__} is not supported: {projection} has {rows} rows, which does "
            f"not fit the row layout of {name!r} with {len(bounds)} units of "
            f"{bounds[0][1] - bounds[0][0]} channels. See ROW_LAYOUTS in "
            "optimum_cap/models/architectures.py"
        )
    return [[WeightSlice(weight_name, dim, *piece, expert) for piece in unit] for unit in ranges]


def _weight(model: PreTrainedModel, path: str) -> tuple[str, torch.Tensor | None, bool]:
    """Return (parameter name, parameter, whether stored as [in, out]) of a projection."""
    parent_name, _, name = path.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
    except AttributeError:
        return path, None, False
    value = getattr(parent, name, None)
    if isinstance(value, nn.Parameter):  # all experts in one 3-D parameter
        return path, value, False
    if isinstance(value, nn.Module) and isinstance(
        weight := getattr(value, "weight", None), torch.Tensor
    ):
        return f"{path}.weight", weight, isinstance(value, Conv1D)
    return path, None, False


# Layouts: (number of rows, channel range of each unit) -> row ranges of each unit. "Rows" are
# output features, whichever way the matrix is stored.


def _one_to_one(rows: int, bounds: list[Range]) -> list[list[Range]]:
    return [[channels] for channels in bounds]


def _shared_key_value(rows: int, bounds: list[Range]) -> list[list[Range]]:
    """Grouped-query attention: consecutive query heads share the rows of one key/value head."""
    head_dim = bounds[0][1] - bounds[0][0]
    queries_per_key = max(1, len(bounds) * head_dim // rows)
    starts = [index // queries_per_key * head_dim for index in range(len(bounds))]
    return [[(start, start + head_dim)] for start in starts]


def _stacked_query_key_value(rows: int, bounds: list[Range]) -> list[list[Range]]:
    """All queries, then all keys, then all values (Phi-3, GPT-2)."""
    width = bounds[-1][1]
    key_rows = (rows - width) // 2
    shared = _shared_key_value(key_rows, bounds)
    return [
        [
            channels,
            (width + start, width + stop),
            (width + key_rows + start, width + key_rows + stop),
        ]
        for channels, [(start, stop)] in zip(bounds, shared, strict=True)
    ]


def _interleaved_query_key_value(rows: int, bounds: list[Range]) -> list[list[Range]]:
    """Query, key and value of the first head, then of the second, ... (GPT-NeoX)."""
    return [[(3 * start, 3 * stop)] for start, stop in bounds]


def _stacked_gate_up(rows: int, bounds: list[Range]) -> list[list[Range]]:
    """All gate rows, then all up rows."""
    half = rows // 2
    return [[(start, stop), (half + start, half + stop)] for start, stop in bounds]


Layout = Callable[[int, list[Range]], list[list[Range]]]

ATTENTION_LAYOUTS: dict[str, Layout] = {
    "q_proj": _one_to_one,
    "k_proj": _shared_key_value,
    "v_proj": _shared_key_value,
    "qkv_proj": _stacked_query_key_value,
    "c_attn": _stacked_query_key_value,
    "query_key_value": _interleaved_query_key_value,
}
ROW_LAYOUTS: dict[str, Layout] = {
    **ATTENTION_LAYOUTS,
    "gate_proj": _one_to_one,
    "up_proj": _one_to_one,
    "gate_up_proj": _stacked_gate_up,
    "dense_h_to_4h": _one_to_one,
    "c_fc": _one_to_one,
    "fc1": _one_to_one,
}

# Norms of an attention, and the projections whose outputs they normalise.
NORMS = {"q_norm": "q_proj", "k_norm": "k_proj"}

# Tensor-parallel plans in transformers' notation, for architectures where transformers has none.
PLANS: dict[str, dict[str, str]] = {
    "gpt2": {
        "h.*.attn.c_attn": "colwise",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    "opt": {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.out_proj": "rowwise",
        "layers.*.fc1": "colwise",
        "layers.*.fc2": "rowwise",
    },
}
