"""The intact pass over consecutive tokens, which read the keys and values of those before them.

A layer is called again, with other hidden states, by the arguments that the model called it with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from optimum_cap.models import (
    RecordedCall,
    cache_argument,
    device_of,
    only_last_logits,
    recorded_calls,
)

WORTHWHILE_SHARE = 1 / 8
"""Least share of the tokens that are worth a segment of their own.

Masks and copies of keys cost too: a prefix of 1/16 of the tokens lost time in a trial.
"""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a batch: a shared prefix, or all that follows, or a part of it.

    Attributes:
        rows: Number of rows, one for a prefix.
        calls: What modules got and returned, by the names that they were recorded under.
    """

    rows: int
    calls: dict[str, RecordedCall]

    def arguments(
        self, layer: str, rows: int, cache: Cache | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The recorded arguments of a layer beside its input, for a number of rows and a cache."""
        call, times = self.calls[layer], rows // self.rows
        args = tuple(_expanded(value, self.rows, times, cache) for value in call.args)
        return args, {
            name: _expanded(value, self.rows, times, cache) for name, value in call.kwargs.items()
        }


def _expanded(value: Any, batch: int, times: int, cache: Cache | None) -> Any:
    """Repeat along the batch dimension what was recorded for `batch` rows; exchange the cache.

    A tensor belongs to the batch if it has at least two dimensions and `batch` rows; one row
    broadcasts by itself, and transformers passes layers no other tensor of two or more dimensions.
    """
    if isinstance(value, tuple):
        return tuple(_expanded(entry, batch, times, cache) for entry in value)
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
    """Run the model over tokens `[rows, tokens]` and record the calls of `modules`, by name."""
    cached = {} if cache is None else cache_argument(model, cache)
    with recorded_calls(modules) as calls:
        model(
            input_ids=input_ids.to(device_of(model)),
            use_cache=cache is not None,
            **cached,
            **only_last_logits(model),
        )
    return Segment(len(input_ids), calls)


class PrefixCache(DynamicCache):
    """Keys and values of a prefix, kept from the first call of each layer.

    Later calls bring the rows that follow it, some for each row of the prefix. They get its keys
    and values before their own, which are not kept.

    Args:
        config: Of the model.
        layer: The only layer that will ask: then no index of a layer is looked up, and compiled
            layers can be one program. `None`: all may ask.
    """

    def __init__(self, config: PreTrainedConfig, layer: int | None = None) -> None:
        super().__init__(config=config)
        self._only = None if layer is None else self.layers[layer]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[layer_idx] if self._only is None else self._only
        if not layer.is_initialized:
            return layer.update(key_states, value_states, *args, **kwargs)
        return continued([layer.keys], key_states), continued([layer.values], value_states)


def continued(parts: Sequence[torch.Tensor], new: torch.Tensor) -> torch.Tensor:
    """The rows of `new` behind those of `parts` that they block from, copied only once.

    Args:
        parts: Keys or values of tokens one after the other, `[rows, heads, tokens, channels]`; of
            the first one each row has one row or more in those that follow.
        new: Those of the last tokens.
    """
    rows = len(parts[0]) if parts else len(new)
    new = new.unflatten(0, (rows, -1))
    before = [part.unflatten(0, (rows, -1)) for part in parts]
    each = [part.expand(-1, new.shape[1], *part.shape[2:]) for part in before]
    return torch.cat([*each, new], dim=-2).flatten(0, 1)


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference far above what rounding makes: 2e-5 in float32, 4 % in bfloat16."""
    return float(torch.finfo(dtype).eps ** (2 / 3))
