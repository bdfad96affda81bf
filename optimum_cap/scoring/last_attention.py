"""The attention of the last layer, computed only from the first scored position on.

Earlier tokens matter only through their keys and values. For these tokens, the layer runs until its
attention has computed keys and values, without queries. For the remaining tokens, it runs as in
generation with a cache, with the arguments that the model passes to its last layer in that case,
recorded while all layers are skipped. The intact pass is used to check that this gives the same
output.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from optimum_cap.models import (
    Site,
    StopForwardError,
    bypass_layers,
    cache_argument,
    device_of,
    hidden_states_of,
    recorded_calls,
    replaced_forward,
    run_until,
    tolerance,
    zero_embeddings,
)
from optimum_cap.runtime import is_out_of_memory
from optimum_cap.scoring.prefix import (
    WORTHWHILE_SHARE,
    Segment,
    Streams,
    append_tokens,
    repeat_rows,
)

logger = logging.get_logger(__name__)

_QUERIES = "q_proj"  # name of the query projection, where it is separate


class _Keys(DynamicCache):
    """Keys and values of leading tokens; each of their rows may branch into several rows.

    Attributes:
        collecting: Whether a forward pass ends as soon as the keys and values of its tokens are
            stored.
        parts: Keys and values that each such pass stored, `[rows, heads, tokens, channels]`.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.collecting = True
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.collecting:
            self.parts.append((key_states, value_states))
            raise StopForwardError
        # As many as transformers' sliding-window cache keeps.
        window = getattr(self.layers[layer_idx], "sliding_window", None)
        count = None if window is None else window - 1
        keys = _last_tokens([key for key, _ in self.parts], count)
        values = _last_tokens([value for _, value in self.parts], count)
        return append_tokens(keys, key_states), append_tokens(values, value_states)


def _last_tokens(parts: Sequence[torch.Tensor], count: int | None) -> list[torch.Tensor]:
    """Return the last `count` tokens of consecutive `[..., tokens, channels]`, all if `None`."""
    if count is None:
        return list(parts)
    last: list[torch.Tensor] = []
    for part in reversed(parts):
        last.insert(0, part[..., max(0, part.shape[-2] - count) :, :])
        count -= last[0].shape[-2]
    return last


@dataclass(frozen=True)
class LastAttention:
    """Computes the output of the last layer's attention for masked streams.

    Attributes:
        model: The model.
        layer: Its last decoder layer.
        site: The attention site of this layer.
        leading: Segments for which only keys and values are needed.
        tail: The segment after them.
        start: Position at which the tail starts in the last segment of the intact pass.
    """

    model: PreTrainedModel
    layer: nn.Module
    site: Site
    leading: tuple[Segment, ...]
    tail: Segment
    start: int = 0

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        layers: list[nn.Module],
        site: Site,
        segments: list[Segment],
        input_ids: torch.Tensor,
        first: int,
    ) -> "LastAttention":
        """Cut the last segment at the first scored position, if that saves time and is exact.

        Args:
            model: The model.
            layers: Its decoder layers.
            site: The attention site of the last layer.
            segments: The intact pass.
            input_ids: Tokens of its last segment, int64 `[rows, tokens]`.
            first: The first scored position among these tokens.
        """
        *leading, suffix = segments
        whole = cls(model, layers[-1], site, tuple(leading), suffix)
        if first < WORTHWHILE_SHARE * input_ids.shape[1]:
            return whole
        try:
            cut = whole._cut(layers, segments, input_ids, first)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # A model may handle caches differently or not support continuing after tokens.
            logger.debug(
                f"the last attention of {type(model).__name__} runs on all tokens: {error!r}"
            )
            return whole
        return cut or whole

    def _cut(
        self,
        layers: list[nn.Module],
        segments: list[Segment],
        input_ids: torch.Tensor,
        first: int,
    ) -> "LastAttention | None":
        """Return the cut attention, or `None` if its output differs on the intact pass."""
        calls = [segment.calls[self._name] for segment in segments]
        # Two streams, because the arguments must fit any number of streams.
        copies = 1 if any(call.shared is not None for call in calls) else 2
        intact_inputs = [
            Streams(repeat_rows(call.hidden, copies), copy.copy(call.shared)) for call in calls
        ]
        before = sum(call.hidden.shape[-2] for call in calls[:-1])
        parts = (input_ids[:, :first], before), (input_ids[:, first:], before + first)
        output_template = self.tail.calls[self._name].output
        lead, tail = (
            _last_layer_call(self.model, layers, self._name, output_template, *part)
            for part in parts
        )
        leading = () if self._reads_shared_keys() else (*self.leading, lead)
        cut = replace(self, leading=leading, tail=tail, start=first)
        keys = cut._keys(intact_inputs)
        if len(keys.parts) < len(cut.leading):
            return None  # the attention does not use the cache
        expected = hidden_states_of(self.tail.calls[f"attention {self.site.layer}"].output)[
            :, first:
        ]
        expected = repeat_rows(expected, copies)
        change = (cut._after(keys, intact_inputs[-1]) - expected).float().norm()
        return cut if change <= tolerance(expected.dtype) * expected.float().norm() else None

    def _reads_shared_keys(self) -> bool:
        """Whether the layer seems to read the keys and values of an earlier one.

        If it does, keys and values of leading tokens need not be computed.
        """
        before = self.tail.calls.get(f"layer {self.site.layer - 1}")
        shared = self.tail.calls[self._name].shared
        if before is None or before.shared is None or not shared:
            return False
        return all(before.shared.get(key) is values for key, values in shared.items())

    @property
    def _name(self) -> str:
        """Name of the layer's calls in the segments."""
        return f"layer {self.site.layer}"

    def outputs(self, streams: list[Streams]) -> torch.Tensor:
        """Return the output of the attention from position `start` on.

        Args:
            streams: Input of the layer for each segment of the intact pass.

        Returns:
            `[streams * rows, tokens, hidden]`.
        """
        return self._after(self._keys(streams), streams[-1])

    def _after(self, keys: _Keys, streams: Streams) -> torch.Tensor:
        """Return the output for the tail of the last segment, after tokens with these keys."""
        tail = replace(streams, hidden=streams.hidden[..., self.start :, :])
        args, kwargs = self._arguments(self.tail, tail, keys)
        block = self.model.get_submodule(self.site.output_module)
        return hidden_states_of(run_until(block, self.layer, tail.hidden, *args, **kwargs))

    def _keys(self, streams: list[Streams]) -> _Keys:
        """Compute the keys and values of the leading tokens."""
        keys = _Keys(self.model.config)
        if not self.leading:
            return keys
        parts = streams[:-1]
        if self.start:
            hidden = streams[-1].hidden[..., : self.start, :]
            parts = [*parts, replace(streams[-1], hidden=hidden)]
        with self._no_queries():
            for segment, part in zip(self.leading, parts, strict=True):
                args, kwargs = self._arguments(segment, part, keys)
                with suppress(StopForwardError):
                    self.layer(part.hidden, *args, **kwargs)
        keys.collecting = False
        return keys

    def _arguments(
        self, segment: Segment, streams: Streams, keys: _Keys
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return segment.arguments(self._name, streams.rows, keys, streams.shared)

    @contextmanager
    def _no_queries(self) -> Iterator[None]:
        """Make the query projection return zeros, if queries have a separate projection."""
        projection = getattr(self.model.get_submodule(self.site.block), _QUERIES, None)
        if not isinstance(projection, nn.Linear):
            yield
            return
        width = projection.out_features
        with replaced_forward(projection, lambda x: x.new_zeros(*x.shape[:-1], width)):
            yield


def _last_layer_call(
    model: PreTrainedModel,
    layers: list[nn.Module],
    name: str,
    output_template: Any,
    input_ids: torch.Tensor,
    before: int,
) -> Segment:
    """Record how the model calls its last layer for tokens that follow others, running no layer.

    Args:
        model: The model.
        layers: Its decoder layers.
        name: Name of the recorded call.
        output_template: An output of a layer, which shows how hidden states are returned.
        input_ids: The tokens, int64 `[rows, tokens]`.
        before: Number of tokens before them in each row.
    """
    cache = DynamicCache(config=model.config)
    if before:
        for layer in cache.layers:  # only the number of tokens matters
            placeholder = torch.empty(len(input_ids), 1, before, 1, device=device_of(model))
            # A layer that reads the keys and values of others cannot store any.
            with suppress(NotImplementedError):
                layer.update(placeholder, placeholder)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise StopForwardError

    with (
        zero_embeddings(model, hidden_states_of(output_template).dtype),
        bypass_layers(layers[:-1], output_template),
        recorded_calls({name: layers[-1]}) as calls,
        replaced_forward(layers[-1], stop),
        suppress(StopForwardError),
    ):
        ids = input_ids.to(device_of(model))
        model(input_ids=ids, use_cache=True, **cache_argument(model, cache))
    return Segment(len(input_ids), calls)
