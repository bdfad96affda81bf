"""Calibration sets built from the dense model's own answers to the prompts of a data set."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from optimum_cap.config import ANSWER_FIELDS, CAPConfig
from optimum_cap.data import (
    CalibrationExample,
    CalibrationSet,
    Part,
    Prompt,
    PromptSource,
    check_token_ids,
    draw_prompts,
    mixed_set,
    usable_tokenizer,
)
from optimum_cap.generation.checking import can_be_checked, is_right
from optimum_cap.generation.sampler import AnswerSampler
from optimum_cap.generation.sampling import Answer
from optimum_cap.models import (
    is_offloaded,
    longest_sequence,
    number_of_embeddings,
)
from optimum_cap.runtime import (
    ProcessGroup,
    check_same_inputs,
    digest_of,
)

logger = logging.get_logger(__name__)

CheckPrompts = Callable[[list[CalibrationExample]], None]


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with an answer of the model.

    Attributes:
        prompt: The prompt.
        answer: The answer.
        text: Its text, without special tokens.
        correct: Whether its result matches the published one; `None` if unknown.
        attempts: Number of answers to this prompt, including this one.
    """

    prompt: Prompt
    answer: Answer
    text: str
    correct: bool | None
    attempts: int

    def example(self, scored_tokens: str) -> CalibrationExample:
        """Return prompt and answer as a calibration example with the generated tokens."""
        prompt = self.prompt.example
        answer = torch.tensor(self.answer.ids, dtype=torch.long)
        input_ids = torch.cat([prompt.input_ids, answer])
        first = 1 if scored_tokens == "all" else len(prompt.input_ids)
        scored = torch.arange(len(input_ids)) >= first
        return dataclasses.replace(prompt, input_ids=input_ids, scored=scored)


@dataclass(frozen=True)
class AnsweredPrompts:
    """The chosen answers, and the record of how they were generated.

    Attributes:
        chosen: For each data set, its answers in the order in which their prompts were drawn, or
            its plain texts as examples.
        record: Plain JSON values: settings, counts and a digest.
        limit: Longest example, in tokens.
    """

    chosen: list[tuple[PromptSource, list[AnsweredPrompt]] | Part]
    record: dict[str, Any]
    limit: int

    @property
    def answers(self) -> list[AnsweredPrompt]:
        """The answers of all data sets."""
        return [each for part in self.chosen if not isinstance(part, Part) for each in part[1]]


@dataclass(frozen=True)
class FirstPrompts:
    """The prompts to answer; more are drawn if some answers are empty.

    Attributes:
        parts: For each data set, its prompts with the source of further ones, or its plain texts as
            examples, which are used unchanged.
        limit: Longest example with its answer, in tokens.
    """

    parts: list[tuple[PromptSource, list[Prompt]] | Part]
    limit: int


def first_prompts(
    config: CAPConfig, tokenizer: Any, embeddings: int | None, max_length: int | None = None
) -> FirstPrompts:
    """Draw the prompts to answer, and check that there are enough and they can be tokenized.

    Args:
        config: The settings, with `answers="model"`.
        tokenizer: The model's tokenizer.
        embeddings: Number of embeddings of the model; `None` if unknown.
        max_length: Maximum number of tokens of the model.

    Raises:
        ValueError: The data or the tokenizer cannot be used, or there are too few prompts.
    """
    draw = draw_prompts(config, tokenizer, max_length=max_length)
    parts: list[tuple[PromptSource, list[Prompt]] | Part] = []
    ids = []
    for source in draw.sources:
        if isinstance(source, Part):
            parts.append(source)
            ids += [example.input_ids for example in source.examples]
            continue
        prompts = source.take(_wanted(source, config))
        if len(prompts) < source.count:
            raise _too_few(source, len(prompts), 0)
        parts.append((source, prompts))
        ids += [prompt.example.input_ids for prompt in prompts]
    if embeddings is not None:
        check_token_ids(tokenizer, ids, embeddings)
    return FirstPrompts(parts, draw.limit)


def answered_calibration_set(
    model: PreTrainedModel,
    tokenizer: Any,
    config: CAPConfig,
    process_group: ProcessGroup,
    check_prompts: CheckPrompts | None = None,
) -> CalibrationSet:
    """Build the calibration set of a config with `answers="model"`.

    Args:
        model: As for `answer_prompts`, like the other arguments.
        tokenizer: The model's tokenizer, or its processor.
        config: The settings.
        process_group: The processes that share the work; all of them get the same set.
        check_prompts: Called with the tokenized prompts before the first answer.

    Raises:
        ValueError: As for `answer_prompts`.
    """
    answered = answer_prompts(model, tokenizer, config, process_group, check_prompts)
    parts = []
    for part in answered.chosen:
        if not isinstance(part, Part):
            source, chosen = part
            examples = [each.example(config.scored_tokens) for each in chosen]
            part = Part(source.source, examples, {"too_long": source.too_long, "cut_answers": 0})
        parts.append(part)
    calibration = mixed_set(parts, config, answered.limit)
    record = {**calibration.record, "answers": answered.record}
    return dataclasses.replace(calibration, record=record)


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: Any,
    config: CAPConfig,
    process_group: ProcessGroup,
    check_prompts: CheckPrompts | None = None,
) -> AnsweredPrompts:
    """Let the model answer as many prompts as configured, and choose among the answers.

    Empty answers are never chosen; another prompt is answered instead.

    Args:
        model: The dense model; it is not changed.
        tokenizer: Its tokenizer, or its processor.
        config: The settings, with `answers="model"`.
        process_group: The processes that share the work; all of them get all answers.
        check_prompts: Called with the tokenized prompts before the first answer.

    Raises:
        ValueError: The data, the tokenizer or the model cannot be used, or too few prompts of the
            data sets get an answer.
        ConnectionError: Another process of the launch has stopped.
    """
    if not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} cannot generate text, so it cannot answer prompts: use "
            "answers 'dataset'"
        )
    tokenizer = usable_tokenizer(tokenizer)
    draw = first_prompts(config, tokenizer, number_of_embeddings(model), longest_sequence(model))
    examples = [
        prompt.example for part in draw.parts if not isinstance(part, Part) for prompt in part[1]
    ]
    check_same_inputs(
        process_group, model, examples, [getattr(config, name) for name in ANSWER_FIELDS]
    )
    if check_prompts is not None:
        check_prompts(examples)
    if is_offloaded(model):
        logger.warning(
            "weights of the model are offloaded, so each token of an answer loads them again: "
            "`cap generate` on a machine that holds the model makes a file of answers instead"
        )
    answering = _Answering(model, tokenizer, config, process_group)
    chosen = [
        part if isinstance(part, Part) else (part[0], answering.chosen(*part))
        for part in draw.parts
    ]
    return _with_record(chosen, answering, config, draw.limit)


@dataclass
class _Answering:
    """Answers prompts and counts the answers.

    Attributes:
        prompts: Number of prompts answered.
        empty: Number of them whose answers were all empty.
        generated: Number of answers.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: CAPConfig
    process_group: ProcessGroup
    prompts: int = 0
    empty: int = 0
    generated: int = 0
    _sampler: AnswerSampler = field(init=False)

    def __post_init__(self) -> None:
        self._sampler = AnswerSampler.of(
            self.model, self.tokenizer, self.config, self.process_group
        )

    def chosen(self, source: PromptSource, prompts: list[Prompt]) -> list[AnsweredPrompt]:
        """Answer prompts until there are enough nonempty answers, and choose among them.

        Args:
            source: Where to draw further prompts from.
            prompts: The first prompts.

        Raises:
            ValueError: There are too few.
        """
        wanted, answered = _wanted(source, self.config), []
        empty = self.empty
        while prompts:
            answered += self._answer(prompts)
            prompts = source.take(wanted - len(answered))
        if len(answered) < source.count:
            raise _too_few(source, len(answered), self.empty - empty)
        return _select(answered, source.count, self.config.answer_selection)

    def _answer(self, prompts: list[Prompt]) -> list[AnsweredPrompt]:
        """Return one answer to each prompt, except where all attempts are empty.

        A prompt is answered again while its answer is wrong or empty.
        """
        best: dict[int, AnsweredPrompt] = {}
        pending = list(range(len(prompts)))
        for attempt in range(self.config.answer_attempts):
            examples = [prompts[position].example for position in pending]
            answers = self._sampler.sample(examples, attempt)
            self.generated += len(answers)
            again = []
            for position, answer in zip(pending, answers, strict=True):
                answered = self._checked(prompts[position], answer, attempt + 1)
                if answered is not None and _is_better(answered, best.get(position)):
                    best[position] = answered
                if answered is None or answered.correct is False:
                    again.append(position)
            pending = again
            if not pending:
                break
        self.prompts += len(prompts)
        self.empty += len(prompts) - len(best)
        return [best[position] for position in sorted(best)]

    def _checked(self, prompt: Prompt, answer: Answer, attempts: int) -> AnsweredPrompt | None:
        """Return a prompt with its answer; `None` if that is empty."""
        text: str = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
        if not text.strip():
            return None
        if answer.finished:
            correct = is_right(prompt, text)
        else:  # a cut-off answer has no result, wherever its last number comes from
            correct = False if can_be_checked(prompt) else None
        return AnsweredPrompt(prompt, answer, text, correct, attempts)


def _is_better(answered: AnsweredPrompt, other: AnsweredPrompt | None) -> bool:
    """Return whether a later answer to a prompt replaces an earlier one."""
    if other is None or answered.correct:
        return True
    return answered.answer.finished and not other.answer.finished


def _wanted(source: PromptSource, config: CAPConfig) -> int:
    """Return how many prompts of a data set to answer; `source.count` of them are chosen."""
    candidates = config.answer_candidates
    if candidates is None:
        candidates = config.num_samples * (2 if config.answer_selection == "hard" else 1)
    return -(-candidates * source.count // config.num_samples)


def _select(answered: list[AnsweredPrompt], count: int, how: str) -> list[AnsweredPrompt]:
    """Choose answers, in the order in which their prompts were drawn.

    Args:
        answered: The answers.
        count: How many to choose.
        how: As in `CAPConfig.answer_selection`.
    """
    middle = median(len(each.answer.ids) for each in answered)

    def key(each: AnsweredPrompt) -> tuple[float, ...]:
        wrong = {True: 0, None: 1, False: 2}[each.correct]
        if how == "right":
            return (wrong,)
        failed = each.attempts - 1 if each.correct else 0
        return wrong, -failed, abs(len(each.answer.ids) - middle)

    best = sorted(range(len(answered)), key=lambda position: key(answered[position]))[:count]
    return [answered[position] for position in sorted(best)]


def _with_record(
    chosen: list[tuple[PromptSource, list[AnsweredPrompt]] | Part],
    answering: _Answering,
    config: CAPConfig,
    limit: int,
) -> AnsweredPrompts:
    """Record how answers were generated, and log statistics on their quality."""
    result = AnsweredPrompts(chosen, {}, limit)
    answers = result.answers
    lengths = [len(each.answer.ids) for each in answers]
    record = {
        "of": "model",
        **{name: getattr(config, name) for name in ANSWER_FIELDS},
        "prompts": answering.prompts,
        "generated": answering.generated,
        "empty": answering.empty,
        "used": len(answers),
        "right": sum(each.correct is True for each in answers),
        "wrong": sum(each.correct is False for each in answers),
        "unchecked": sum(each.correct is None for each in answers),
        "truncated": sum(not each.answer.finished for each in answers),
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "sha256": digest_of([list(each.answer.ids) for each in answers]),
    }
    logger.info(
        f"calibrating on {record['used']} answers of the model ({record['mean_tokens']} tokens on "
        f"average): {record['right']} right, {record['wrong']} wrong, {record['unchecked']} "
        f"unchecked, {record['truncated']} cut off at {config.max_new_tokens} tokens"
    )
    if record["truncated"] > len(answers) / 2:
        logger.warning(
            f"{record['truncated']} of {len(answers)} answers of the model were cut off at "
            f"{config.max_new_tokens} tokens: raise max_new_tokens to calibrate on whole ones"
        )
    return dataclasses.replace(result, record=record)


def _too_few(source: PromptSource, usable: int, empty: int) -> ValueError:
    reasons = []
    if source.too_long:
        reasons.append(f"{source.too_long} are longer than {source.longest} tokens")
    if empty:
        reasons.append(f"the model's answers to {empty} are empty")
    reason = f" ({', '.join(reasons)})" if reasons else ""
    return ValueError(
        f"data set {source.source.name!r} has {usable} usable prompts of "
        f"{len(source.source.rows)} rows{reason}, but {source.count} are needed: lower num_samples"
        + (", lower max_new_tokens or raise max_length" if source.too_long else "")
    )
