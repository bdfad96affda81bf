"""The attention of the last layer, whose output matters only from the first scored position on.

The tokens before are there for their keys and values: for them the attention runs until these are
known, and without queries. Then it runs for the others, as the model itself goes on after tokens
that it has seen: how it calls the layer then is recorded, with all layers skipped. A trial with the
intact pass tells whether that gives the same output.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from optimum_cap.models import (
    QUERIES,
    Site,
    StopForwardError,
    bypass_layers,
    cache_argument,
    device_of,
    hidden_states_of,
    recorded_calls,
    replaced_forward,
    run_until,
    zero_embeddings,
)
from optimum_cap.runtime import is_out_of_memory
from optimum_cap.scoring.prefix import WORTHWHILE_SHARE, Segment, continued, tolerance

logger = logging.get_logger(__name__)


class _Keys(DynamicCache):
    """Keys and values of the tokens so far, of which one row may block into several.

    Attributes:
        suffice: End the forward pass as soon as those of its tokens are here.
        parts: What was kept of each such pass: keys and values, `[rows, heads, tokens, channels]`.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.suffice = True
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.suffice:
            self.parts.append((key_states, value_states))
            raise StopForwardError
        # As many as a cache of transformers keeps.
        window = getattr(self.layers[layer_idx], "sliding_window", None)
        count = None if window is None else window - 1
        keys = _last_tokens([key for key, _ in self.parts], count)
        values = _last_tokens([value for _, value in self.parts], count)
        return continued(keys, key_states), continued(values, value_states)


def _last_tokens(parts: Sequence[torch.Tensor], count: int | None) -> list[torch.Tensor]:
    """The last tokens of `[..., tokens, channels]` one after the other; `None`: all of them."""
    if count is None:
        return list(parts)
    kept: list[torch.Tensor] = []
    for part in reversed(parts):
        kept.insert(0, part[..., max(0, part.shape[-2] - count) :, :])
        count -= kept[0].shape[-2]
    return kept


@dataclass(frozen=True)
class LastAttention:
    """The attention of the last layer.

    Attributes:
        model: The model.
        layer: Its last decoder layer.
        site: The site of attention of this layer.
        leading: Segments of which keys and values are all that is needed.
        tail: The segment after them.
        start: First position of the tail in the last segment that streams have.
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
        """Cut the last segment at the first scored position, if that pays and changes nothing.

        Args:
            model: The model.
            layers: Its decoder layers.
            site: The site of attention of the last one.
            segments: The intact pass.
            input_ids: Tokens of its last segment, int64 `[rows, tokens]`.
            first: The first scored position of these.
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
            # A model may handle caches in a way of its own, and need not go on after tokens.
            logger.debug(f"the last attention of {type(model).__name__} is not cut: {error!r}")
            return whole
        return cut or whole

    def _cut(
        self,
        layers: list[nn.Module],
        segments: list[Segment],
        input_ids: torch.Tensor,
        first: int,
    ) -> "LastAttention | None":
        """Cut it and try that with the intact pass; `None` if something else comes out."""
        intact = [segment.calls[self._name].hidden for segment in segments]
        before = sum(hidden.shape[1] for hidden in intact[:-1])
        parts = (input_ids[:, :first], before), (input_ids[:, first:], before + first)
        output_template = self.tail.calls[self._name].output
        lead, tail = (
            _entered(self.model, layers, self._name, output_template, *part) for part in parts
        )
        cut = replace(self, leading=(*self.leading, lead), tail=tail, start=first)
        keys = cut._keys(intact)
        if len(keys.parts) < len(cut.leading):
            return None  # the attention makes no use of a cache
        expected = hidden_states_of(self.tail.calls[f"attention {self.site.layer}"].output)[
            :, first:
        ]
        change = (cut._after(keys, intact[-1]) - expected).float().norm()
        return cut if change <= tolerance(expected.dtype) * expected.float().norm() else None

    @property
    def _name(self) -> str:
        """Name of the layer's calls in the segments."""
        return f"layer {self.site.layer}"

    def outputs(self, streams: list[torch.Tensor]) -> torch.Tensor:
        """What it returns from position `start` on: `[streams * rows, tokens, hidden]`.

        Args:
            streams: Input of the layer, `[streams * rows, tokens, hidden]`, for each segment of the
                intact pass.
        """
        return self._after(self._keys(streams), streams[-1])

    def _after(self, keys: _Keys, stream: torch.Tensor) -> torch.Tensor:
        """What it returns for the tail of the last segment, after the tokens with these keys."""
        hidden = stream[:, self.start :]
        args, kwargs = self._arguments(self.tail, hidden, keys)
        block = self.model.get_submodule(self.site.block)
        return hidden_states_of(run_until(block, self.layer, hidden, *args, **kwargs))

    def _keys(self, streams: list[torch.Tensor]) -> _Keys:
        """Keys and values of the leading tokens."""
        keys = _Keys(self.model.config)
        parts = streams[:-1]
        if self.start:
            parts = [*parts, streams[-1][:, : self.start]]
        with self._no_queries():
            for segment, hidden in zip(self.leading, parts, strict=True):
                args, kwargs = self._arguments(segment, hidden, keys)
                with suppress(StopForwardError):
                    self.layer(hidden, *args, **kwargs)
        keys.suffice = False
        return keys

    def _arguments(
        self, segment: Segment, hidden: torch.Tensor, keys: _Keys
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return segment.arguments(self._name, len(hidden), keys)

    @contextmanager
    def _no_queries(self) -> Iterator[None]:
        """Let the projection of queries, where they have one of their own, return zeros."""
        projection = getattr(self.model.get_submodule(self.site.block), QUERIES, None)
        if not isinstance(projection, nn.Linear):
            yield
            return
        width = projection.out_features
        with replaced_forward(projection, lambda x: x.new_zeros(*x.shape[:-1], width)):
            yield


def _entered(
    model: PreTrainedModel,
    layers: list[nn.Module],
    name: str,
    output_template: Any,
    input_ids: torch.Tensor,
    before: int,
) -> Segment:
    """Record how the model calls its last layer for tokens that follow others, and run no layer.

    Args:
        model: The model.
        layers: Its decoder layers.
        name: What to record the call under.
        output_template: What a layer returned once.
        input_ids: The tokens, int64 `[rows, tokens]`.
        before: Number of tokens before them in each row.
    """
    cache = DynamicCache(config=model.config)
    if before:
        for layer in cache.layers:  # only the number of tokens is asked for
            nothing = torch.empty(len(input_ids), 1, before, 1, device=device_of(model))
            layer.update(nothing, nothing)

    def end(*args: Any, **kwargs: Any) -> Any:
        raise StopForwardError

    with (
        zero_embeddings(model, hidden_states_of(output_template).dtype),
        bypass_layers(layers[:-1], output_template),
        recorded_calls({name: layers[-1]}) as calls,
        replaced_forward(layers[-1], end),
        suppress(StopForwardError),
    ):
        ids = input_ids.to(device_of(model))
        model(input_ids=ids, use_cache=True, **cache_argument(model, cache))
    return Segment(len(input_ids), calls)
