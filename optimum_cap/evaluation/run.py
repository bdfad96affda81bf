"""Accuracy and perplexity of a model, dense or pruned, with lm-evaluation-harness as the engine.

`evaluate` follows the data flow: tasks, model, exclusions, responses or losses, results.
"""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from optimum_cap.data import (
    CalibrationExample,
    Conversation,
    RenderingCheck,
    check_token_ids,
    encode,
    load_tokenizer,
    render_prompt,
    usable_tokenizer,
)
from optimum_cap.evaluation.harness import (
    Questions,
    harness_model,
    harness_task,
    import_harness,
    quiet_harness,
    token_log_likelihoods,
)
from optimum_cap.evaluation.results import (
    AccuracyResult,
    Answer,
    Evaluation,
    LossResult,
    PerplexityResult,
    TaskResult,
    Window,
    WorkedAnswer,
)
from optimum_cap.evaluation.tasks import (
    DEFAULT_TASKS,
    TASKS,
    Document,
    Question,
    Text,
    extract_of,
    load_items,
    resolve_tasks,
)
from optimum_cap.models import (
    device_of,
    evaluation_mode,
    float32_on_cpu,
    number_of_embeddings,
)
from optimum_cap.scoring import example_losses

_LONGEST_WINDOW = 2048  # tokens; as in papers on pruning and quantization
_SHORTEST_ANSWER = 16  # tokens that must remain for an answer after the longest question
_VERSIONED = ("optimum-cap", "lm-eval", "torch", "transformers")

TaskData = dict[str, tuple[Any, dict[str, Any]]]
_T = TypeVar("_T")


def load_task_data(tasks: str | Iterable[str], data_dir: str | Path | None = None) -> TaskData:
    """Read the data of tasks, so that bad data is reported before a model is loaded.

    Args:
        tasks: Names of tasks or groups, as a list or as comma-separated text.
        data_dir: Folder with the files of the data sets; `None` downloads them from the Hub.

    Returns:
        Per task, its questions or texts and their source.

    Raises:
        ValueError: A task is unknown, or its data cannot be used.
        FileNotFoundError: A file does not exist; the message names the paths that were tried.
        ImportError: lm-evaluation-harness is not installed.
    """
    names = resolve_tasks(tasks)
    import_harness("lm_eval")
    folder = None if data_dir is None else Path(data_dir)
    return {name: load_items(name, folder) for name in names}


def check_counts(limit: int | None, batch_size: int) -> None:
    """Raise a `ValueError` if `limit` or `batch_size` is not a positive integer."""
    for label, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{label} must be an integer of at least 1, got {value!r}")


def evaluate(
    model: PreTrainedModel | str | Path,
    tokenizer: Any = None,
    *,
    tasks: str | Iterable[str] = DEFAULT_TASKS,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    data: TaskData | None = None,
    **load_options: Any,
) -> Evaluation:
    """Measure accuracy on questions with worked answers, and perplexity on texts.

    Questions are asked zero-shot, with the same prompt as in calibration (the tokenizer's chat
    template if it has one). Decoding is greedy. Items that a pruned model was calibrated on
    (`model.pruning_record`) are left out.

    Args:
        model: A causal language model, or the name of one. It is not changed.
        tokenizer: The tokenizer or processor; `None` loads the one saved with the model.
        tasks: Names of tasks or groups, as a list or as comma-separated text.
        data_dir: Folder with the files of the data sets; `None` downloads them from the Hub.
        limit: Number of questions, or windows of text, per task; `None` takes all. The same
            `seed` draws the same ones for every model, apart from those that are left out.
        batch_size: Questions per batch. Windows are batched up to 2048 tokens.
        seed: Seed for drawing `limit` items.
        data: The result of `load_task_data`; replaces `tasks` and `data_dir`.
        **load_options: Passed to `from_pretrained` if `model` is a name: `dtype`, `revision`, ...

    Returns:
        Accuracies as fractions of 1, losses in nats. A perplexity that is not finite is `None`,
        with an entry in `errors`; the other tasks keep their results.

    Raises:
        ValueError: A task is unknown, its data cannot be used or is all in the calibration set, a
            question leaves no room for an answer, the chat template leaves out the answers, the
            tokenizer is not the model's, or a number is out of range.
        TypeError: `tokenizer` is no tokenizer.
        FileNotFoundError: A file does not exist.
        ImportError: lm-evaluation-harness is not installed.
    """
    check_counts(limit, batch_size)
    data = load_task_data(tasks, data_dir) if data is None else data
    start = time.monotonic()
    model, tokenizer = _loaded(model, tokenizer, load_options)
    length = _length(model, tokenizer)
    draw = _Draw(_calibration_digests(model), limit, seed)
    with float32_on_cpu(model), evaluation_mode(model), _greedy(model), quiet_harness():
        jobs = {name: _prepare(name, *data[name], tokenizer, length, draw) for name in data}
        _check_token_ids(jobs, tokenizer, model)
        jobs = {name: _with_answer_losses(model, job) for name, job in jobs.items()}
        lm = harness_model(model, tokenizer, length, batch_size)
        asked = {n: job for n, job in jobs.items() if isinstance(job, Questions)}
        results = _answer(lm, {n: job for n, job in asked.items() if not TASKS[n].loss_only})
        results |= {n: _answer_losses(job) for n, job in asked.items() if TASKS[n].loss_only}
        results |= {n: _score(lm, job) for n, job in jobs.items() if isinstance(job, _Windows)}
    return Evaluation(
        model=model.name_or_path or type(model).__name__,
        tasks={name: results[name] for name in jobs},
        settings={
            "seed": seed,
            "limit": limit,
            "batch_size": batch_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device_of(model).type,
            "chat_template": bool(getattr(tokenizer, "chat_template", None)),
            "calibration_digests": len(draw.seen),
        },
        versions={name: importlib.metadata.version(name) for name in _VERSIONED},
        seconds=time.monotonic() - start,
    )


def _loaded(
    model: PreTrainedModel | str | Path, tokenizer: Any, options: dict[str, Any]
) -> tuple[PreTrainedModel, Any]:
    if isinstance(model, str | Path):
        loaded = AutoModelForCausalLM.from_pretrained(model, **options)
    elif options:
        raise ValueError(
            f"{', '.join(options)} need the name of a model to load, got a loaded "
            f"{type(model).__name__}: leave them out"
        )
    else:
        loaded = model
    if tokenizer is None:
        shared = ("revision", "token", "trust_remote_code")
        tokenizer_options = {name: options[name] for name in shared if name in options}
        tokenizer = load_tokenizer(loaded.name_or_path, **tokenizer_options)
    return loaded, usable_tokenizer(tokenizer)


def _length(model: PreTrainedModel, tokenizer: Any) -> int:
    """Return the maximum number of tokens of model and tokenizer; 2048 if neither has a limit."""
    config = model.config.get_text_config(decoder=True)
    position_limit = getattr(config, "max_position_embeddings", None)
    # Tokenizers without a limit report an extremely large one.
    token_limit = min(getattr(tokenizer, "model_max_length", None) or 10**12, 10**12)
    limit = min(position_limit or 10**12, token_limit)
    return _LONGEST_WINDOW if limit >= 10**12 else int(limit)


# Questions and windows


@dataclass(frozen=True)
class _Draw:
    """Which items are evaluated: a sample of those that the model was not calibrated on."""

    seen: frozenset[str]
    limit: int | None
    seed: int

    def sample(self, items: Sequence[_T], digests: Sequence[str]) -> list[_T]:
        """Return `limit` of the items, in their order.

        Items are drawn in the order of a hash, so leaving an item out replaces that item only, and
        two models have as many items in common as possible.
        """
        if self.limit is None or self.limit >= len(items):
            return list(items)
        ranks = [hashlib.sha256(f"{self.seed} {digest}".encode()).digest() for digest in digests]
        chosen = sorted(sorted(range(len(items)), key=ranks.__getitem__)[: self.limit])
        return [items[index] for index in chosen]


@dataclass(frozen=True)
class _Windows:
    windows: list[list[int]]
    excluded: int
    size: int
    source: dict[str, Any]


def _calibration_digests(model: PreTrainedModel) -> frozenset[str]:
    record = getattr(model, "pruning_record", None)
    # A criterion that needs no data leaves the calibration record empty.
    return frozenset(record.calibration.get("digests", ()) if record is not None else ())


def _prepare(
    name: str,
    items: Any,
    source: dict[str, Any],
    tokenizer: Any,
    length: int,
    draw: _Draw,
) -> "Questions | _Windows":
    if isinstance(items, Text):
        return _windows(name, items, source, tokenizer, min(_LONGEST_WINDOW, length), draw)
    unseen = [item for item in items if item.digest not in draw.seen]
    if not unseen:
        noun = "documents" if TASKS[name].documents else "questions"
        raise ValueError(
            f"task {name}: the model was calibrated on all {len(items)} {noun}, so none is left to "
            "evaluate on: use another split or file"
        )
    chosen = draw.sample(unseen, [item.digest for item in unseen])
    excluded = len(items) - len(unseen)
    if TASKS[name].documents:
        size = min(_LONGEST_WINDOW, length)
        return _Windows(_documents(name, chosen, tokenizer, size), excluded, size, source)
    questions: list[Question] = chosen
    if TASKS[name].loss_only:
        return _worked_answers(name, questions, source, tokenizer, length, excluded)
    prompts = [render_prompt(question.conversation, tokenizer) for question in questions]
    longest = max(map(len, _prompt_ids(prompts, tokenizer)))
    if length - longest < _SHORTEST_ANSWER:
        raise ValueError(
            f"task {name}: the longest question has {longest} tokens and the model takes {length}, "
            f"but an answer needs at least {_SHORTEST_ANSWER} more: choose another task"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"task {name}: the tokenizer has no end-of-sequence token, so answers would never end: "
            "set tokenizer.eos_token"
        )
    max_new_tokens = min(TASKS[name].max_new_tokens, length - longest)
    examples = _examples(name, questions, tokenizer, length)
    losses: list[float | None] = [None] * len(questions)
    return Questions(name, questions, prompts, examples, losses, excluded, max_new_tokens, source)


def _worked_answers(
    name: str,
    questions: list[Question],
    source: dict[str, Any],
    tokenizer: Any,
    length: int,
    excluded: int,
) -> Questions:
    """Return the questions of a task that measures the loss on their worked answers alone."""
    examples = _examples(name, questions, tokenizer, length)
    if not any(examples):
        raise ValueError(
            f"task {name}: none of the {len(questions)} questions fits with its answer into the "
            f"{length} tokens that the model takes: choose another task"
        )
    losses: list[float | None] = [None] * len(questions)
    return Questions(name, questions, [], examples, losses, excluded, 0, source)


def _examples(
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
    """Tokenize prompts; a chat template prints the special tokens itself."""
    special = not getattr(tokenizer, "chat_template", None)
    if not prompts:
        return []  # a tokenizer takes no empty list
    encoded = tokenizer(prompts, add_special_tokens=special, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _check_token_ids(
    jobs: "dict[str, Questions | _Windows]", tokenizer: Any, model: PreTrainedModel
) -> None:
    """Check the tokens of all tasks before any of them is measured."""
    sequences: list[Any] = []
    for job in jobs.values():
        if isinstance(job, _Windows):
            sequences += job.windows
        else:
            sequences += [example.input_ids for example in job.examples if example is not None]
            sequences += _prompt_ids(job.prompts, tokenizer)
    check_token_ids(tokenizer, sequences, number_of_embeddings(model))


def _with_answer_losses(
    model: PreTrainedModel, job: "Questions | _Windows"
) -> "Questions | _Windows":
    """Measure the mean loss over the tokens of each worked answer, in nats."""
    if isinstance(job, _Windows):
        return job
    losses = list(job.losses)
    found = [(index, example) for index, example in enumerate(job.examples) if example is not None]
    if found:
        measured = example_losses(model, [example for _, example in found])
        for (index, _), loss in zip(found, measured, strict=True):
            losses[index] = float(loss) if loss.isfinite() else None
    return replace(job, losses=losses)


def _windows(
    name: str, text: Text, source: dict[str, Any], tokenizer: Any, size: int, draw: _Draw
) -> _Windows:
    """Split a text into windows of `size` tokens; a shorter rest is dropped, as is usual."""
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
    chosen = draw.sample(windows, [_tokens_digest(window) for window in windows])
    return _Windows(chosen, len(starts) - len(remaining), size, source)


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


def _tokens_digest(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _answer_losses(job: Questions) -> LossResult:
    """Return the losses on the worked answers that the model can take whole."""
    items = tuple(
        WorkedAnswer(question.digest, loss)
        for question, example, loss in zip(job.questions, job.examples, job.losses, strict=True)
        if example is not None
    )
    return LossResult(items, job.excluded, len(job.questions) - len(items), job.source)


def _answer(lm: Any, jobs: dict[str, Questions]) -> dict[str, TaskResult]:
    """Generate the responses to all questions, batched by length across tasks."""
    if not jobs:
        return {}
    manager = import_harness("lm_eval.tasks").TaskManager(include_defaults=False)
    loaded = manager.load([harness_task(job) for job in jobs.values()])
    # Not `simple_evaluate`, which seeds the caller's generators and runs git in the current folder.
    evaluated = import_harness("lm_eval").evaluate(lm, loaded, bootstrap_iters=0)
    return {
        name: AccuracyResult(
            tuple(
                _graded(job, sample["doc_id"], sample["resps"][0][0])
                for sample in sorted(
                    evaluated["samples"][name], key=lambda sample: sample["doc_id"]
                )
            ),
            job.excluded,
            job.max_new_tokens,
            job.source,
        )
        for name, job in jobs.items()
    }


def _graded(job: Questions, position: int, response: str) -> Answer:
    question = job.questions[position]
    answer = extract_of(job.name)(response)
    expected = extract_of(job.name)(question.answer)
    fallback = TASKS[job.name].fallback
    return Answer(
        question.digest,
        answer == expected,
        answer,
        None if fallback is None else fallback(response) == expected,
        job.losses[position],
    )


def _score(lm: Any, job: _Windows) -> PerplexityResult:
    """Measure the loss on every window, predicting all tokens but the first.

    The perplexity tasks of the harness predict the first token too, so this calls its
    log-likelihood of tokens instead.
    """
    requests = [(None, window[:1], window[1:]) for window in job.windows]
    per_batch = max(1, _LONGEST_WINDOW // job.size)
    lm.batch_size_per_gpu, before = per_batch, lm.batch_size_per_gpu
    try:
        scored = token_log_likelihoods(lm, requests)
    finally:
        lm.batch_size_per_gpu = before
    items = []
    for window, (log_likelihood, _) in zip(job.windows, scored, strict=True):
        finite = bool(torch.isfinite(torch.tensor(log_likelihood)))
        nll = -log_likelihood if finite else None
        items.append(Window(_tokens_digest(window), nll, len(window) - 1))
    return PerplexityResult(tuple(items), job.excluded, job.size, job.source)


@contextmanager
def _greedy(model: PreTrainedModel) -> Iterator[None]:
    """Generate greedily, ignoring the checkpoint's settings for sampling, penalties and lengths."""
    original = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(original, name) for name in names})
    try:
        yield
    finally:
        model.generation_config = original
