"""Preparation of an evaluation: draws items, renders prompts and counts tokens."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers.utils import logging

from optimum_cap.data import (
    CalibrationExample,
    Conversation,
    RenderingCheck,
    check_token_ids,
    encode,
)
from optimum_cap.evaluation.prompts import (
    choices_of,
    is_chat,
    number_of_examples,
    prompt_of,
    stop_texts,
)
from optimum_cap.evaluation.tasks import (
    ChoiceQuestion,
    Document,
    Question,
    TaskItems,
    Text,
    task_of,
)

logger = logging.get_logger(__name__)

LONGEST_WINDOW = 2048
"""Tokens per window, as in papers on pruning and quantization."""
_SHORTEST_ANSWER = 16  # tokens that must remain for an answer after the longest question
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Common fields of tasks with questions.

    Attributes:
        name: Name of the task.
        excluded: Number of questions left out because the model was calibrated on them.
        source: Source of the questions, for the record.
        examples: Digests of the worked examples that the prompts show.
        examples_source: Source of the examples; empty if there are none.
    """

    name: str
    excluded: int
    source: dict[str, Any]
    examples: tuple[str, ...] = ()
    examples_source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Questions(Asked):
    """The questions of a task with their prompts.

    Attributes:
        questions: The questions.
        worked: The tokens of each question with its worked answer; `None` if they do not fit into
            the model's context.
        prompts: The text that the model continues, per question; empty if only the loss on the
            worked answers is measured.
        max_new_tokens: Longest answer, in tokens.
        until: Texts that end an answer, besides the end-of-sequence token.
    """

    questions: list[Question]
    worked: list[CalibrationExample | None]
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 0
    until: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Choices(Asked):
    """The questions of a task with the continuations whose likelihoods are compared.

    Attributes:
        questions: The questions.
        pairs: The context with each choice, per question.
    """

    questions: list[ChoiceQuestion]
    pairs: list[list[tuple[str, str]]]


@dataclass(frozen=True)
class Windows:
    """The windows of text of a task.

    Attributes:
        name: Name of the task.
        windows: Token ids of each window.
        excluded: Number of windows left out because the model was calibrated on them.
        size: Length of a window in tokens.
        source: Source of the text, for the record.
    """

    name: str
    windows: list[list[int]]
    excluded: int
    size: int
    source: dict[str, Any]


Job = Questions | Choices | Windows


@dataclass(frozen=True)
class Draw:
    """How items are selected: a sample of those that the model was not calibrated on.

    Attributes:
        seen: Digests of the rows the model was calibrated on.
        limit: Number of items per task; `None` takes all.
        seed: Seed of the sample, and of the worked examples.
        num_fewshot: Number of worked examples; `None` is the default of each task.
        max_new_tokens: Longest answer in tokens; `None` is each task's limit.
    """

    seen: frozenset[str]
    limit: int | None
    seed: int
    num_fewshot: int | None = None
    max_new_tokens: int | None = None

    def sample(self, items: Sequence[_T], digests: Sequence[str]) -> list[_T]:
        """Return `limit` of the items, in their order.

        Items are drawn in the order of a hash, so excluding an item replaces only that item, and
        two models have as many items in common as possible.
        """
        if self.limit is None or self.limit >= len(items):
            return list(items)
        chosen = sorted(self._in_random_order("", digests)[: self.limit])
        return [items[index] for index in chosen]

    def worked_examples(self, name: str, pool: Sequence[Any], tokenizer: Any) -> list[Any]:
        """Return the worked examples in the prompts of a task.

        They depend only on the seed and the pool, so all models get the same ones.

        Raises:
            ValueError: The pool has too few.
        """
        count = number_of_examples(name, self.num_fewshot, tokenizer)
        if count > len(pool):
            raise ValueError(
                f"task {name}: num_fewshot is {count}, but there are only {len(pool)} questions to "
                "draw worked examples from: lower num_fewshot (--num-fewshot)"
            )
        order = self._in_random_order("examples ", [each.digest for each in pool]) if count else []
        return [pool[index] for index in order[:count]]

    def _in_random_order(self, purpose: str, digests: Sequence[str]) -> list[int]:
        ranks = [
            hashlib.sha256(f"{purpose}{self.seed} {digest}".encode()).digest() for digest in digests
        ]
        return sorted(range(len(digests)), key=ranks.__getitem__)


def prepare(name: str, data: TaskItems, tokenizer: Any, length: int, draw: Draw) -> Job:
    """Draw the items of a task and render the prompts.

    Args:
        name: Name of the task.
        data: Its items.
        tokenizer: The tokenizer.
        length: Longest sequence of the model, in tokens.
        draw: Which items to draw.

    Raises:
        ValueError: No item is left, items do not fit into `length`, there are too few for worked
            examples, or the tokenizer or chat template cannot be used.
    """
    items = data.items
    if isinstance(items, Text):
        return _windows(name, items, data.source, tokenizer, min(LONGEST_WINDOW, length), draw)
    # The loss on a worked answer is measured without examples.
    task = task_of(name)
    examples = [] if task.loss_only else draw.worked_examples(name, data.examples, tokenizer)
    shown = {example.digest for example in examples}
    unseen = [item for item in items if item.digest not in draw.seen]
    remaining = [item for item in unseen if item.digest not in shown]
    if not remaining:
        noun = "documents" if task.documents else "questions"
        if unseen:
            reason = f"all {len(unseen)} {noun} are worked examples"
        else:
            reason = f"the model was calibrated on all {len(items)} {noun}"
        raise ValueError(
            f"task {name}: {reason}, so none is left to evaluate on: use another split or file"
            + (", or lower num_fewshot (--num-fewshot)" if unseen else "")
        )
    chosen: list[Any] = draw.sample(remaining, [item.digest for item in remaining])
    excluded = len(items) - len(unseen)
    if task.documents:
        size = min(LONGEST_WINDOW, length)
        return Windows(name, _documents(name, chosen, tokenizer, size), excluded, size, data.source)
    of_task: dict[str, Any] = {"name": name, "excluded": excluded, "source": data.source}
    if examples:
        of_task["examples"] = tuple(example.digest for example in examples)
        of_task["examples_source"] = data.examples_source
    if task.read_choices is not None:
        pairs = [choices_of(question, examples) for question in chosen]
        _check_choice_lengths(name, pairs, tokenizer, length)
        return Choices(questions=chosen, pairs=pairs, **of_task)
    if task.loss_only:
        worked = _worked(name, chosen, tokenizer, length)
        if not any(worked):
            raise ValueError(
                f"task {name}: none of the {len(chosen)} questions fits with its answer into the "
                f"{length} tokens that the model takes: choose another task"
            )
        return Questions(questions=chosen, worked=worked, **of_task)
    prompts = [prompt_of(name, question, examples, tokenizer) for question in chosen]
    return Questions(
        questions=chosen,
        prompts=prompts,
        worked=_worked(name, chosen, tokenizer, length),
        max_new_tokens=_longest_answer(
            name, prompts, len(examples), tokenizer, length, draw.max_new_tokens
        ),
        until=stop_texts(name, examples, tokenizer),
        **of_task,
    )


def _longest_answer(
    name: str,
    prompts: list[str],
    examples: int,
    tokenizer: Any,
    length: int,
    requested: int | None,
) -> int:
    """Return the length limit of answers, for which the longest prompt leaves room.

    Raises:
        ValueError: There is no room, or answers would never end.
    """
    longest = max(map(len, _prompt_ids(prompts, tokenizer)))
    if length - longest < _SHORTEST_ANSWER:
        what = f"question with its {examples} worked examples" if examples else "question"
        advice = "lower num_fewshot (--num-fewshot)" if examples else "choose another task"
        raise ValueError(
            f"task {name}: the longest {what} has {longest} tokens and the model takes {length}, "
            f"but an answer needs at least {_SHORTEST_ANSWER} more: {advice}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"task {name}: the tokenizer has no end-of-sequence token, so answers would never end: "
            "set tokenizer.eos_token"
        )
    if requested is not None and requested > length - longest:
        logger.warning(
            f"task {name}: answers have at most {length - longest} tokens instead of {requested}, "
            f"as the longest prompt has {longest} and the model takes {length}"
        )
    return min(requested or task_of(name).max_new_tokens, length - longest)


def _check_choice_lengths(
    name: str, pairs: list[list[tuple[str, str]]], tokenizer: Any, length: int
) -> None:
    texts = [context + choice for question in pairs for context, choice in question]
    longest = max(map(len, tokenizer(texts, verbose=False)["input_ids"]))
    if longest > length:
        raise ValueError(
            f"task {name}: the longest question with a choice has {longest} tokens, but the model "
            f"takes {length}: lower num_fewshot (--num-fewshot) if there are worked examples, or "
            "choose another task"
        )


def _worked(
    name: str, questions: list[Question], tokenizer: Any, length: int
) -> list[CalibrationExample | None]:
    """Tokenize questions with their worked answers; `None` for those longer than `length`.

    Raises:
        ValueError: The chat template leaves out the answers.
    """
    examples: list[CalibrationExample | None] = []
    check = RenderingCheck(name, tokenizer)
    for index, question in enumerate(questions):
        encoded = encode(question.conversation, tokenizer, length, last_only=True)
        check.add(encoded, index)
        fits = len(encoded.input_ids) <= length and bool(encoded.scored[1:].any())
        examples.append(
            CalibrationExample(
                encoded.input_ids, encoded.scored, "evaluation", index, question.digest
            )
            if fits
            else None
        )
    check.report()
    return examples


def _prompt_ids(prompts: list[str], tokenizer: Any) -> list[list[int]]:
    """Tokenize prompts; a chat template adds the special tokens itself."""
    if not prompts:
        return []  # tokenizers do not accept an empty list
    encoded = tokenizer(prompts, add_special_tokens=not is_chat(tokenizer), verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def check_tokens(jobs: Sequence[Job], tokenizer: Any, embeddings: int) -> None:
    """Check the tokens of all tasks before any of them is measured.

    Args:
        jobs: The prepared tasks.
        tokenizer: The tokenizer.
        embeddings: Number of embeddings of the model.

    Raises:
        ValueError: The tokenizer is not the model's.
    """
    sequences: list[Any] = []
    for job in jobs:
        if isinstance(job, Windows):
            sequences += job.windows
        elif isinstance(job, Choices):
            texts = [context + choice for pairs in job.pairs for context, choice in pairs]
            sequences += tokenizer(texts, verbose=False)["input_ids"]
        else:
            sequences += [example.input_ids for example in job.worked if example is not None]
            sequences += _prompt_ids(job.prompts, tokenizer)
    check_token_ids(tokenizer, sequences, embeddings)


def _windows(
    name: str, text: Text, source: dict[str, Any], tokenizer: Any, size: int, draw: Draw
) -> Windows:
    """Split a text into windows of `size` tokens; a shorter last one is dropped, as usual."""
    seen = [(start, stop) for start, stop, digest in text.passages if digest in draw.seen]
    if seen and not tokenizer.is_fast:
        raise ValueError(
            f"task {name}: leaving out the text that the model was calibrated on needs a fast "
            f"tokenizer, got {type(tokenizer).__name__}: pass a fast tokenizer"
        )
    encoding = tokenizer(text.text, verbose=False, return_offsets_mapping=bool(seen))
    ids = list(encoding["input_ids"])
    if len(ids) < 2:
        raise ValueError(
            f"task {name}: the text has {len(ids)} tokens, but at least 2 are needed: use another "
            "file"
        )
    starts = range(0, len(ids) - size + 1, size) if len(ids) >= size else range(1)
    remaining = list(starts)
    if seen:
        offsets = encoding["offset_mapping"]

        def unseen(start: int) -> bool:
            first, last = offsets[start][0], offsets[min(start + size, len(ids)) - 1][1]
            return not any(first < stop and begin < last for begin, stop in seen)

        remaining = [start for start in starts if unseen(start)]
    if not remaining:
        raise ValueError(
            f"task {name}: the model was calibrated on text in all {len(starts)} windows, so none "
            "is left to evaluate on: use another split or file"
        )
    windows = [ids[start : start + size] for start in remaining]
    chosen = draw.sample(windows, [tokens_digest(window) for window in windows])
    return Windows(name, chosen, len(starts) - len(remaining), size, source)


def _documents(name: str, documents: list[Document], tokenizer: Any, size: int) -> list[list[int]]:
    """Tokenize documents as in calibration, each truncated to `size` tokens."""
    windows = []
    for document in documents:
        conversation = Conversation((("text", document.text),))
        ids = encode(conversation, tokenizer, size).input_ids
        if len(ids) < 2:
            raise ValueError(
                f"task {name}: the document {document.text!r} has {len(ids)} tokens, but at least "
                "2 are needed: remove it from the file"
            )
        windows.append(ids.tolist())
    return windows


def tokens_digest(ids: list[int]) -> str:
    """Return the sha256 of token ids, which pairs the windows of two evaluations."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
