"""Finds the sites, units and regions of a model by observing its decoder layers.

Sites are derived from what `observation` finds: a projection that writes to the residual stream is
the output projection of a site, and so is the output projection of every expert. The projections
that feed it, directly or through others, are its input projections.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from optimum_cap.models.experts import OUTPUT, ExpertsLayout
from optimum_cap.models.hooks import has_lm_head
from optimum_cap.models.internals import implementations
from optimum_cap.models.layouts import layout_of
from optimum_cap.models.modes import evaluation_mode
from optimum_cap.models.observation import (
    LayerObserver,
    LayoutError,
    Projection,
    Rows,
    head_counts,
    recorded_layer_calls,
    rows_of_experts,
    with_values,
)
from optimum_cap.models.offload import device_of
from optimum_cap.models.sites import Matrix, Range, Site, Unit, WeightSlice, is_transposed


@dataclass(frozen=True)
class _Found:
    """Observations in one kind of decoder layer, for the sites of all layers of this kind."""

    observer: LayerObserver
    sites: tuple["_FoundSite", ...]


@dataclass(frozen=True)
class _FoundSite:
    """A site of one kind of layer.

    Attributes:
        output_proj: Name of the output projection, or of the experts module.
        inputs: The projections that feed it directly or indirectly, in call order.
        level: As for `Site`.
        depths: Depth of each input projection and of the output projection, by name; for experts,
            the depth of the input projections.
    """

    output_proj: str
    inputs: tuple[str, ...]
    level: int
    depths: Mapping[str, int]


def find_sites(model: PreTrainedModel, mlp_unit_size: int | None = None) -> list[Site]:
    """Find every site of `model`, layer by layer, in order of dependence.

    Among sites that run in parallel, those that mix tokens come first.

    Args:
        model: A decoder-only model with a head: a causal language model, a classifier or a reward
            model. It is not changed, and its weights are not read.
        mlp_unit_size: Channels per unit of sites without heads (the last unit may have fewer);
            `None` makes each of these sites one unit.

    Raises:
        ValueError: `model` is not a decoder-only model with a head, or its layers cannot be
            observed.
    """
    names = decoder_layer_names(model)
    layers = {name: model.get_submodule(name) for name in names}
    _check_modules_of_their_own(model, layers)
    shared = _in_several_layers(layers)
    # Layers that share parameters may run different parts of the modules that own them.
    kinds = {
        name: (_kind_of(layer), name if any(each.startswith(f"{name}.") for each in shared) else "")
        for name, layer in layers.items()
    }
    first = {kind: name for name, kind in reversed(kinds.items())}
    try:
        with (
            evaluation_mode(model),  # no dropout, no gradient checkpointing
            torch.inference_mode(False),
            torch.enable_grad(),
            with_values(model),
        ):
            found = _observed(model, {name: layers[name] for name in first.values()})
            units = _Units(model, found, mlp_unit_size, shared)
            sites = [
                site
                for index, name in enumerate(names)
                for site in sorted(
                    units.sites(index, name, first[kinds[name]]),
                    key=lambda site: (site.level, not site.mixes_tokens),
                )
            ]
    except LayoutError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or should_reduce_batch_size(error):
            raise
        reason = " ".join(str(error).split())
        attention = implementations(model)["attention"]
        remedy = ""
        if attention not in (None, "sdpa", "eager"):
            remedy = f"; load it with attn_implementation 'sdpa' instead of {attention!r}"
        raise ValueError(
            f"{type(model).__name__} cannot be pruned by any recipe: its decoder layers do not run "
            "on random values in place of what their projections return, so what feeds what is "
            f"unknown ({type(error).__name__}: {reason}){remedy}"
        ) from error
    if not sites:
        raise ValueError(
            f"{type(model).__name__} cannot be pruned by any recipe: no linear weight of its "
            "decoder layers was seen to write to the hidden states (classes of its own that "
            "compute products can be named with optimum_cap.register_layout)"
        )
    return sites


def _observed(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> dict[str, _Found]:
    calls = recorded_layer_calls(model, layers, device_of(model))
    found = {}
    for name, layer in layers.items():
        counts = head_counts(model.config.get_text_config(decoder=True), *layer.modules())
        observer = LayerObserver(layer, calls[name], counts)
        found[name] = _Found(observer, tuple(_sites_of(observer)))
    return found


def _sites_of(observer: LayerObserver) -> Iterator[_FoundSite]:
    """Yield the sites of an observed layer, in the call order of their projections."""
    seen = observer.observed
    order = list(seen.projections)
    experts = {name for name, each in seen.projections.items() if each.experts is not None}
    counts = {each.experts.count for each in seen.projections.values() if each.experts is not None}
    routers = {name for name in seen.routing if seen.projections[name].rows in counts}
    writers = {
        name
        for name in seen.writers - experts - routers
        if seen.projections[name].rows == observer.width
    }
    found: dict[str, tuple[str, ...]] = {}  # the input projections of each site
    taken: set[str] = set()
    for name in order:
        if name not in writers | experts:
            continue
        # A projection that reaches the output of the layer without being a writer scales it: a gate
        # or a router.
        barriers = seen.writers | experts | routers
        new = _ancestors(name, seen.feeders, barriers) - taken
        taken |= new
        inputs = tuple(sorted(new, key=order.index))
        if name in experts:  # what all tokens pass before them (Nemotron-H) is a site too
            found |= dict.fromkeys(inputs, ())
            inputs = ()
        found[name] = inputs
    # Experts are two projections in sequence.
    depths = _longest_chains(seen.feeders, order, lambda name: 1 + (name in experts))
    levels = _longest_chains(seen.feeders, order, lambda name: int(name in found))
    for name, inputs in found.items():
        yield _FoundSite(name, inputs, levels[name], depths)


def _ancestors(name: str, feeders: Mapping[str, set[str]], barriers: set[str]) -> set[str]:
    """Return the direct and indirect feeders of a projection, except through `barriers`."""
    found: set[str] = set()
    new = feeders[name] - barriers
    while new:
        found |= new
        new = {other for each in new for other in feeders[each]} - barriers - found
    return found


def _longest_chains(
    feeders: Mapping[str, set[str]], order: Sequence[str], links: Callable[[str], int]
) -> dict[str, int]:
    """Return the length of the longest chain of projections that each projection depends on.

    Args:
        feeders: The projections that feed each projection.
        order: The projections.
        links: How much a projection adds to a chain.
    """
    lengths: dict[str, int] = {}

    def length(name: str) -> int:
        if name not in lengths:
            lengths[name] = 0  # for a projection that is called twice and feeds itself
            lengths[name] = max((length(each) + links(each) for each in feeders[name]), default=0)
        return lengths[name]

    return {name: length(name) for name in order}


class _Units:
    """Builds the sites of every layer from those of the observed layers.

    Args:
        model: The model.
        found: The observations, by layer name.
        mlp_unit_size: As for `find_sites`.
        shared: The first name of each parameter shared by several layers, by each of its names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        found: Mapping[str, _Found],
        mlp_unit_size: int | None,
        shared: Mapping[str, str],
    ) -> None:
        self._model = model
        self._found = found
        self._unit_size = mlp_unit_size
        self._shared = shared
        self._rows: dict[tuple[str, str], tuple[str, list[Range], dict[str, list[Rows]]]] = {}

    def sites(self, layer: int, name: str, observed: str) -> Iterator[Site]:
        """Yield the sites of layer `name`, based on layer `observed` of the same kind."""
        for site in self._found[observed].sites:
            key = observed, site.output_proj
            if key not in self._rows:
                self._rows[key] = self._units_of(observed, site)
            yield from self._made(layer, name, observed, site)

    def _units_of(
        self, observed: str, site: _FoundSite
    ) -> tuple[str, list[Range], dict[str, list[Rows]]]:
        """Return the kind of a site, the channels of its units, and its direct feeders' rows."""
        observer = self._found[observed].observer
        seen, name = observer.observed, site.output_proj
        projection = seen.projections[name]
        experts = projection.experts
        width = projection.columns if experts is None else experts.width
        layout = layout_of(self._model.config.get_text_config(decoder=True).model_type)
        known = layout.heads.get(name)
        size = observer.find_heads(name, known) if known or name in seen.mixing else None
        kind = "attention" if size else "mixer" if name in seen.mixing else "mlp"
        size = size or self._unit_size or width
        bounds = [(start, min(start + size, width)) for start in range(0, width, size)]
        if experts is not None:
            module = self._model.get_submodule(f"{observed}.{name}")
            rows = {name: rows_of_experts(module, bounds)} if len(bounds) > 1 else {}
            return "expert", bounds, rows
        if len(bounds) == 1 or not observer.sees_all_tokens(name):
            return kind, [(0, width)], {}
        return kind, bounds, observer.rows(name, bounds)

    def _made(self, layer: int, name: str, observed: str, site: _FoundSite) -> Iterator[Site]:
        kind, bounds, rows = self._rows[observed, site.output_proj]
        seen = self._found[observed].observer.observed
        layout = seen.projections[site.output_proj].experts
        path = f"{name}.{site.output_proj}"
        output_module = path if layout else f"{name}.{seen.output_modules[site.output_proj]}"
        projection = f"{path}.{OUTPUT}" if layout else path
        output = f"{projection}.weight" if layout is None else projection
        # Each layer may call a different part of shared modules, such as its own adapter.
        skipped = {each for each in seen.uncalled if f"{name}.{each}.weight" in self._shared}
        if site.output_proj in skipped:
            return
        called = [each for each in site.inputs if each not in skipped]
        inputs = {f"{name}.{each}.weight": each for each in called}
        depths = {parameter: site.depths[each] for parameter, each in inputs.items()}
        depths[output] = site.depths[site.output_proj] + (layout is not None)
        if layout:
            inputs = {f"{path}.{layout.input_proj}": site.output_proj}
            depths |= dict.fromkeys(inputs, site.depths[site.output_proj])
        aliases = {
            self._shared[each]: each
            for each in (output, *inputs)
            if self._shared.get(each, each) != each
        }
        depths = {self._shared.get(each, each): depth for each, depth in depths.items()}
        output = self._shared.get(output, output)
        dim = 1 - self._transposed(output, layout)
        # For each unit: parameter, dimension and rows of each part of its region.
        pieces: list[list[tuple[str, int, Rows]]] = [
            [(output, dim, Rows(*channels, (index,), True))]
            for index, channels in enumerate(bounds)
        ]
        for parameter, each in inputs.items():
            parameter = self._shared.get(parameter, parameter)
            dim = int(self._transposed(parameter, layout))
            whole = self._all_rows(seen.projections[each], layout, len(bounds))
            for run in rows.get(each) or [whole]:
                for unit in run.units:
                    pieces[unit].append((parameter, dim, run))
        for expert in range(layout.count) if layout else [None]:
            units = []
            for index, of_unit in enumerate(pieces):
                slices = [
                    WeightSlice(parameter, dim, run.start, run.stop, expert)
                    for parameter, dim, run in of_unit
                ]
                separable = [
                    piece for piece, (*_, run) in zip(slices, of_unit, strict=True) if run.separable
                ]
                units.append(Unit(index, bounds[index], tuple(slices), tuple(separable)))
            yield Site(
                name=projection if expert is None else f"{projection}[{expert}]",
                kind=kind,
                layer=layer,
                layer_name=name,
                block=path if layout else f"{name}.{site.output_proj}".rpartition(".")[0],
                output_module=output_module,
                width=bounds[-1][1],
                units=tuple(units),
                expert=expert,
                level=site.level,
                looks_ahead=site.output_proj in seen.looking_ahead,
                depths=depths,
                aliases=aliases,
            )

    def _all_rows(self, projection: Projection, layout: ExpertsLayout | None, units: int) -> Rows:
        """Return all rows of a projection, assigned to all units."""
        count = projection.rows if layout is None else layout.rows
        return Rows(0, count, tuple(range(units)), separable=units == 1)

    def _transposed(self, parameter: str, layout: ExpertsLayout | None) -> bool:
        return layout.transposed if layout else is_transposed(self._model, Matrix(parameter))


def _kind_of(layer: nn.Module) -> Any:
    """Return a key shared by layers that run the same code on matrices of the same shape."""
    parts = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int | float | str | None)
            and key != "training"
            and (isinstance(value, bool) or not re.search("layer|idx|index", key))
        }
        shapes = [(key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)]
        parts.append((name, type(module), tuple(sorted(plain.items())), tuple(shapes)))
    return tuple(parts)


def _check_modules_of_their_own(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> None:
    """Check that no module with parameters is in two layers, where a hook on it would see both.

    Raises:
        ValueError: A module is.
    """
    owners: dict[int, str] = {}
    for layer, module in layers.items():
        for name, inner in module.named_modules():
            path = f"{layer}.{name}".rstrip(".")
            if owners.setdefault(id(inner), path) != path and any(True for _ in inner.parameters()):
                raise ValueError(
                    f"{type(model).__name__} cannot be pruned by any recipe: {owners[id(inner)]} "
                    f"and {path} are one module; give each layer modules of its own (they may "
                    "share their parameters)"
                )


def _in_several_layers(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the first name of parameters shared by several layers (Zamba), by all their names."""
    names: dict[int, list[str]] = {}
    for layer, module in layers.items():
        for name, parameter in module.named_parameters():
            names.setdefault(id(parameter), []).append(f"{layer}.{name}")
    return {name: group[0] for group in names.values() if len(group) > 1 for name in group}


def decoder_layer_names(model: PreTrainedModel) -> list[str]:
    """Return the paths of the decoder layers of a model, in order.

    Raises:
        ValueError: `model` is not a decoder-only model with a head, or it has no such layers.
    """
    decoder_name, decoder = decoder_of(model)
    config = model.config.get_text_config(decoder=True)
    if (path := layout_of(config.model_type).layers) is not None:
        return _registered_layers(model, path)
    count = getattr(config, "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    fitting = {name: module for name, module in lists.items() if len(module) == count} or lists
    if not fitting:
        raise ValueError(
            f"{type(model).__name__} cannot be pruned: its decoder has no list of layers (name "
            "one with optimum_cap.register_layout if there is one elsewhere)"
        )
    name = max(fitting, key=lambda each: sum(p.numel() for p in fitting[each].parameters()))
    path = ".".join(filter(None, (decoder_name, name)))
    return [f"{path}.{index}" for index in range(len(fitting[name]))]


def _registered_layers(model: PreTrainedModel, path: str) -> list[str]:
    try:
        layers = model.get_submodule(path)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(
            f"register_layout names {path!r} as the list of decoder layers, but "
            f"{type(model).__name__} has no list of modules of that name"
        )
    return [f"{path}.{index}" for index in range(len(layers))]


def activation_bytes_per_token(model: PreTrainedModel, longest: int) -> int:
    """Return the number of bytes per token while a decoder layer runs in float32.

    Args:
        model: The model.
        longest: Number of tokens of the longest sequence.
    """
    config = model.config.get_text_config(decoder=True)
    # Unfused attention keeps its probabilities and a float32 copy of them.
    attention = 8 * (getattr(config, "num_attention_heads", None) or 0) * longest
    widths = 7 * config.hidden_size + layer_input_width(model) + 4 * mlp_width(model)
    return int(4 * widths + attention)


def layer_input_width(model: PreTrainedModel) -> int:
    """Return the number of values a decoder layer receives per token.

    Gemma 3n and DeepSeek V4 have several hidden states per token, and Gemma 3n and 4 have per-layer
    inputs.
    """
    config = model.config.get_text_config(decoder=True)
    hidden_states = getattr(config, "altup_num_inputs", None) or getattr(config, "hc_mult", 1)
    per_layer = getattr(config, "hidden_size_per_layer_input", None) or 0
    return int(hidden_states * config.hidden_size + per_layer)


def mlp_width(model: PreTrainedModel) -> int:
    """Return the number of channels of an MLP, or the largest one if layers differ."""
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    width = max(width) if isinstance(width, Sequence) else width
    return int(width * (2 if getattr(config, "use_double_wide_mlp", False) else 1))


def decoder_of(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Return the path of the decoder in `model`, and the decoder.

    Raises:
        ValueError: `model` is not decoder-only, or it has no head.
    """
    kind = type(model).__name__
    if model.config.is_encoder_decoder or not (has_lm_head(model) or _is_decoder(model.config)):
        raise ValueError(
            f"{kind} is not a decoder-only causal language model, nor a classifier made of one, so "
            "CAP cannot prune it: choose a decoder-only model, such as Llama or Qwen"
        )
    if not has_lm_head(model) and model.base_model is model:
        raise ValueError(
            f"{kind} has no head, so CAP cannot prune it: load the model with "
            "AutoModelForCausalLM, one that sees images with AutoModelForImageTextToText, or a "
            "classifier with AutoModelForSequenceClassification"
        )
    decoder = model.get_decoder()
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        decoder = model.base_model  # ModernBERT's decoder calls its output head "decoder"
    name = next(name for name, module in model.named_modules() if module is decoder)
    return name, decoder


def _is_decoder(config: PretrainedConfig) -> bool:
    """Return whether a config is for a decoder only; `True` if its code is not in transformers."""
    if not type(config).__module__.startswith("transformers."):
        return True
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not is_encoder
