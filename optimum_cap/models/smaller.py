"""Smaller models: ordinary models that remain after removing parts of a model.

A part is an expert with its rows of the router, a channel of an MLP or of experts, a key/value head
with its query heads, or a decoder layer. A transformers config has one number for all layers, so
every layer loses the same number of experts, channels or heads.

Nothing here depends on the names of an architecture. Configs with other numbers are tried on models
without weights until the shapes are as expected, and the rows and columns of a part were observed
in the layers. A tensor that shrinks in any other way is refused.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from optimum_cap.models.architectures import decoder_layer_names
from optimum_cap.models.internals import replace_content
from optimum_cap.models.sites import Site

_EXPERTS = re.compile(r"experts")
_OTHER_EXPERTS = re.compile(r"per_tok|shared|top_?k|zero|freq|every")
_CHANNELS = re.compile(r"intermediate|ffn|inner|mlp|hidden_dim")
_QUERY_HEADS = re.compile(r"^(num_attention_heads|n_heads?|num_heads)$")
_KEY_VALUE_HEADS = re.compile(
    r"^(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num)$"
)
_FIELDS_TOGETHER = 2  # most config fields that may hold the same number

Shapes = dict[str, torch.Size]


class CannotRemoveError(ValueError):
    """These parts cannot be removed from a model; the message says why and what to do."""

    @property
    def reason(self) -> str:
        """The message without the advice after the last colon."""
        return str(self).rpartition(": ")[0]


@dataclass(frozen=True)
class KeptParts:
    """The kept parts of a model. Everything that is not mentioned is kept.

    Attributes:
        layers: Indices of the kept decoder layers, in order; `None` for all.
        experts: Indices of the kept experts, in order, by path of the experts module.
        channels: Mask of kept inputs of a site's output projection, bool `[width]`; for attention,
            whole heads.
    """

    layers: Sequence[int] | None = None
    experts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    channels: Mapping[Site, torch.Tensor] = field(default_factory=dict)


def smaller_config(model: PreTrainedModel, sites: list[Site], kept: KeptParts) -> PretrainedConfig:
    """Return a config for the kept parts of a model.

    Args:
        model: The model; its weights are not read.
        sites: All of its sites.
        kept: The kept parts.

    Raises:
        CannotRemoveError: No config describes the kept parts.
    """
    expected = _expected_shapes(model, sites, kept)
    name_before = names_before(model, kept.layers)
    for numbers in _candidates(model, sites, kept):
        try:
            config = _with_numbers(model.config, numbers)
            if kept.layers is not None:
                _keep_layers(config.get_text_config(decoder=True), kept.layers)
            shapes = _shapes(model, config)
        except Exception:  # a field means something else, or the numbers are inconsistent
            continue
        if kept.layers is not None and _layers_among(model, shapes) != len(kept.layers):
            continue  # this config has a different field for their number
        renamed = {name: name_before(name) for name in shapes}
        if {renamed[n]: shapes[n] for n in shapes if renamed[n] in expected} == expected:
            return config
    raise CannotRemoveError(
        f"no config of {type(model).__name__} describes the model with these parts removed, so "
        "they cannot be removed: choose another pattern"
    )


def _expected_shapes(model: PreTrainedModel, sites: list[Site], kept: KeptParts) -> Shapes:
    """Return the expected shapes of the output projections of all sites."""
    layers = set(range(len(decoder_layer_names(model))) if kept.layers is None else kept.layers)
    expected = {}
    for site in sites:
        if site.layer not in layers:
            continue
        name = site.output_proj.parameter
        shape = list(model.get_parameter(name).shape)
        if site.block in kept.experts and site.expert is not None:
            shape[0] = len(kept.experts[site.block])
        if (mask := kept.channels.get(site)) is not None:
            inputs = site.units[0].region[0].dim  # of the matrix, without the expert dimension
            shape[inputs + len(shape) - 2] = int(mask.sum())
        expected[name] = torch.Size(shape)
    return expected


def _candidates(
    model: PreTrainedModel, sites: list[Site], kept: KeptParts
) -> Iterator[dict[str, Any]]:
    """Yield values for fields of the text config that may describe the kept parts."""
    fields = model.config.get_text_config(decoder=True).to_dict()
    if kept.experts:
        block, experts = next(iter(kept.experts.items()))
        before = sum(site.block == block for site in sites)
        names = [
            name
            for name, value in fields.items()
            if _is_number(value, before)
            and _EXPERTS.search(name)
            and not _OTHER_EXPERTS.search(name)
        ]
        yield dict.fromkeys(names, len(experts))
        yield from ({name: len(experts)} for name in names)
    elif kept.channels:
        site, mask = next(iter(kept.channels.items()))
        if site.kind == "attention":
            yield from _numbers_of_heads(fields, site, mask)
            return
        names = [
            name
            for name, value in fields.items()
            if _CHANNELS.search(name)
            and (value is None or _is_number(value, site.width) or _all_are(value, site.width))
        ]
        after = int(mask.sum())
        for count in range(1, _FIELDS_TOGETHER + 1):
            for chosen in combinations(names, count):
                yield {
                    name: [after] * len(fields[name]) if isinstance(fields[name], list) else after
                    for name in chosen
                }
    else:
        yield {}


def _numbers_of_heads(
    fields: Mapping[str, Any], site: Site, mask: torch.Tensor
) -> Iterator[dict[str, Any]]:
    before, size = len(site.units), site.units[0].channels[1]
    after = int(mask.sum()) // size
    queries = [n for n, v in fields.items() if _QUERY_HEADS.match(n) and _is_number(v, before)]
    groups = {n: v for n, v in fields.items() if _KEY_VALUE_HEADS.match(n) and v is not None}
    numbers: dict[str, Any] = dict.fromkeys(queries, after)
    for name, count in groups.items():
        if count > 1:
            numbers[name] = count * after // before
    # Otherwise the head size would be the hidden size divided by the number of heads.
    with_size = {**numbers, "head_dim": size}
    yield from (with_size, numbers) if fields.get("head_dim") is None else (numbers,)


def _is_number(value: Any, number: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == number


def _all_are(value: Any, number: int) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(v, number) for v in value)


def _with_numbers(config: PretrainedConfig, numbers: Mapping[str, Any]) -> PretrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    for name, value in numbers.items():
        setattr(text, name, value)
    return config


def _keep_layers(config: PretrainedConfig, layers: Sequence[int]) -> None:
    """Change the per-layer fields of a text config."""
    count = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if name.endswith(("token_id", "token_ids")):
            continue
        if isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[layer] for layer in layers])
        elif name == "mlp_only_layers" and value:
            setattr(config, name, [new for new, old in enumerate(layers) if old in value])
        elif (name == "first_k_dense_replace" and value) or (
            name == "max_window_layers" and value is not None
        ):
            setattr(config, name, sum(old < value for old in layers))
    config.num_hidden_layers = len(layers)


def kinds_of_layers(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """Return the kind of each decoder layer, from the per-layer strings in the config."""
    config = model.config.get_text_config(decoder=True)
    count = config.num_hidden_layers
    lists = [
        value
        for value in config.to_dict().values()
        if isinstance(value, list)
        and len(value) == count
        and all(isinstance(each, str) for each in value)
    ]
    return list(zip(*lists, strict=True)) if lists else [()] * count


def empty_model(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Return a model of the same class with another config, on the meta device."""
    with torch.device("meta"):
        smaller: PreTrainedModel = type(model)(config)
    return smaller.eval()


def _shapes(model: PreTrainedModel, config: PretrainedConfig) -> Shapes:
    """Return the shapes of all tensors of a model with this config."""
    return {name: each.shape for name, each in empty_model(model, config).state_dict().items()}


def _layers_among(model: PreTrainedModel, names: Iterable[str]) -> int:
    """Return the number of decoder layers that tensors with these names belong to."""
    prefix = decoder_layer_names(model)[0].removesuffix("0")
    layers = {
        name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)
    }
    return len(layers)


def names_before(model: PreTrainedModel, layers: Sequence[int] | None) -> Callable[[str], str]:
    """Return a function from tensor names of the smaller model to those in `model`.

    Args:
        model: The model.
        layers: Indices of the layers in the smaller model, in order; `None` for all.
    """
    prefix = decoder_layer_names(model)[0].removesuffix("0")

    def name_before(name: str) -> str:
        if layers is None or not name.startswith(prefix):
            return name
        index, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{layers[int(index)]}.{rest}"

    return name_before


def smaller_model(
    model: PreTrainedModel, sites: list[Site], kept: KeptParts, config: PretrainedConfig
) -> PreTrainedModel:
    """Return a model of the kept parts of `model`, with copies of the kept weights.

    Args:
        model: The model, in memory; it is not changed.
        sites: All of its sites; units of MLPs have at most half of the channels.
        kept: The kept parts.
        config: From `smaller_config`.

    Raises:
        CannotRemoveError: It is unknown which rows or columns of a tensor belong to the kept parts.
    """
    empty = empty_model(model, config)
    old = model.state_dict(keep_vars=True)
    select = _Selection(model, sites, kept)
    name_before = names_before(model, kept.layers)
    tensors = {}
    for name, target in empty.state_dict().items():
        source = name_before(name)
        if source not in old:
            raise CannotRemoveError(
                f"{type(model).__name__} with parts removed would have {name}, which it has not "
                "now: choose another pattern"
            )
        tensors[name] = select(source, old[source].detach(), target.shape)
    _check_all_used(model, old, set(map(name_before, tensors)), kept)
    empty.load_state_dict(tensors, assign=True)
    empty.tie_weights()
    buffers = dict(model.named_buffers())
    for path, module in list(empty.named_modules()):
        for name, buffer in list(module.named_buffers(recurse=False)):
            full = ".".join(filter(None, (path, name)))
            if full in tensors:
                continue
            source = name_before(full)
            if source not in buffers or buffers[source].shape != buffer.shape:
                raise CannotRemoveError(
                    f"{type(model).__name__} computes {full} from its config, and it would change: "
                    "choose another pattern"
                )
            module.register_buffer(name, buffers[source].clone(), persistent=False)
    for name, parameter in empty.named_parameters():
        source = name_before(name)
        parameter.requires_grad_(old[source].requires_grad)
    return empty


def _check_all_used(
    model: PreTrainedModel, old: Iterable[str], used: set[str], kept: KeptParts
) -> None:
    """Check that the smaller model has every tensor, except those of removed layers.

    Raises:
        CannotRemoveError: It lacks one, because a layer has it only in its old position.
    """
    names = decoder_layer_names(model)
    removed = set(range(len(names))).difference(
        range(len(names)) if kept.layers is None else kept.layers
    )
    prefixes = tuple(f"{names[layer]}." for layer in removed)
    unused = [name for name in old if name not in used and not name.startswith(prefixes)]
    if unused:
        raise CannotRemoveError(
            f"{type(model).__name__} with parts removed would lack {unused[0]}, which is not part "
            "of them: choose another pattern"
        )


class _Selection:
    """Selects the kept part of each tensor.

    Args:
        model: The model.
        sites: Its sites.
        kept: The kept parts.
    """

    def __init__(self, model: PreTrainedModel, sites: list[Site], kept: KeptParts) -> None:
        self._model = model
        self._experts = kept.experts
        # For each parameter and expert: the dimension, and the kept rows or columns.
        self._rows: dict[str, dict[int | None, tuple[int, torch.Tensor]]] = {}
        self._heads: dict[str, torch.Tensor] = {}  # of each query head, by layer
        for site, mask in kept.channels.items():
            self._add(site, mask)

    def _add(self, site: Site, mask: torch.Tensor) -> None:
        if site.kind == "attention":
            heads = [bool(mask[start]) for start, _ in (unit.channels for unit in site.units)]
            self._heads[site.layer_name] = torch.tensor(heads)
        for unit in site.units:
            start, stop = unit.channels
            channels = mask[start:stop]
            for piece in unit.region:
                parameter = self._model.get_parameter(piece.parameter)
                matrix = parameter if piece.expert is None else parameter[piece.expert]
                size = matrix.shape[piece.dim]
                entry = self._rows.setdefault(piece.parameter, {})
                _, rows = entry.setdefault(
                    piece.expert, (piece.dim, torch.zeros(size, dtype=torch.bool))
                )
                count = piece.stop - piece.start
                if channels.all() or not channels.any():
                    of_piece = channels[:1].expand(count)
                elif count % len(channels) == 0:  # the same number of rows for each channel
                    of_piece = channels.repeat_interleave(count // len(channels))
                else:
                    raise CannotRemoveError(
                        f"{piece.parameter} has {count} rows for {len(channels)} channels, so it "
                        "is unknown which belong to which: choose another pattern"
                    )
                rows[piece.start : piece.stop] |= of_piece

    def __call__(self, name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return a copy of the kept part of a tensor.

        Args:
            name: Its name.
            tensor: The tensor.
            shape: The shape of the kept part.
        """
        if tensor.shape == shape:
            return tensor.clone()
        for block, experts in self._experts.items():
            if _is_part_of(name, block) and tensor.shape[1:] == shape[1:]:
                index = torch.tensor(experts, device=tensor.device)
                if len(index) == shape[0]:
                    return tensor.index_select(0, index)
        rows = self._rows.get(name)
        if rows is not None and None in rows:
            return self._selected(name, tensor, *rows[None], shape)
        if rows is not None:
            return self._of_experts(name, tensor, rows, shape)
        weight, _, attribute = name.rpartition(".")
        rows = self._rows.get(f"{weight}.weight")
        if attribute == "bias" and rows is not None and None in rows:
            return self._selected(name, tensor, 0, rows[None][1], shape)
        if attribute.endswith("_bias") and (rows := self._rows.get(name.removesuffix("_bias"))):
            biases = {expert: (0, kept) for expert, (_, kept) in rows.items()}
            return self._of_experts(name, tensor, biases, shape)
        for layer, heads in self._heads.items():
            if name.startswith(f"{layer}.") and tensor.shape[0] == len(heads):
                return self._selected(name, tensor, 0, heads, shape)
        raise self._unknown(name, tensor.shape, shape)

    def _of_experts(
        self,
        name: str,
        tensor: torch.Tensor,
        rows: Mapping[int | None, tuple[int, torch.Tensor]],
        shape: torch.Size,
    ) -> torch.Tensor:
        """Return the kept part of a tensor of all experts, by each expert's rows or columns."""
        selected = [
            self._selected(name, of_expert, *rows[expert], shape[1:])
            for expert, of_expert in enumerate(tensor)
        ]
        return torch.stack(selected)

    def _selected(
        self, name: str, tensor: torch.Tensor, dim: int, rows: torch.Tensor, shape: torch.Size
    ) -> torch.Tensor:
        if len(rows) != tensor.shape[dim]:
            raise self._unknown(name, tensor.shape, shape)
        selected = tensor.index_select(dim, rows.nonzero()[:, 0].to(tensor.device))
        if selected.shape != shape:
            raise self._unknown(name, tensor.shape, shape)
        return selected

    def _unknown(self, name: str, before: torch.Size, after: torch.Size) -> CannotRemoveError:
        return CannotRemoveError(
            f"{name} of {type(self._model).__name__} would change from shape {tuple(before)} to "
            f"{tuple(after)}, and it is unknown what of it belongs to the removed parts: choose "
            "another pattern"
        )


def _is_part_of(name: str, block: str) -> bool:
    """Whether a tensor is in an experts module or next to it, where the router is."""
    return name.startswith(f"{block.rpartition('.')[0]}.")


def replace_by_smaller(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    """Turn `model` into the smaller one in place; modules referenced elsewhere do not change."""
    replace_content(model, smaller, keep=("generation_config", "name_or_path"))
    model.train(model.training)
