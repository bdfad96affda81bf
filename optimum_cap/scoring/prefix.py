"""Segments of the intact pass: consecutive tokens that attend to keys and values of earlier ones.

The recorded arguments of a layer are used to call it again with different hidden states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from optimum_cap.models import (
    RecordedCall,
    SharedStates,
    cache_argument,
    device_of,
    recorded_calls,
    with_shared_states,
    without_logits,
)

WORTHWHILE_SHARE = 1 / 8
"""Smallest share of the tokens that is worth a separate segment.

Masks and copies of keys also take time: with a prefix of 1/16 of the tokens, a run was slower.
"""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a batch: the shared prefix, the tokens after it, or a part of these.

    Attributes:
        rows: Number of rows; a prefix has one.
        calls: The recorded calls of modules, by name.
    """

    rows: int
    calls: dict[str, RecordedCall]

    def arguments(
        self, layer: str, rows: int, cache: Cache | None, shared: SharedStates | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the recorded arguments of a layer after its input, for a different number of rows.

        Args:
            layer: Name of the call.
            rows: Number of rows.
            cache: The cache to use instead of the recorded one.
            shared: Keys and values that layers share, instead of the recorded ones.
        """
        call, times = self.calls[layer], rows // self.rows
        args = tuple(_expand(value, self.rows, times, cache) for value in call.args)
        kwargs = {
            name: _expand(value, self.rows, times, cache) for name, value in call.kwargs.items()
        }
        return with_shared_states(args, kwargs, shared)


@dataclass
class Streams:
    """Masked streams of a segment between two layers.

    Attributes:
        hidden: Their hidden states, `[..., streams * rows, tokens, hidden]`.
        shared: Keys and values that earlier layers share with later ones, for the same rows; `None`
            if the layers of the model share none.
    """

    hidden: torch.Tensor
    shared: SharedStates | None

    @property
    def rows(self) -> int:
        """Number of rows: streams times rows of the segment."""
        return self.hidden.shape[-3]

    def share_intact(self, intact: SharedStates | None, count: int) -> None:
        """Add the rows of `count` new streams, whose keys and values are intact so far.

        Args:
            intact: Keys and values of the intact pass up to here.
            count: Number of streams to add after those with known keys and values.
        """
        if self.shared is None or intact is None:
            return
        for key, values in intact.items():
            new = [value.repeat(count, 1, 1, 1) for value in values]
            if key in self.shared:
                pairs = zip(self.shared[key], new, strict=True)
                new = [torch.cat([value, rows.to(value.device)]) for value, rows in pairs]
            self.shared[key] = tuple(new)


def repeat_rows(hidden: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat the rows of `[..., rows, tokens, hidden]`."""
    return hidden.repeat(*[1] * (hidden.ndim - 3), times, 1, 1)


def _expand(value: Any, batch: int, times: int, cache: Cache | None) -> Any:
    """Repeat an argument recorded for `batch` rows along the batch dimension; replace the cache.

    A tensor has a batch dimension if it has at least two dimensions and `batch` rows: transformers
    passes no other tensors of two or more dimensions to layers. A single row broadcasts.
    """
    if isinstance(value, tuple):
        return tuple(_expand(entry, batch, times, cache) for entry in value)
    if isinstance(value, Cache):
        return cache
    if isinstance(value, torch.Tensor) and value.ndim >= 2 and len(value) == batch > 1:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value


def record(
    model: PreTrainedModel,
    modules: dict[str, nn.Module],
    input_ids: torch.Tensor,
    cache: Cache | None = None,
) -> Segment:
    """Run the model over tokens `[rows, tokens]` and record the calls of `modules` by name."""
    cache_kwargs = {} if cache is None else cache_argument(model, cache)
    with without_logits(model), recorded_calls(modules) as calls:
        model(input_ids=input_ids.to(device_of(model)), use_cache=cache is not None, **cache_kwargs)
    return Segment(len(input_ids), calls)


class PrefixCache(DynamicCache):
    """Keys and values of a prefix, stored in the first call of each layer.

    Later calls are for rows that continue the prefix, one or more for each of its rows. They get
    the prefix's keys and values followed by their own, which are not stored.

    Args:
        config: The config of the model.
        layer: The only layer that uses this cache, which avoids a look-up by layer index, so that
            compiled layers share one program. `None` allows all layers.
    """

    def __init__(self, config: PreTrainedConfig, layer: int | None = None) -> None:
        super().__init__(config=config)
        # Layers that read the keys and values of others have no entry of their own in the cache.
        has_place = layer is not None and layer < len(self.layers)
        self._only_layer = self.layers[layer] if has_place else None

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[layer_idx] if self._only_layer is None else self._only_layer
        if not layer.is_initialized:
            return layer.update(key_states, value_states, *args, **kwargs)
        return append_tokens([layer.keys], key_states), append_tokens([layer.values], value_states)


def append_tokens(parts: Sequence[torch.Tensor], new: torch.Tensor) -> torch.Tensor:
    """Append the rows of `new` to the rows of `parts` that they branch from, in a single copy.

    Args:
        parts: Keys or values of consecutive tokens, `[rows, heads, tokens, channels]`. Each row of
            the first part continues in one or more rows of the parts after it.
        new: Keys or values of the last tokens.
    """
    rows = len(parts[0]) if parts else len(new)
    new = new.unflatten(0, (rows, -1))
    before = [part.unflatten(0, (rows, -1)) for part in parts]
    each = [part.expand(-1, new.shape[1], *part.shape[2:]) for part in before]
    return torch.cat([*each, new], dim=-2).flatten(0, 1)
