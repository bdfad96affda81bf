"""Calibration sets: a seeded selection of rows, tokenized, with their scored tokens marked.

Every row is a conversation or a plain text. Answers are scored, prompts are not. The selected rows
are recorded by index and content hash, so that an evaluation can leave them out.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from optimum_cap.config import CAPConfig
from optimum_cap.data.images import ImageEncoder, ImagesFoundError, TokenizerWithProcessor
from optimum_cap.data.rendering import RenderingCheck, encode
from optimum_cap.data.sources import Source, load_sources
from optimum_cap.data.tokenizers import usable_tokenizer
from optimum_cap.progress import progress_bar

_DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class CalibrationExample:
    """One tokenized example, without padding.

    Attributes:
        input_ids: int64 `[tokens]`.
        scored: bool `[tokens]`, True if the token is a target of the loss; always False for the
            first token, which nothing predicts.
        source: Name of the data set.
        index: Row in that data set.
        digest: `row_digest` of the row, with its images if it has any.
        inputs: Inputs of the model other than tokens, such as the `pixel_values` of images, as the
            processor returns them for a batch of only this example.
    """

    input_ids: torch.Tensor
    scored: torch.Tensor
    source: str
    index: int
    digest: str
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)


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
    config: CAPConfig,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    dataset: Any = None,
    unscored: bool = False,
) -> CalibrationSet:
    """Select and tokenize `config.num_samples` examples and mark their scored tokens.

    Args:
        config: The data set, the number of examples, the seed and the scored tokens.
        tokenizer: The model's tokenizer, or its processor. Its chat template is used if it has one;
            it needs no padding token. Rows with images need a processor, or an object that loads it
            (`load_tokenizer_of`).
        max_length: Maximum number of tokens of the model.
        dataset: Data that replaces `config.dataset`.
        unscored: Whether to also use rows without scored tokens, such as prompts without an answer,
            which suffice for models without an LM head.

    Raises:
        ValueError: `tokenizer` is `None` or has no vocabulary, the data set is unknown, a file has
            no rows or lacks columns, the chat template leaves out every answer, there are fewer
            usable rows than requested, or the model has to answer the prompts.
        FileNotFoundError: A file does not exist.
        TypeError: The tokenizer or the data has the wrong type.
        ImportError: The data set needs the package `datasets`, which is not installed.
    """
    if config.answers == "model":
        raise ValueError(
            "answers 'model' are of the model, which is needed to build the calibration set: use "
            "CAPPruner, or optimum_cap.generation.answer_prompts"
        )
    limit = effective_length(config, usable_tokenizer(tokenizer), max_length)
    shares = shares_of_sources(config, config.dataset if dataset is None else dataset)

    def parts() -> list[Part]:
        encoder = ImageEncoder.of(tokenizer)
        text = usable_tokenizer(tokenizer) if encoder is None else encoder.tokenizer
        may_load = isinstance(tokenizer, TokenizerWithProcessor)
        with progress_bar(total=config.num_samples, desc="Tokenizing", delay=5) as progress:
            return [
                take_examples(share, text, limit, config, progress, unscored, encoder, may_load)
                for share in shares
            ]

    try:
        found = parts()
    except ImagesFoundError:
        tokenizer = tokenizer.load()
        found = parts()
    return mixed_set(found, config, limit)


@dataclass(frozen=True)
class Share:
    """The part of a calibration set that comes from one data set.

    Attributes:
        source: The data set.
        order: Its row indices in drawing order.
        count: Number of examples to take.
    """

    source: Source
    order: Sequence[int]
    count: int


@dataclass(frozen=True)
class Part:
    """The examples of one data set, in drawing order.

    Attributes:
        source: The data set.
        examples: The examples.
        counts: Number of rows left out or changed, for the record.
    """

    source: Source
    examples: list[CalibrationExample]
    counts: dict[str, int]


def shares_of_sources(config: CAPConfig, dataset: Any) -> list[Share]:
    """Load data sets to mix evenly, and return what to draw from each.

    Raises:
        ValueError: A data set cannot be used, or there are more of them than examples.
        FileNotFoundError: A file does not exist.
        TypeError: The data has an unsupported type.
        ImportError: The package `datasets` is needed but not installed.
    """
    sources = load_sources(dataset)
    if config.num_samples < len(sources):
        raise ValueError(
            f"num_samples is {config.num_samples}, but {len(sources)} data sets are mixed: set "
            f"num_samples to at least {len(sources)}"
        )
    shares = []
    for position, source in enumerate(sources):
        order = np.random.default_rng([config.seed, position]).permutation(len(source.rows))
        count = config.num_samples // len(sources) + (position < config.num_samples % len(sources))
        shares.append(Share(source, order.tolist(), count))
    return shares


def mixed_set(parts: list[Part], config: CAPConfig, limit: int) -> CalibrationSet:
    """Mix the examples of data sets and record their selection.

    Args:
        parts: The examples of each data set.
        config: The settings.
        limit: Longest example, in tokens.
    """
    chosen = [example for part in parts for example in part.examples]
    if len(parts) > 1:
        mixed = np.random.default_rng([config.seed, len(parts)]).permutation(len(chosen))
        chosen = [chosen[index] for index in mixed]
    records = [
        {
            "name": part.source.name,
            **part.source.details,
            "rows": len(part.source.rows),
            "selected": [example.index for example in part.examples],
            **part.counts,
        }
        for part in parts
    ]
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


def describe_example(example: CalibrationExample, tokenizer: Any) -> str:
    """Return the text of an example, with its scored tokens between `⟦` and `⟧`.

    Args:
        example: The example.
        tokenizer: The tokenizer or processor it was made with.
    """
    decode = usable_tokenizer(tokenizer).decode
    ids, scored = example.input_ids, example.scored.tolist()
    text, shown = "", f"row {example.index} of {example.source}: {len(ids)} tokens, "
    shown += f"{sum(scored)} scored (between ⟦ and ⟧)\n"
    for end in range(1, len(ids) + 1):
        if end == len(ids) or scored[end] != scored[end - 1]:
            # Not each part separately, because tokenizers strip leading spaces.
            whole = decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            part, text = whole[len(text) :], whole
            shown += f"⟦{part}⟧" if scored[end - 1] else part
    return shown


def take_examples(
    share: Share,
    tokenizer: Any,
    limit: int,
    config: CAPConfig,
    progress: Any = None,
    unscored: bool = False,
    image_encoder: ImageEncoder | None = None,
    may_load: bool = False,
) -> Part:
    """Tokenize rows in order until enough are usable.

    Args:
        share: What to draw.
        tokenizer: The tokenizer.
        limit: Longest example, in tokens.
        config: The settings.
        progress: A progress bar to update once per example.
        unscored: As for `build_calibration_set`.
        image_encoder: Tokenizes rows with images, which are refused without it.
        may_load: Whether it can be loaded when needed.

    Returns:
        The examples, with the number of rows skipped because they are too long, and the number of
        answers in other rows that the chat template does not render completely.

    Raises:
        ValueError: There are fewer usable rows.
        ImagesFoundError: A row has images, and the image encoder must be loaded.
    """
    source, order, count = share.source, share.order, share.count
    examples: list[CalibrationExample] = []
    too_long = unusable = 0
    check = RenderingCheck(source.name, tokenizer)
    for index in order:
        if len(examples) == count:
            break
        takes_images = may_load or image_encoder is not None
        conversation = source.read(source.rows[index], images=takes_images)
        if conversation.images and image_encoder is None:
            raise ImagesFoundError
        if conversation.is_empty:
            unusable += 1
            continue
        inputs: Mapping[str, torch.Tensor] = {}
        every_token, digest = config.scored_tokens == "all", conversation.digest
        if image_encoder is not None and conversation.images:
            of_images = image_encoder.encode(conversation, source, every_token)
            encoded, inputs, digest = of_images.encoded, of_images.inputs, of_images.digest
        else:
            encoded = encode(conversation, tokenizer, limit)
            encoded.scored[:] |= every_token
        input_ids, scored = encoded.input_ids, encoded.scored
        if len(input_ids) > limit:
            too_long += 1
            continue
        check.add(encoded, index)
        scored[:1] = False
        if not len(input_ids) if unscored else not scored.any():
            unusable += 1
            continue
        examples.append(CalibrationExample(input_ids, scored, source.name, index, digest, inputs))
        if progress is not None:
            progress.update()
    check.report()
    if len(examples) < count:
        reasons = [f"{too_long} are longer than {limit} tokens"] if too_long else []
        lack = "are empty" if unscored else "have no token to score"
        reasons += [f"{unusable} {lack}"] if unusable else []
        reason = f" ({', '.join(reasons)})" if reasons else ""
        raise ValueError(
            f"data set {source.name!r} has {len(examples)} usable rows of {len(source.rows)}"
            f"{reason}, but {count} are needed: lower num_samples"
            + (" or raise max_length" if too_long else "")
        )
    return Part(source, examples, {"too_long": too_long, "cut_answers": check.cut})


def effective_length(config: CAPConfig, tokenizer: Any, max_length: int | None) -> int:
    """Return the longest example in tokens, which config, tokenizer and model may limit."""
    # Tokenizers without a limit report an extremely large one, which min() ignores.
    limits = [config.max_length or _DEFAULT_MAX_LENGTH, max_length]
    limits.append(getattr(tokenizer, "model_max_length", None))
    return min(int(limit) for limit in limits if limit)
