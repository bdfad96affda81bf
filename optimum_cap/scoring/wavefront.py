"""Runs the masked streams of a batch, each starting at the layer of its masked unit.

A *stream* is the hidden states of one masked pass. Masking a unit of layer l changes nothing before
its site, so a stream starts from the recorded intact input of layer l, and the streams of many
units run through the later layers as rows of one batch. In its first layer, a stream does not
compute the blocks up to that of the masked unit but gets their outputs. Logits are computed only at
scored positions.

The shared prefix of the examples is computed once per stream, as a single row whose keys and values
are read by the rows of the examples.
"""

import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import Cache

from optimum_cap.data import Batch
from optimum_cap.models import (
    LayerCall,
    ModelView,
    RecordedCall,
    SiteUnit,
    Targets,
    call_compiled,
    call_layer,
    device_of,
    hidden_states_of,
    logits_of,
    onloaded,
    positions_per_chunk,
    token_losses,
)
from optimum_cap.scoring.last_attention import LastAttention
from optimum_cap.scoring.masked_blocks import MaskedBlocks
from optimum_cap.scoring.prefix import PrefixCache, Segment, Streams, record, repeat_rows


class Wavefront:
    """Runs the masked streams of one batch, starting from the recorded intact pass.

    Args:
        view: The model, in evaluation mode.
        batch: The examples; their shared prefix, if there is one, is computed once per stream.
        torch_compile: Compile the layers in which no stream starts.

    Raises:
        ValueError: The sites include experts whose computation is not supported.
    """

    def __init__(
        self,
        view: ModelView,
        batch: Batch,
        torch_compile: bool = False,
    ) -> None:
        self.model = view.model
        self.layers = view.layers
        self._call: LayerCall = call_compiled if torch_compile else call_layer
        self.blocks = MaskedBlocks(view)
        self._prefix = batch.prefix
        if batch.prefix:
            prefix, suffix = batch.split
            # The last token predicts nothing.
            inputs = [prefix.input_ids, suffix.input_ids[:, :-1]]
        else:
            suffix, inputs = batch, [batch.input_ids]
        self.targets = Targets.of(suffix)
        self._suffix_ids = inputs[-1]
        modules = {f"layer {index}": layer for index, layer in enumerate(self.layers)}
        modules |= self.blocks.modules()
        cache = self._cache()
        self.segments = [record(view.model, modules, input_ids, cache) for input_ids in inputs]
        self.suffix = self.segments[-1]

    def _cache(self, layer: int | None = None) -> PrefixCache | None:
        return PrefixCache(self.model.config, layer) if self._prefix else None

    def intact_losses(self) -> torch.Tensor:
        """Return the losses of the intact model, float64 `[examples]`."""
        output = hidden_states_of(self.suffix.calls[f"layer {len(self.layers) - 1}"].output)
        return self._losses(self._at_scored(output))[0]

    def masked_losses(self, units: list[SiteUnit]) -> torch.Tensor:
        """Return the losses with each unit masked, float64 `[units, examples]`.

        Args:
            units: The units in the order of the model: by layer, attention units first.
        """
        first, last = units[0].site.layer, len(self.layers) - 1
        streams = [_no_streams(segment.calls[f"layer {first}"]) for segment in self.segments]
        for index in range(first, last):
            starting = [unit for unit in units if unit.site.layer == index]
            cache = self._cache(index)
            with onloaded(self.layers[index]):
                streams = [
                    self._through_layer(segment, index, carried, starting, cache)
                    for segment, carried in zip(self.segments, streams, strict=True)
                ]
        starting = [unit for unit in units if unit.site.layer == last]
        with onloaded(self.layers[last]):
            rows = self._through_last_layer(streams, starting)
        return self._losses(rows)

    def _through_layer(
        self,
        segment: Segment,
        index: int,
        carried: Streams,
        starting: list[SiteUnit],
        cache: Cache | None,
    ) -> Streams:
        """Run streams from earlier layers and streams that start in this layer through it.

        The input of a starting stream is the intact input of the layer (for the residual
        connection); it gets the outputs of the blocks up to the masked one.
        """
        call = segment.calls[f"layer {index}"]
        intact = repeat_rows(call.hidden, len(starting))
        rows = torch.cat([carried.hidden.to(intact.device), intact], dim=-3)
        args, kwargs = segment.arguments(f"layer {index}", rows.shape[-3], cache, carried.shared)
        if not starting:
            output = self._call(self.layers[index], rows, args, kwargs)
        else:
            attention = self.blocks.attention_outputs(segment, index, starting, _every_position)
            with self.blocks.returning(segment, index, attention, starting, _every_position):
                output = self.layers[index](rows, *args, **kwargs)
        carried.share_intact(call.shared, len(starting))
        return Streams(hidden_states_of(output), carried.shared)

    def _through_last_layer(self, streams: list[Streams], starting: list[SiteUnit]) -> torch.Tensor:
        """Run streams through the last layer, whose output matters only at scored positions.

        Everything after the attention is position-wise, so only the attention runs on sequences;
        the rest of the layer runs on scored positions, each as a sequence of one token.

        Returns:
            Output of the layer, `[..., streams * scored, 1, hidden]`.
        """
        index = len(self.layers) - 1
        intact = self.suffix.calls[f"layer {index}"].hidden
        hidden, attention_outputs = [], []
        if streams[-1].rows:
            streams = [replace(each, hidden=each.hidden.to(intact.device)) for each in streams]
            last = self._last_attention
            hidden.append(self._at_scored(streams[-1].hidden))
            attention_outputs.append(self._at_scored(last.outputs(streams), last.start))
        if starting:
            hidden.append(repeat_rows(self._at_scored(intact), len(starting)))
            attention_outputs.append(
                self.blocks.attention_outputs(self.suffix, index, starting, self._at_scored)
            )
        rows, attention = torch.cat(hidden, dim=-3), torch.cat(attention_outputs)
        args, kwargs = self.suffix.arguments(f"layer {index}", self.suffix.rows, None, None)
        tokens, times = intact.shape[-2], rows.shape[-3] // len(self.targets.ids)

        def at_scored(value: Any) -> Any:
            """Select positions from arguments with values per token (Gemma 3n, Gemma 4)."""
            is_tensor = isinstance(value, torch.Tensor) and value.ndim == 3
            if not is_tensor or value.shape[:2] != (self.suffix.rows, tokens):
                return value
            return repeat_rows(self._at_scored(value), times)

        args = tuple(map(at_scored, args))
        kwargs = {name: at_scored(value) for name, value in kwargs.items()}
        with self.blocks.returning(self.suffix, index, attention, starting, self._at_scored):
            return hidden_states_of(self.layers[index](rows, *args, **kwargs))

    @cached_property
    def _last_attention(self) -> LastAttention:
        return LastAttention.of(
            self.model,
            self.layers,
            self.blocks.attention[len(self.layers) - 1],
            self.segments,
            self._suffix_ids,
            first=int(self.targets.columns.min()),
        )

    def _at_scored(self, hidden: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Select the positions whose logits are scored from hidden states that begin at `start`.

        Returns:
            `[..., streams * scored, 1, hidden]`.
        """
        streams = hidden.unflatten(-3, (-1, self.suffix.rows))
        rows = self.targets.rows.to(hidden.device)
        columns = self.targets.columns.to(hidden.device) - start
        return streams[..., rows, columns, :].flatten(-3, -2).unsqueeze(-2)

    def _losses(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the losses of streams, float64 `[streams, examples]`.

        The rest of the model (final norm, head, soft-capping) is position-wise.

        Args:
            hidden: Output of the last layer, `[..., streams * scored, 1, hidden]`.
        """
        scored, positions = len(self.targets.ids), hidden.shape[-3]
        targets = self.targets.ids.repeat(positions // scored).to(device_of(self.model))
        step = positions_per_chunk(self.model, hidden.device)
        output_template = self.suffix.calls[f"layer {len(self.layers) - 1}"].output
        with onloaded(self.model, besides=[*self.layers, self.model.get_input_embeddings()]):
            losses = [
                token_losses(
                    logits_of(
                        self.model,
                        self.layers,
                        output_template,
                        hidden[..., start : start + step, :, :],
                    ),
                    targets[start : start + step],
                )
                for start in range(0, positions, step)
            ]
        return self.targets.example_means(torch.cat(losses).view(-1, scored))


def _no_streams(call: RecordedCall) -> Streams:
    """Return zero streams for a layer whose intact call was recorded."""
    shared = copy.copy(call.shared)
    if shared is not None:
        shared.clear()
    return Streams(call.hidden[..., :0, :, :], shared)


def _every_position(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
