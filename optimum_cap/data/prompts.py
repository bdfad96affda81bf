"""Prompts for the model to answer, drawn and formatted like calibration examples."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from optimum_cap.config import CAPConfig
from optimum_cap.data.calibration import (
    CalibrationExample,
    Part,
    Share,
    effective_length,
    shares_of_sources,
    take_examples,
)
from optimum_cap.data.rendering import RenderingCheck, encode_prompt
from optimum_cap.data.sources import Conversation, Source
from optimum_cap.data.tokenizers import usable_tokenizer


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt.

    Attributes:
        example: The prompt without an answer; all tokens but the first are marked as scored.
        conversation: The row; its last turn is the published answer, if it has one.
        preset: The preset of its data set, if any.
    """

    example: CalibrationExample
    conversation: Conversation
    preset: str | None

    @property
    def published(self) -> str | None:
        """The published answer, or `None` if the row has none."""
        role, text = self.conversation.turns[-1]
        return text if role == "assistant" and text.strip() else None


@dataclass
class PromptSource:
    """Draws the prompts of a data set in order.

    Attributes:
        source: The data set.
        count: Number of examples to take from it.
        longest: Longest prompt, in tokens.
        too_long: Number of longer prompts skipped so far.
    """

    source: Source
    count: int
    longest: int
    too_long: int = 0
    _prompts: Iterator[Prompt] = field(init=False, repr=False)
    _check: RenderingCheck = field(init=False, repr=False)

    @classmethod
    def of(cls, share: Share, tokenizer: Any, longest: int) -> "PromptSource":
        """Return the source that draws the prompts of a share."""
        prompts = cls(share.source, share.count, longest)
        prompts._check = RenderingCheck(share.source.name, tokenizer)
        prompts._prompts = prompts._draw(share, tokenizer)
        return prompts

    def take(self, count: int) -> list[Prompt]:
        """Return the next `count` prompts, or fewer if the data set has no more."""
        taken = [prompt for _, prompt in zip(range(count), self._prompts, strict=False)]
        self._check.report()
        self._check = RenderingCheck(self._check.name, self._check.tokenizer)
        return taken

    def _draw(self, share: Share, tokenizer: Any) -> Iterator[Prompt]:
        for index in share.order:
            conversation = share.source.read(share.source.rows[index])
            if conversation.turns[0][0] == "text":
                continue  # a missing row, or a text among chats
            encoded = encode_prompt(conversation, tokenizer)
            tokens = len(encoded.input_ids)
            if tokens > self.longest:
                self.too_long += 1
            elif tokens:
                self._check.add(encoded, index)
                targets = torch.arange(tokens) > 0
                example = CalibrationExample(
                    encoded.input_ids, targets, share.source.name, index, conversation.digest
                )
                yield Prompt(example, conversation, share.source.preset)


@dataclass(frozen=True)
class PromptDraw:
    """The sources of a calibration set with the model's own answers.

    Attributes:
        sources: For each data set, in order: prompts to answer, or plain texts as examples, which
            are used unchanged.
        limit: Longest example with its answer, in tokens.
    """

    sources: list[PromptSource | Part]
    limit: int


def draw_prompts(
    config: CAPConfig, tokenizer: Any, *, max_length: int | None = None, dataset: Any = None
) -> PromptDraw:
    """Prepare to draw the prompts of `config.dataset`, in the order of `build_calibration_set`.

    Args:
        config: The data set, the number of examples, the seed and the longest answer.
        tokenizer: The model's tokenizer, or its processor.
        max_length: Maximum number of tokens of the model.
        dataset: Data that replaces `config.dataset`.

    Raises:
        ValueError: As for `build_calibration_set`; or no data set has prompts, or the longest
            answer leaves no room for one.
        FileNotFoundError: A file does not exist.
        TypeError: The tokenizer or the data has the wrong type.
        ImportError: The data set needs the package `datasets`, which is not installed.
    """
    tokenizer = usable_tokenizer(tokenizer)
    limit = effective_length(config, tokenizer, max_length)
    longest = limit - config.max_new_tokens
    if longest < 1:
        raise ValueError(
            f"max_new_tokens is {config.max_new_tokens}, but an example with its prompt has at "
            f"most {limit} tokens (max_length, or the limit of the model or the tokenizer): lower "
            "max_new_tokens"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so answers of the model would never end: "
            "set tokenizer.eos_token"
        )
    shares = shares_of_sources(config, config.dataset if dataset is None else dataset)
    answerable = [has_prompts(share.source) for share in shares]
    if not any(answerable):
        names = ", ".join(repr(share.source.name) for share in shares)
        raise ValueError(
            f"answers 'model' needs prompts to answer, but data set {names} has plain texts only: "
            "choose data with prompts, or answers 'dataset'"
        )
    return PromptDraw(
        [
            PromptSource.of(share, tokenizer, longest)
            if can_answer
            else take_examples(share, tokenizer, limit, config)
            for share, can_answer in zip(shares, answerable, strict=True)
        ],
        limit,
    )


def has_prompts(source: Source) -> bool:
    """Return whether the first nonempty row is a conversation."""
    for row in source.rows:
        conversation = source.read(row)
        if conversation.turns[0][0] != "text":
            return True
        if not conversation.is_empty:
            return False
    return False
