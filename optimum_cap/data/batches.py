"""Batches of calibration examples, grouped by length and padded, with an optional shared prefix."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from optimum_cap.data.calibration import CalibrationExample


@dataclass(frozen=True)
class Batch:
    """Examples of similar length, padded on the right.

    The padding needs no attention mask: under causal attention, no token attends to later ones.

    Attributes:
        positions: Index of each example in the calibration set.
        input_ids: int64 `[examples, tokens]`.
        real: bool `[examples, tokens]`, False for padding.
        scored: bool `[examples, tokens]`, True if the token is a target of the loss.
        prefix: Number of tokens at the start shared by all examples, which are computed once.
        inputs: Inputs of the model other than tokens, if any; the batch then has one example.
    """

    positions: list[int]
    input_ids: torch.Tensor
    real: torch.Tensor
    scored: torch.Tensor
    prefix: int = 0
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def split(self) -> tuple["Batch", "Batch"]:
        """The prefix as a batch of one row, and the rest of each example."""
        return (
            self._part(slice(1), slice(self.prefix)),
            self._part(slice(None), slice(self.prefix, None)),
        )

    def _part(self, rows: slice, columns: slice) -> "Batch":
        return Batch(
            self.positions[rows],
            self.input_ids[rows, columns],
            self.real[rows, columns],
            self.scored[rows, columns],
        )


def shared_prefix(examples: list[CalibrationExample]) -> int:
    """Return the number of leading tokens shared by all examples that predict no scored token.

    Such a prefix may be a few-shot block, a system prompt or a special token. It ends before the
    token that predicts the first scored one, so at least these two follow it in each example.
    Examples with images share none, because equal tokens may represent different images.
    """
    if any(example.inputs for example in examples):
        return 0
    first = examples[0].input_ids
    length = min(int(example.scored[1:].int().argmax()) for example in examples)
    for example in examples:
        differs = example.input_ids[:length] != first[:length]
        length = int(differs.int().argmax()) if differs.any() else length
    return length


def batches(
    examples: list[CalibrationExample], size: int, prefix: int = 0, tokens: int | None = None
) -> list[Batch]:
    """Group examples by length, longest first, so that memory runs out at the start, if at all.

    Examples with images come first, each in its own batch, because models expect the images of a
    batch in various forms.

    Args:
        examples: The examples.
        size: Maximum number of examples per batch.
        prefix: Number of leading tokens to compute once per batch, at most
            `shared_prefix(examples)`.
        tokens: Maximum number of tokens per batch, including padding but not the prefix; a batch of
            one example may exceed it. `None` sets no limit.
    """
    order = sorted(
        range(len(examples)), key=lambda i: (not examples[i].inputs, -len(examples[i].input_ids))
    )
    result, start = [], 0
    while start < len(order):
        longest = len(examples[order[start]].input_ids)
        count = size if tokens is None else min(size, max(1, tokens // (longest - prefix)))
        inputs = examples[order[start]].inputs
        positions = order[start : start + (1 if inputs else count)]
        start += len(positions)
        input_ids = torch.zeros(len(positions), longest, dtype=torch.long)
        real = torch.zeros(len(positions), longest, dtype=torch.bool)
        scored = torch.zeros(len(positions), longest, dtype=torch.bool)
        for row, position in enumerate(positions):
            example = examples[position]
            length = len(example.input_ids)
            input_ids[row, :length] = example.input_ids
            real[row, :length] = True
            scored[row, :length] = example.scored
        result.append(Batch(positions, input_ids, real, scored, prefix, inputs))
    return result
