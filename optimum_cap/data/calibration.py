"""Calibration sets: a seeded selection of rows, tokenized, with their scored tokens marked.

Every row is a conversation or a plain text. Answers are scored, prompts are not. The selected rows
are recorded by index and by a hash of their content, so that an evaluation can leave them out.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import torch
from transformers.utils import logging

from optimum_cap.config import CAPConfig
from optimum_cap.data.sources import Conversation, Source, load_sources

_DEFAULT_MAX_LENGTH = 2048
# The empty output at the end preserves a line feed at the start of the template.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"
SEPARATOR = "\n"  # between prompt and answer if the tokenizer has no chat template


@dataclass(frozen=True)
class CalibrationExample:
    """One tokenized example, without padding.

    Attributes:
        input_ids: int64 `[tokens]`.
        scored: bool `[tokens]`, True if the token is a target of the loss; always False for the
            first token, which no token predicts.
        source: Name of the data set.
        index: Row in that data set.
        digest: `row_digest` of the row.
    """

    input_ids: torch.Tensor
    scored: torch.Tensor
    source: str
    index: int
    digest: str


@dataclass(frozen=True)
class CalibrationSet:
    """The calibration examples and the record of their selection.

    Attributes:
        examples: The examples in random order, so that consecutive slices are random subsets.
        record: Plain JSON values: seed, lengths, the selected rows of each source, all digests.
    """

    examples: list[CalibrationExample]
    record: dict[str, Any]


def build_calibration_set(
    config: CAPConfig, tokenizer: Any, *, max_length: int | None = None, dataset: Any = None
) -> CalibrationSet:
    """Select and tokenize `config.num_samples` examples and mark their scored tokens.

    Args:
        config: The data set, the number of examples, the seed and the scored tokens.
        tokenizer: The model's tokenizer. Its chat template is used if it has one; it needs no
            padding token.
        max_length: Maximum number of tokens of the model.
        dataset: Data that replaces `config.dataset`.

    Raises:
        ValueError: `tokenizer` is `None`, the data set is unknown, a file has no rows or lacks the
            columns, or there are fewer usable rows than requested.
        FileNotFoundError: A file does not exist.
        TypeError: The tokenizer or the data has the wrong type.
        ImportError: The data set needs the package `datasets`, which is not installed.
    """
    if tokenizer is None:
        raise ValueError("calibration needs the model's tokenizer, got None: pass tokenizer=...")
    if not callable(tokenizer):
        raise TypeError(
            f"calibration needs a tokenizer object, got {tokenizer!r}: load it with "
            "AutoTokenizer.from_pretrained"
        )
    limit = _effective_length(config, tokenizer, max_length)
    sources = load_sources(config.dataset if dataset is None else dataset)
    if config.num_samples < len(sources):
        raise ValueError(
            f"num_samples is {config.num_samples}, but {len(sources)} data sets are mixed: set "
            f"num_samples to at least {len(sources)}"
        )
    chosen: list[CalibrationExample] = []
    records = []
    with logging.tqdm(total=config.num_samples, desc="Tokenizing", delay=5) as progress:
        for position, source in enumerate(sources):
            share = config.num_samples // len(sources)
            share += position < config.num_samples % len(sources)
            order = np.random.default_rng([config.seed, position]).permutation(len(source.rows))
            examples, too_long = _take(source, order, share, tokenizer, limit, config, progress)
            chosen += examples
            records.append(
                {
                    "name": source.name,
                    **source.details,
                    "rows": len(source.rows),
                    "selected": [example.index for example in examples],
                    "too_long": too_long,
                }
            )
    if len(sources) > 1:
        mixed = np.random.default_rng([config.seed, len(sources)]).permutation(len(chosen))
        chosen = [chosen[index] for index in mixed]
    digests = [example.digest for example in chosen]
    record = {
        "seed": config.seed,
        "scored_tokens": config.scored_tokens,
        "max_length": limit,
        "tokens": sum(len(example.input_ids) for example in chosen),
        "sources": records,
        "digests": digests,
        "sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
    }
    return CalibrationSet(chosen, record)


def _take(
    source: Source,
    order: Iterable[int],
    count: int,
    tokenizer: Any,
    limit: int,
    config: CAPConfig,
    progress: Any,
) -> tuple[list[CalibrationExample], int]:
    """Tokenize rows in `order` until `count` are usable.

    Returns:
        The examples, and the number of rows skipped because they are too long.
    """
    examples: list[CalibrationExample] = []
    too_long = unscored = 0
    for index in map(int, order):
        if len(examples) == count:
            break
        conversation = source.read(source.rows[index])
        input_ids, scored = encode(conversation, tokenizer, limit)
        if len(input_ids) > limit:
            too_long += 1
            continue
        if config.scored_tokens == "all":
            scored[:] = True
        scored[:1] = False
        # With an empty answer, only the end-of-turn token would be scored.
        if not conversation.turns[-1][1].strip() or not scored.any():
            unscored += 1
            continue
        examples.append(
            CalibrationExample(input_ids, scored, source.name, index, conversation.digest)
        )
        progress.update()
    if len(examples) < count:
        reasons = [f"{too_long} are longer than {limit} tokens"] if too_long else []
        reasons += [f"{unscored} have no token to score"] if unscored else []
        reason = f" ({', '.join(reasons)})" if reasons else ""
        raise ValueError(
            f"data set {source.name!r} has {len(examples)} usable rows of {len(source.rows)}"
            f"{reason}, but {count} are needed: lower num_samples"
            + (" or raise max_length" if too_long else "")
        )
    return examples, too_long


def _effective_length(config: CAPConfig, tokenizer: Any, max_length: int | None) -> int:
    # Tokenizers without a limit report an extremely large one, which min() ignores.
    limits = [config.max_length or _DEFAULT_MAX_LENGTH, max_length]
    limits.append(getattr(tokenizer, "model_max_length", None))
    return min(int(limit) for limit in limits if limit)


# Tokens


def encode(
    conversation: Conversation, tokenizer: Any, limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(input_ids, scored)` of a conversation, int64 and bool `[tokens]`.

    Answers are scored. A plain text is truncated to `limit` tokens, a conversation is not.
    """
    roles = [role for role, _ in conversation.turns]
    if roles == ["text"]:
        ids = _tokens(tokenizer, conversation.turns[0][1])[:limit]
        spans = [(0, len(ids))]
    elif getattr(tokenizer, "chat_template", None):
        ids, spans = _encode_chat(conversation, tokenizer)
    else:
        ids, spans = _encode_plain(conversation, tokenizer)
    scored = torch.zeros(len(ids), dtype=torch.bool)
    for start, stop in spans:
        scored[start:stop] = True
    return torch.tensor(ids, dtype=torch.long), scored


def chat_template(tokenizer: Any) -> str:
    """Return the chat template of a tokenizer that has one, with today's date made constant.

    Some templates (Llama 3) include the date, which would make calibration and evaluation change
    from day to day. It is replaced by the date that these templates use as their default.
    """
    template: str = tokenizer.get_chat_template()
    return _FIXED_DATE + template if "strftime_now" in template else template


def _encode_chat(
    conversation: Conversation, tokenizer: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    """Render with the chat template; the spans are the assistant's turns with their end tokens."""
    messages = [{"role": role, "content": text} for role, text in conversation.turns]
    template = chat_template(tokenizer)

    def rendered(count: int, generation_prompt: bool) -> list[int]:
        try:
            text = tokenizer.apply_chat_template(
                messages[:count],
                chat_template=template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(role for role, _ in conversation.turns)
            raise ValueError(
                f"the tokenizer's chat template does not support a chat with the roles {roles} "
                f"({error}): change the chat, or set tokenizer.chat_template = None"
            ) from error
        return _tokens(tokenizer, text, special=False)

    ids = rendered(len(messages), False)
    spans = []
    for turn, (role, _) in enumerate(conversation.turns):
        if role == "assistant":
            # A template may not render a shorter conversation as an exact prefix of a longer one.
            start = _common_prefix(ids, rendered(turn, True))
            spans.append((start, _common_prefix(ids, rendered(turn + 1, False))))
    return ids, spans


def _encode_plain(
    conversation: Conversation, tokenizer: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    """Join the turns by line feeds and append the end-of-sequence token, if there is one."""
    text, spans = "", []
    for role, turn in conversation.turns:
        before = text + SEPARATOR if text else ""
        text = before + turn
        if role == "assistant":
            spans.append((before, text))
    end = getattr(tokenizer, "eos_token_id", None)
    ids = _tokens(tokenizer, text)
    if end is not None and ids[-1:] != [end]:
        ids = [*ids, end]
    ranges = [
        (
            _common_prefix(ids, _tokens(tokenizer, before)) if before else 0,
            len(ids) if after == text else _common_prefix(ids, _tokens(tokenizer, after)),
        )
        for before, after in spans
    ]
    return ids, ranges


def _tokens(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    # verbose=False: no warning per row that is too long; `_take` counts them.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
