"""Losses of scored tokens, computed from the last layer's output at the preceding positions."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.data import Batch
from optimum_cap.models.hooks import (
    as_layers_take,
    bypass_layers,
    call_model,
    repack_output,
    replaced_forward,
    zero_embeddings,
)
from optimum_cap.models.offload import device_of

# On a GPU, 0.7 GB including a float32 copy and its log-probabilities, for any memory budget.
_LOGITS_PER_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 26}


@dataclass(frozen=True)
class Targets:
    """The scored tokens of a batch.

    Attributes:
        examples: Number of examples.
        rows, columns: Positions of the hidden states that predict scored tokens, int64 `[scored]`.
        ids: The scored tokens, int64 `[scored]`.
    """

    examples: int
    rows: torch.Tensor
    columns: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def of(cls, batch: Batch) -> "Targets":
        """Return the targets of a batch."""
        rows, columns = batch.scored.nonzero(as_tuple=True)
        return cls(len(batch.positions), rows, columns - 1, batch.input_ids[rows, columns])

    def select(self, values: torch.Tensor) -> torch.Tensor:
        """Return `[..., examples, tokens, width]` at these positions: `[..., scored, width]`."""
        return values[..., self.rows.to(values.device), self.columns.to(values.device), :]

    def example_means(self, token_losses: torch.Tensor) -> torch.Tensor:
        """Average `[..., scored]` losses over the tokens of each example: `[..., examples]`."""
        rows = self.rows.cpu()
        counts = torch.bincount(rows, minlength=self.examples)
        sums = torch.zeros(*token_losses.shape[:-1], self.examples, dtype=torch.float64)
        sums.index_add_(-1, rows, token_losses.double().cpu())
        return sums / counts


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each position in float32, `[positions]`."""
    return nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")


def positions_per_chunk(model: PreTrainedModel, device: torch.device) -> int:
    """Return the number of positions for which to compute logits at a time, to limit memory."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return max(1, _LOGITS_PER_CHUNK["cuda" if device.type == "cuda" else "cpu"] // vocabulary)


def logits_of(
    model: PreTrainedModel, layers: list[nn.Module], output_template: Any, hidden: torch.Tensor
) -> torch.Tensor:
    """Return the logits of one-token sequences, without running embeddings and decoder layers.

    Args:
        model: The model.
        layers: Its decoder layers.
        output_template: An output of a layer, which shows how hidden states are returned.
        hidden: Output of the last layer, `[..., positions, 1, hidden]`.

    Returns:
        `[positions, vocabulary]`.
    """
    tokens = torch.zeros(hidden.shape[-3], 1, dtype=torch.long, device=device_of(model))

    def return_hidden(*args: Any, **kwargs: Any) -> Any:
        return repack_output(output_template, as_layers_take(hidden, output_template))

    with (
        zero_embeddings(model, hidden.dtype),
        bypass_layers(layers[:-1], output_template),
        replaced_forward(layers[-1], return_hidden),
    ):
        return model(input_ids=tokens, use_cache=False).logits[:, 0]


def scored_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the logits of an ordinary forward pass at scored positions, `[scored, vocabulary]`."""
    targets = Targets.of(batch)

    def select(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        rows, columns = targets.rows.to(args[0].device), targets.columns.to(args[0].device)
        return (args[0][rows, columns][None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits: torch.Tensor = call_model(
            model, batch.input_ids.to(device_of(model)), batch.inputs
        ).logits[0]
    finally:
        handle.remove()
    return logits
