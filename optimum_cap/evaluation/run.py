"""Accuracy and perplexity of a model, dense or pruned, with lm-evaluation-harness as the engine.

`evaluate` reads like the way of the data: tasks, model, exclusions, responses or losses, results.
"""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from optimum_cap.data import SEPARATOR, CalibrationExample, Conversation, chat_template, encode
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
    PerplexityResult,
    Window,
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
from optimum_cap.models import device_of, evaluation_mode, float32_on_cpu
from optimum_cap.scoring import example_losses

_LONGEST_WINDOW = 2048  # tokens; as in the papers on pruning and quantization
_LEAST_ANSWER = 16  # tokens that must be left for an answer after the longest question
_VERSIONED = ("optimum-cap", "lm-eval", "torch", "transformers")

TaskData = dict[str, tuple[Any, dict[str, Any]]]
_T = TypeVar("_T")


def load_task_data(tasks: str | Iterable[str], data_dir: str | Path | None = None) -> TaskData:
    """Read the data of tasks, so that what is wrong with them shows before a model is loaded.

    Args:
        tasks: Names of tasks or groups; a text may hold several, separated by commas.
        data_dir: Folder that holds the files of the data sets; `None` takes them from the Hub.

    Returns:
        Questions or texts, and where they are from, per task.

    Raises:
        ValueError: An unknown task, or data that cannot be used.
        FileNotFoundError: A file that does not exist; the message says where it was looked for.
        ImportError: lm-evaluation-harness is not installed.
    """
    names = resolve_tasks(tasks)
    import_harness("lm_eval")
    folder = None if data_dir is None else Path(data_dir)
    return {name: load_items(name, folder) for name in names}


def check_counts(limit: int | None, batch_size: int) -> None:
    """Raise a `ValueError` for a count that `evaluate` cannot take."""
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
    """Measure accuracy with worked answers, and perplexity.

    A question is put without examples, through the tokenizer's chat template where there is one,
    with the same prompt as in calibration. Decoding is greedy. What a pruned model was calibrated
    on (`model.pruning_record`) is left out.

    Args:
        model: A causal language model, or the name of one. It is left as it was.
        tokenizer: Its tokenizer; `None` loads the one that is saved with the model.
        tasks: Names of tasks or groups; a text may hold several, separated by commas.
        data_dir: Folder that holds the files of the data sets; `None` takes them from the Hub.
        limit: Number of questions, or windows of text, per task; `None` takes all. The same
            `seed` draws the same ones for every model, as far as they are not left out.
        batch_size: Questions answered at a time. Windows are batched up to 2048 tokens.
        seed: Seed of the draw.
        data: What `load_task_data` returned; replaces `tasks` and `data_dir`.
        **load_options: For `from_pretrained`, if `model` is a name: `dtype`, `revision`, ...

    Returns:
        Accuracies in fractions of 1, losses in nats. A perplexity that is not finite is `None`,
        with an entry in `errors`; the other tasks keep their results.

    Raises:
        ValueError: An unknown task; data that cannot be used or are all in the calibration set; a
            question that leaves no room for an answer; a number out of range.
        FileNotFoundError: A file that does not exist.
        ImportError: lm-evaluation-harness is not installed.
    """
    check_counts(limit, batch_size)
    data = load_task_data(tasks, data_dir) if data is None else data
    start = time.monotonic()
    model, tokenizer = _loaded(model, tokenizer, load_options)
    length = _length(model, tokenizer)
    draw = _Draw(_calibration_digests(model), limit, seed)
    with float32_on_cpu(model), evaluation_mode(model), _greedy(model), quiet_harness():
        work = {name: _prepare(name, *data[name], model, tokenizer, length, draw) for name in data}
        lm = harness_model(model, tokenizer, length, batch_size)
        results = _answer(lm, {n: job for n, job in work.items() if isinstance(job, Questions)})
        results |= {n: _score(lm, job) for n, job in work.items() if isinstance(job, _Windows)}
    return Evaluation(
        model=model.name_or_path or type(model).__name__,
        tasks={name: results[name] for name in work},
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
            f"{', '.join(options)} are for loading a model by its name, got a "
            f"{type(model).__name__} that is loaded"
        )
    else:
        loaded = model
    if tokenizer is None:
        shared = ("revision", "token", "trust_remote_code")
        found = {name: options[name] for name in shared if name in options}
        tokenizer = AutoTokenizer.from_pretrained(loaded.name_or_path, **found)
    return loaded, tokenizer


def _length(model: PreTrainedModel, tokenizer: Any) -> int:
    """Return how many tokens model and tokenizer take; without any limit, the longest window."""
    config = model.config.get_text_config(decoder=True)
    position_limit = getattr(config, "max_position_embeddings", None)
    # Tokenizers without a limit claim an astronomical one.
    token_limit = min(getattr(tokenizer, "model_max_length", None) or 10**12, 10**12)
    limit = min(position_limit or 10**12, token_limit)
    return _LONGEST_WINDOW if limit >= 10**12 else int(limit)


# What is asked


@dataclass(frozen=True)
class _Draw:
    """Which items are evaluated: those that calibration has not seen, and of these a sample."""

    seen: frozenset[str]
    limit: int | None
    seed: int

    def sample(self, items: Sequence[_T], digests: Sequence[str]) -> list[_T]:
        """Keep `limit` items, in their order.

        The order of the draw is that of a hash, so that leaving an item out replaces one item and
        moves no other: what two models share stays as large as it can be.
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
    # A criterion that looks at no data leaves no calibration record.
    return frozenset(record.calibration.get("digests", ()) if record is not None else ())


def _prepare(
    name: str,
    what: Any,
    source: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: Any,
    length: int,
    draw: _Draw,
) -> "Questions | _Windows":
    if isinstance(what, Text):
        return _windows(name, what, source, tokenizer, min(_LONGEST_WINDOW, length), draw)
    unseen = [item for item in what if item.digest not in draw.seen]
    if not unseen:
        what_kind = "documents" if TASKS[name].documents else "questions"
        raise ValueError(
            f"task {name}: the model was calibrated on all {len(what)} {what_kind}, so none is "
            "left to evaluate on: use another split or file"
        )
    chosen = draw.sample(unseen, [item.digest for item in unseen])
    excluded = len(what) - len(unseen)
    if TASKS[name].documents:
        size = min(_LONGEST_WINDOW, length)
        return _Windows(_documents(name, chosen, tokenizer, size), excluded, size, source)
    questions: list[Question] = chosen
    prompts = [render_prompt(question.prompt, tokenizer) for question in questions]
    special = not getattr(tokenizer, "chat_template", None)
    encoded = tokenizer(prompts, add_special_tokens=special, verbose=False)["input_ids"]
    longest = max(map(len, encoded))
    if length - longest < _LEAST_ANSWER:
        raise ValueError(
            f"task {name}: the longest question takes {longest} tokens of the {length} that the "
            f"model takes; an answer needs at least {_LEAST_ANSWER} more: choose another task"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"task {name}: the tokenizer has no end-of-sequence token, so an answer would never "
            "end: set tokenizer.eos_token"
        )
    room = min(TASKS[name].max_new_tokens, length - longest)
    losses = _answer_losses(model, tokenizer, questions, length)
    return Questions(name, questions, prompts, losses, excluded, room, source)


def _answer_losses(
    model: PreTrainedModel, tokenizer: Any, questions: list[Question], length: int
) -> list[float | None]:
    """Mean loss over the tokens of each worked answer; `None` where there is none."""
    losses: list[float | None] = [None] * len(questions)
    examples, positions = [], []
    for position, question in enumerate(questions):
        turns = (("user", question.prompt), ("assistant", question.answer))
        input_ids, scored = encode(Conversation(turns), tokenizer, length)
        if len(input_ids) <= length:
            examples.append(
                CalibrationExample(input_ids, scored, "evaluation", position, question.digest)
            )
            positions.append(position)
    if examples:
        for position, loss in zip(positions, example_losses(model, examples), strict=True):
            losses[position] = float(loss) if loss.isfinite() else None
    return losses


def render_prompt(prompt: str, tokenizer: Any) -> str:
    """Return the text that a response continues, as in calibration."""
    if not getattr(tokenizer, "chat_template", None):
        return prompt + SEPARATOR
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        chat_template=chat_template(tokenizer),
        add_generation_prompt=True,
        tokenize=False,
    )
    return rendered


def _windows(
    name: str, what: Text, source: dict[str, Any], tokenizer: Any, size: int, draw: _Draw
) -> _Windows:
    """Cut a text into windows of `size` tokens; a shorter rest is dropped, as in the field."""
    seen = [(start, stop) for start, stop, digest in what.passages if digest in draw.seen]
    if seen and not tokenizer.is_fast:
        raise ValueError(
            f"task {name}: leaving out what the model was calibrated on needs a fast tokenizer, "
            f"got {type(tokenizer).__name__}"
        )
    encoding = tokenizer(what.text, verbose=False, return_offsets_mapping=bool(seen))
    ids = list(encoding["input_ids"])
    if len(ids) < 2:
        raise ValueError(f"task {name}: the text has {len(ids)} tokens, at least 2 are needed")
    starts = range(0, len(ids) - size + 1, size) if len(ids) >= size else range(1)
    kept = list(starts)
    if seen:
        offsets = encoding["offset_mapping"]

        def unseen(start: int) -> bool:
            first, last = offsets[start][0], offsets[min(start + size, len(ids)) - 1][1]
            return not any(first < stop and begin < last for begin, stop in seen)

        kept = [start for start in starts if unseen(start)]
    if not kept:
        raise ValueError(
            f"task {name}: the model was calibrated on text in all {len(starts)} windows, so none "
            "is left to evaluate on: use another split or file"
        )
    windows = [ids[start : start + size] for start in kept]
    chosen = draw.sample(windows, [_tokens_digest(window) for window in windows])
    return _Windows(chosen, len(starts) - len(kept), size, source)


def _documents(name: str, documents: list[Document], tokenizer: Any, size: int) -> list[list[int]]:
    """Tokenise documents as calibration does, each cut at `size` tokens."""
    windows = []
    for document in documents:
        ids, _ = encode(Conversation((("text", document.text),)), tokenizer, size)
        if len(ids) < 2:
            raise ValueError(
                f"task {name}: the document {document.text!r} has {len(ids)} tokens, at least 2 "
                "are needed to predict one: remove it from the file"
            )
        windows.append(ids.tolist())
    return windows


def _tokens_digest(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _answer(lm: Any, jobs: dict[str, Questions]) -> "dict[str, AccuracyResult | PerplexityResult]":
    """Generate the responses to all questions, batched by length across tasks."""
    if not jobs:
        return {}
    manager = import_harness("lm_eval.tasks").TaskManager(include_defaults=False)
    loaded = manager.load([harness_task(job) for job in jobs.values()])
    # Not `simple_evaluate`: it seeds the caller's generators and runs git in the current folder.
    found = import_harness("lm_eval").evaluate(lm, loaded, bootstrap_iters=0)
    return {
        name: AccuracyResult(
            tuple(
                _graded(job, sample["doc_id"], sample["resps"][0][0])
                for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
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
    """Measure the loss on every window: its first token is given, the others are predicted.

    The harness's own perplexity tasks predict the first token too, so its scoring of tokens is
    called.
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
    """Generate greedily, whatever sampling, penalties or lengths the checkpoint asks for."""
    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(own, name) for name in names})
    try:
        yield
    finally:
        model.generation_config = own
