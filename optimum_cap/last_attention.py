"""The attention of the last layer, whose output matters only from the first scored position on.

The tokens before are there for their keys and values: for them the attention runs until these are
known, and without queries. Then it runs for the others, as the model itself goes on after tokens
that it has seen: how it calls the layer then is recorded, with all layers skipped. A trial with the
intact pass tells whether that gives the same output.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from optimum_cap.architectures import QUERIES, Site
from optimum_cap.interventions import (
    ReachedError,
    hidden_of,
    no_embeddings,
    output_of,
    recorded_calls,
    replaced_forward,
    skipped,
)
from optimum_cap.offload import device_of
from optimum_cap.segments import WORTHWHILE_SHARE, Segment


class _Keys(DynamicCache):
    """Keys and values of all tokens so far, of which one row may branch into several.

    Attributes:
        suffice: End the forward pass as soon as those of its tokens are here.
    """

    suffice = False

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[layer_idx]
        if layer.is_initialized and len(layer.keys) < len(key_states):
            layer.batch_repeat_interleave(len(key_states) // len(layer.keys))
        states = layer.update(key_states, value_states, *args, **kwargs)
        if self.suffice:
            raise ReachedError
        return states


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
        name = f"layer {site.layer}"
        intact = [segment.calls[name].hidden for segment in segments]
        before = sum(hidden.shape[1] for hidden in intact[:-1])
        parts = (input_ids[:, :first], before), (input_ids[:, first:], before + first)
        form = suffix.calls[name].output
        lead, tail = (_entered(model, layers, name, form, *part) for part in parts)
        cut = cls(model, layers[-1], site, (*leading, lead), tail, first)
        keys = cut._keys(intact)
        if not keys.layers[site.layer].is_initialized:
            return whole  # the attention makes no use of a cache
        expected = hidden_of(suffix.calls[f"attention {site.layer}"].output)[:, first:]
        # Far above what rounding does.
        tolerance = torch.finfo(expected.dtype).eps ** (2 / 3)
        change = (cut._after(keys, intact[-1]) - expected).norm()
        return cut if change <= tolerance * expected.norm() else whole

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
        branch = self.model.get_submodule(self.site.branch)
        return hidden_of(output_of(branch, self.layer, hidden, *args, **kwargs))

    def _keys(self, streams: list[torch.Tensor]) -> _Keys:
        """Keys and values of the leading tokens."""
        keys = _Keys(config=self.model.config)
        keys.suffice = True
        parts = streams[:-1]
        if self.start:
            parts = [*parts, streams[-1][:, : self.start]]
        with self._no_queries():
            for segment, hidden in zip(self.leading, parts, strict=True):
                args, kwargs = self._arguments(segment, hidden, keys)
                with suppress(ReachedError):
                    self.layer(hidden, *args, **kwargs)
        keys.suffice = False
        return keys

    def _arguments(
        self, segment: Segment, hidden: torch.Tensor, keys: _Keys
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return segment.arguments(f"layer {self.site.layer}", len(hidden), keys)

    @contextmanager
    def _no_queries(self) -> Iterator[None]:
        """Let the projection of queries, where they have one of their own, return zeros."""
        projection = getattr(self.model.get_submodule(self.site.branch), QUERIES, None)
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
    form: Any,
    input_ids: torch.Tensor,
    before: int,
) -> Segment:
    """Record how the model calls its last layer for tokens that follow others, and run no layer.

    Args:
        model: The model.
        layers: Its decoder layers.
        name: What to record the call under.
        form: What a layer returned once.
        input_ids: The tokens, int64 `[rows, tokens]`.
        before: Number of tokens before them in each row.
    """
    cache = DynamicCache(config=model.config)
    if before:
        for layer in cache.layers:  # only the number of tokens is asked for
            nothing = torch.empty(len(input_ids), 1, before, 1, device=device_of(model))
            layer.update(nothing, nothing)

    def end(*args: Any, **kwargs: Any) -> Any:
        raise ReachedError

    with (
        no_embeddings(model, hidden_of(form).dtype),
        skipped(layers[:-1], form),
        recorded_calls({name: layers[-1]}) as calls,
        replaced_forward(layers[-1], end),
        suppress(ReachedError),
    ):
        model(input_ids=input_ids.to(device_of(model)), past_key_values=cache, use_cache=True)
    return Segment(len(input_ids), calls)
