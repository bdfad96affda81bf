"""Tokenizers: loading them by name, and checking that they fit the texts and the model."""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

_TOO_MANY_UNKNOWN = 0.5  # share of text tokens
_MANY_UNKNOWN = 0.1
_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken.json")
_ADVICE = "pass the model's own tokenizer (tokenizer=..., --tokenizer)"


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer by name or folder.

    Args:
        name: Hub id or folder.
        **options: Arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: There is none, or it has no vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    # Damaged files can make transformers and tokenizers raise any error, such as a KeyError.
    except Exception as error:
        folder = Path(name) / (options.get("subfolder") or "")
        raise ValueError(
            f"no tokenizer could be loaded from {name!r} ({_cause(error, folder)}): name another "
            "one (CAPConfig(tokenizer=...), --tokenizer), or pass a loaded one"
        ) from error
    return usable_tokenizer(tokenizer)


def _cause(error: Exception, folder: Path) -> str:
    """Return why no tokenizer could be loaded, in one line."""
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _FILES):
        return "the folder has no tokenizer files"
    lines = (line.strip() for line in str(error).splitlines())
    cause = next(filter(None, lines), "").rstrip(" :")
    if cause.endswith("from one of"):  # followed by a list of what transformers would accept
        return "transformers finds no tokenizer files there that it can read"
    if isinstance(error, OSError | ValueError):
        return cause
    return f"{type(error).__name__}: {cause}"


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
    """Check token ids before passing them to a model.

    Logs a warning if at least a tenth of the text tokens are the unknown token. Special tokens are
    not counted, nor is an unknown token that also begins or ends texts (as in GPT-2).

    Args:
        tokenizer: The tokenizer they come from.
        sequences: The ids of each text: lists or int64 tensors `[tokens]`.
        embeddings: Number of embeddings of the model.

    Raises:
        ValueError: An id has no embedding, no text has a token of the vocabulary, or at least half
            of the text tokens are the unknown token.
    """
    ids: Counter[int] = Counter()
    for sequence in sequences:
        ids.update(sequence.tolist() if isinstance(sequence, torch.Tensor) else sequence)
    if ids and (largest := max(ids)) >= embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"token {largest} {token!r} of the tokenizer {_name(tokenizer)} is in the data, but "
            f"the model has {embeddings} embeddings: resize them (model.resize_token_embeddings), "
            f"or {_ADVICE}"
        )
    if not set(ids) - _added_ids(tokenizer):
        raise ValueError(
            f"the tokenizer {_name(tokenizer)} turns every text into the same token or none, so it "
            f"does not know the characters of the data: {_ADVICE}"
        )
    _check_unknown_tokens(tokenizer, ids)


def _check_unknown_tokens(tokenizer: PreTrainedTokenizerBase, ids: Mapping[int, int]) -> None:
    """Check the share of the unknown token among text tokens, given as `{id: count}`."""
    unknown = tokenizer.unk_token_id
    edges = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if unknown is None or unknown in edges:
        return
    special = set(tokenizer.all_special_ids) - {unknown}
    tokens = sum(number for token, number in ids.items() if token not in special)
    share = ids.get(unknown, 0) / max(tokens, 1)
    message = (
        f"the tokenizer {_name(tokenizer)} turns {ids.get(unknown, 0)} of {tokens} tokens of the "
        f"data into its unknown token {tokenizer.unk_token!r}, so it does not know"
    )
    if share >= _TOO_MANY_UNKNOWN:
        raise ValueError(f"{message} the characters of the data: {_ADVICE}")
    if share >= _MANY_UNKNOWN:
        logger.warning(f"{message} some characters of the data: {_ADVICE}, or other data")


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
    """Return the ids of special and added tokens, which do not occur in ordinary text."""
    added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    return {*tokenizer.all_special_ids, *added.values()}


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)
