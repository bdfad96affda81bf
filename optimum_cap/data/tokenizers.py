"""Tokenizers: loading one by name, and checks that it fits the texts and the model."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

_ADVICE = "pass the model's own tokenizer (tokenizer=..., --tokenizer)"


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer by name or folder.

    Args:
        name: Hub id or folder.
        **options: Keywords of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: There is none, or it has no vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        cause = next(iter(str(error).splitlines()), "").rstrip(" :")
        raise ValueError(
            f"no tokenizer could be loaded from {name!r} ({cause}): name another one "
            "(CAPConfig(tokenizer=...), --tokenizer), or pass a loaded one"
        ) from error
    return usable_tokenizer(tokenizer)


def usable_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """Return `tokenizer`, or the tokenizer of a processor, after checking that it can encode text.

    Raises:
        ValueError: It is `None`, or has no vocabulary.
        TypeError: It is neither a tokenizer nor a processor with one.
    """
    if tokenizer is None:
        raise ValueError("expected the model's tokenizer, got None: pass tokenizer=...")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = _tokenizer_of_processor(tokenizer)
    words = set(tokenizer.get_vocab().values()) - _added_ids(tokenizer)
    if not words:
        raise ValueError(
            f"the tokenizer {_name(tokenizer)} has no vocabulary (perhaps its folder has no "
            f"tokenizer files), so it turns every text into the same token or none: {_ADVICE}"
        )
    return tokenizer


def check_token_ids(
    tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Iterable[int]], embeddings: int
) -> None:
    """Check token ids before a model takes them.

    Args:
        tokenizer: The tokenizer that they come from.
        sequences: The ids of each text: lists or int64 tensors `[tokens]`.
        embeddings: Number of embeddings of the model.

    Raises:
        ValueError: An id has no embedding, or no text has a token of the vocabulary.
    """
    ids: set[int] = set()
    for sequence in sequences:
        ids.update(sequence.tolist() if isinstance(sequence, torch.Tensor) else sequence)
    if ids and (largest := max(ids)) >= embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"token {largest} {token!r} of the tokenizer {_name(tokenizer)} is in the data, but "
            f"the model has {embeddings} embeddings: resize them (model.resize_token_embeddings), "
            f"or {_ADVICE}"
        )
    if not ids - _added_ids(tokenizer):
        raise ValueError(
            f"the tokenizer {_name(tokenizer)} turns every text into the same token or none, so it "
            f"does not know the characters of the data: {_ADVICE}"
        )


def _tokenizer_of_processor(processor: Any) -> PreTrainedTokenizerBase:
    tokenizer = getattr(processor, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        shown = repr(processor) if isinstance(processor, str) else type(processor).__name__
        raise TypeError(
            f"expected a tokenizer object, got {shown}: load it with AutoTokenizer.from_pretrained"
        )
    template = getattr(processor, "chat_template", None)
    if template and not getattr(tokenizer, "chat_template", None):
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def _added_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of special and added tokens, which no ordinary text consists of."""
    added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    return {*tokenizer.all_special_ids, *added.values()}


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)
