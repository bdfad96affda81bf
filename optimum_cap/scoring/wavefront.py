"""Runs the masked streams of a batch, each from the layer of its masked unit on.

A *stream* is the hidden states of one masked pass. Masking a unit of layer l changes nothing before
its site. So a stream starts from the recorded intact input of layer l, and the streams of many
units run through the later layers as rows of one batch. In its first layer, a stream does not
compute the blocks up to that of the masked unit: it gets their outputs. Logits are computed at
scored positions only.

The shared prefix of the examples is computed once per stream, as a single row whose keys and values
the rows of the examples read.
"""

from functools import cached_property

import torch
from transformers import Cache

from optimum_cap.data import Batch
from optimum_cap.models import (
    LayerCall,
    ModelView,
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
from optimum_cap.scoring.prefix import PrefixCache, Segment, record


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
            # Nothing is predicted from the last token.
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
            units: The units in the order of the model: by layer, those of the attention first.
        """
        first, last = units[0].site.layer, len(self.layers) - 1
        streams = [segment.calls[f"layer {first}"].hidden[:0] for segment in self.segments]
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
        carried: torch.Tensor,
        starting: list[SiteUnit],
        cache: Cache | None,
    ) -> torch.Tensor:
        """Run streams from earlier layers and streams that start in this layer through it.

        Streams are rows `[streams * rows of the segment, tokens, hidden]`. The input of a starting
        stream is the intact input of the layer (for the residual connection); it gets the outputs
        of the blocks up to the masked one.
        """
        call = segment.calls[f"layer {index}"]
        rows = torch.cat([carried.to(call.hidden.device), call.hidden.repeat(len(starting), 1, 1)])
        args, kwargs = segment.arguments(f"layer {index}", len(carried), cache)
        if not starting:
            return hidden_states_of(self._call(self.layers[index], rows, args, kwargs))
        attention = self.blocks.attention_outputs(segment, index, starting, _every_position)
        with self.blocks.returning(segment, index, attention, starting, _every_position):
            return hidden_states_of(self.layers[index](rows, *args, **kwargs))

    def _through_last_layer(
        self, streams: list[torch.Tensor], starting: list[SiteUnit]
    ) -> torch.Tensor:
        """Run streams through the last layer, whose output matters at scored positions only.

        Everything after the attention is position-wise. So only the attention runs on sequences;
        the rest of the layer runs on scored positions, each as a sequence of one token.

        Returns:
            Output of the layer, `[streams * scored, 1, hidden]`.
        """
        index = len(self.layers) - 1
        intact = self.suffix.calls[f"layer {index}"].hidden
        rows, attention_outputs = [], []
        if len(streams[-1]):
            streams = [carried.to(intact.device) for carried in streams]
            last = self._last_attention
            rows.append(self._at_scored(streams[-1]))
            attention_outputs.append(self._at_scored(last.outputs(streams), last.start))
        if starting:
            rows.append(self._at_scored(intact).repeat(len(starting), 1, 1))
            attention_outputs.append(
                self.blocks.attention_outputs(self.suffix, index, starting, self._at_scored)
            )
        args, kwargs = self.suffix.arguments(f"layer {index}", self.suffix.rows, None)
        attention = torch.cat(attention_outputs)
        with self.blocks.returning(self.suffix, index, attention, starting, self._at_scored):
            return hidden_states_of(self.layers[index](torch.cat(rows), *args, **kwargs))

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
        """Select the positions whose logits are scored, from hidden states that begin at `start`.

        Returns:
            `[streams * scored, 1, hidden]`.
        """
        streams = hidden.view(-1, self.suffix.rows, *hidden.shape[1:])
        rows = self.targets.rows.to(hidden.device)
        columns = self.targets.columns.to(hidden.device) - start
        return streams[:, rows, columns].view(-1, 1, hidden.shape[-1])

    def _losses(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the losses of streams, float64 `[streams, examples]`.

        The rest of the model (final norm, head, soft-capping) is position-wise.

        Args:
            hidden: Output of the last layer, `[streams * scored, 1, hidden]`.
        """
        scored = len(self.targets.ids)
        targets = self.targets.ids.repeat(len(hidden) // scored).to(device_of(self.model))
        step = positions_per_chunk(self.model, hidden.device)
        output_template = self.suffix.calls[f"layer {len(self.layers) - 1}"].output
        with onloaded(self.model, besides=[*self.layers, self.model.get_input_embeddings()]):
            losses = [
                token_losses(
                    logits_of(
                        self.model, self.layers, output_template, hidden[start : start + step]
                    ),
                    targets[start : start + step],
                )
                for start in range(0, len(hidden), step)
            ]
        return self.targets.example_means(torch.cat(losses).view(-1, scored))


def _every_position(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
