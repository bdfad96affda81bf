"""Measures prepared tasks batch by batch, with progress; finished batches can be stored."""

import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from optimum_cap.data import CalibrationExample
from optimum_cap.evaluation.harness import (
    HarnessTask,
    Response,
    generate_batch,
    harness_model,
    in_order_of_length,
    log_likelihoods,
    run_harness_task,
    token_log_likelihoods,
)
from optimum_cap.evaluation.prepare import (
    LONGEST_WINDOW,
    Choices,
    Job,
    Questions,
    Windows,
    tokens_digest,
)
from optimum_cap.evaluation.results import (
    LAYOUT,
    AccuracyResult,
    Answer,
    Choice,
    ChoiceResult,
    HarnessMetric,
    HarnessResult,
    LossResult,
    PerplexityResult,
    Result,
    Transcript,
    Window,
    WorkedAnswer,
)
from optimum_cap.evaluation.tasks import ChoiceQuestion, extract_of, task_of
from optimum_cap.progress import progress_bar
from optimum_cap.runtime import (
    JsonFiles,
    digest_of,
    examples_digest,
    machine,
    model_digest,
    resume_hint_on_stop,
)
from optimum_cap.scoring import example_losses

Samples = list[dict[str, Any]]

_TRANSCRIPTS = 3  # responses in a result, since another model may leave out some questions
_REFRESH = 1.0  # seconds between two updates of the number of tokens generated for a batch


class BatchStore:
    """Stores measurements of a model, by a digest of the batch and everything it depends on.

    Args:
        folder: Where to store them; several models and processes may share it.
        model: The model. Its weights are hashed once, here.
        batch_size: Sequences per batch.
    """

    def __init__(self, folder: str | Path, model: PreTrainedModel, batch_size: int) -> None:
        self.files = JsonFiles(Path(folder))
        version = importlib.metadata.version("lm-eval")
        subject = digest_of(LAYOUT, version, machine(model), model_digest(model), str(model.dtype))
        self._subject = f"evaluation/{subject[:32]}"
        self._batch_size = batch_size

    def get_or_measure(self, what: str, batch: Any, measure: Callable[[], Any]) -> Any:
        """Return the stored JSON value of a batch, or measure and store it.

        Args:
            what: Kind of measurement.
            batch: Everything that the value depends on besides the model.
            measure: Returns the value.
        """
        key = f"{self._subject}/{digest_of(what, batch, self._batch_size)[:32]}"
        if (value := self.files.read(key)) is None:
            value = measure()
            self.files.write(key, value)
        return value


@dataclass(frozen=True)
class Engine:
    """A model and the settings for measuring it.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        length: Longest sequence, in tokens.
        batch_size: Questions per batch.
        limit: Number of documents per harness task; `None` takes all.
        num_fewshot: Worked examples in harness tasks; `None` is each task's own number.
        store: Stores finished batches; `None` stores nothing.
    """

    model: PreTrainedModel
    tokenizer: Any
    length: int
    batch_size: int
    limit: int | None
    num_fewshot: int | None
    store: BatchStore | None

    def harness_model(self, plain: bool) -> Any:
        """Return the model wrapped for lm-evaluation-harness."""
        return harness_model(self.model, self.tokenizer, self.length, self.batch_size, plain)

    def batch(self, what: str, batch: Any, measure: Callable[[], Any]) -> Any:
        """Return the value of a batch, from the store if available."""
        if self.store is None:
            return measure()
        return self.store.get_or_measure(what, batch, measure)

    @contextmanager
    def progress(self, name: str, what: str, total: int) -> "Iterator[Progress]":
        """Show the progress of a task, and say how to resume if it is interrupted."""
        with progress_bar(total=total, desc=f"{name}: {what}", delay=2) as bar:
            progress = Progress(bar)
            with resume_hint_on_stop(
                lambda: f"stopped {name} after {progress.done} of {total} {what}", self.store
            ):
                yield progress


class Progress:
    """A progress bar that counts finished items even where bars are disabled."""

    def __init__(self, bar: Any) -> None:
        self.done = 0
        self._bar = bar

    def update(self, count: int) -> None:
        """Count finished items."""
        self.done += count
        self._bar.update(count)

    def show(self, text: str) -> None:
        """Show text after the bar."""
        self._bar.set_postfix_str(text)


def measure(engine: Engine, job: Job) -> tuple[Result, Samples]:
    """Measure a task.

    Returns:
        Its result, and the log entry of each item.
    """
    if isinstance(job, Questions):
        if task_of(job.name).loss_only:
            return _worked_answer_losses(engine, job)
        return _answer(engine, job)
    if isinstance(job, Choices):
        return _compare_choices(engine, job)
    return _score(engine, job), []


# Answers


def _answer(engine: Engine, job: Questions) -> tuple[AccuracyResult, Samples]:
    losses = _worked_losses(engine, job)
    responses, seconds = _responses(engine, job)
    answers = [
        _graded(job, position, response, loss)
        for position, (response, loss) in enumerate(zip(responses, losses, strict=True))
    ]
    samples = [
        {
            "digest": answer.digest,
            "prompt": prompt,
            "response": response.text,
            "answer": answer.answer,
            "expected": extract_of(job.name)(question.answer),
            "correct": answer.correct,
            "tokens": answer.tokens,
            "hit_limit": answer.hit_limit,
            "worked_answer": question.answer,
            "loss": answer.loss,
        }
        for answer, prompt, response, question in zip(
            answers, job.prompts, responses, job.questions, strict=True
        )
    ]
    result = AccuracyResult(
        tuple(answers),
        job.excluded,
        job.max_new_tokens,
        job.source,
        job.examples,
        job.examples_source,
        seconds,
        tuple(
            Transcript(question.digest, question.text, response.text)
            for question, response in zip(job.questions, responses, strict=True)
        )[:_TRANSCRIPTS],
    )
    return result, samples


def _worked_losses(engine: Engine, job: Questions) -> list[float | None]:
    """Return the mean loss over the tokens of each worked answer, in nats.

    `None` if it is not finite, or if the whole answer does not fit into the model's context.
    """
    losses: list[float | None] = [None] * len(job.worked)
    found = [(index, example) for index, example in enumerate(job.worked) if example is not None]
    found.sort(key=lambda pair: -len(pair[1].input_ids))
    with engine.progress(job.name, "losses", len(found)) as progress:
        for batch in _batches(found, engine.batch_size):
            examples = [example for _, example in batch]
            values = engine.batch(
                "losses",
                examples_digest(examples),
                partial(_losses, engine.model, examples),
            )
            for (index, _), value in zip(batch, values, strict=True):
                losses[index] = value
            progress.update(len(batch))
    return losses


def _worked_answer_losses(engine: Engine, job: Questions) -> tuple[LossResult, Samples]:
    """Measure the losses on the worked answers that fit into the model's context."""
    losses = _worked_losses(engine, job)
    measured = [
        (question, loss)
        for question, example, loss in zip(job.questions, job.worked, losses, strict=True)
        if example is not None
    ]
    items = tuple(WorkedAnswer(question.digest, loss) for question, loss in measured)
    samples = [
        {"digest": question.digest, "worked_answer": question.answer, "loss": loss}
        for question, loss in measured
    ]
    too_long = len(job.questions) - len(items)
    return LossResult(items, job.excluded, too_long, job.source), samples


def _losses(model: PreTrainedModel, examples: list[CalibrationExample]) -> list[float | None]:
    return [_finite(float(loss)) for loss in example_losses(model, examples)]


def _responses(engine: Engine, job: Questions) -> tuple[list[Response], float]:
    """Generate a response to each question; return the responses and the time in seconds."""
    lm = engine.harness_model(plain=False)
    order = in_order_of_length(lm, job.prompts)
    responses: dict[int, Response] = {}
    total = 0.0
    with engine.progress(job.name, "answers", len(order)) as progress:
        for positions in _batches(order, engine.batch_size):
            prompts = [job.prompts[position] for position in positions]
            key = [prompts, list(job.until), job.max_new_tokens]

            def generate(prompts: list[str] = prompts) -> dict[str, Any]:
                start = time.monotonic()
                shown = _token_counter(progress, job.max_new_tokens)
                batch = generate_batch(lm, prompts, job.until, job.max_new_tokens, shown)
                seconds = time.monotonic() - start
                return {"seconds": seconds, "responses": [asdict(each) for each in batch]}

            value = engine.batch("responses", key, generate)
            total += value["seconds"]
            stored = [Response(**each) for each in value["responses"]]
            responses.update(zip(positions, stored, strict=True))
            progress.update(len(positions))
    return [responses[position] for position in range(len(order))], total


def _token_counter(progress: Progress, limit: int) -> Callable[[int], None]:
    """Return a function that shows how many tokens a batch has generated, once a second."""
    last = time.monotonic()

    def show(count: int) -> None:
        nonlocal last
        if time.monotonic() - last > _REFRESH:
            last = time.monotonic()
            progress.show(f"token {count} of at most {limit}")

    return show


def _graded(job: Questions, position: int, response: Response, loss: float | None) -> Answer:
    question = job.questions[position]
    answer = extract_of(job.name)(response.text)
    expected = extract_of(job.name)(question.answer)
    fallback = task_of(job.name).fallback
    return Answer(
        question.digest,
        answer == expected,
        answer,
        response.tokens,
        response.hit_limit,
        None if fallback is None else fallback(response.text) == expected,
        loss,
    )


# Choices


def _compare_choices(engine: Engine, job: Choices) -> tuple[ChoiceResult, Samples]:
    lm = engine.harness_model(plain=True)
    order = in_order_of_length(lm, [pairs[0][0] for pairs in job.pairs])
    values: dict[int, list[float | None]] = {}
    total = 0.0
    with engine.progress(job.name, "questions", len(order)) as progress:
        for positions in _batches(order, engine.batch_size):
            pairs = [pair for position in positions for pair in job.pairs[position]]

            def score(pairs: list[tuple[str, str]] = pairs) -> dict[str, Any]:
                start = time.monotonic()
                scored = [_finite(value) for value in log_likelihoods(lm, pairs)]
                return {"seconds": time.monotonic() - start, "values": scored}

            value = engine.batch("choices", [list(pair) for pair in pairs], score)
            total += value["seconds"]
            scored = iter(value["values"])
            for position in positions:
                values[position] = [next(scored) for _ in job.pairs[position]]
            progress.update(len(positions))
    items = [_chosen(question, values[position]) for position, question in enumerate(job.questions)]
    samples = [
        {
            "digest": item.digest,
            "prompt": pairs[0][0],
            "choices": list(question.choices),
            "log_likelihoods": list(item.log_likelihoods),
            "expected": item.gold,
            "chosen": item.chosen,
            "chosen_norm": item.chosen_norm,
            "correct": item.correct,
            "correct_norm": item.correct_norm,
        }
        for item, question, pairs in zip(items, job.questions, job.pairs, strict=True)
    ]
    result = ChoiceResult(
        tuple(items), job.excluded, job.source, job.examples, job.examples_source, total
    )
    return result, samples


def _chosen(question: ChoiceQuestion, values: Sequence[float | None]) -> Choice:
    """Choose as lm-evaluation-harness does, also per character."""
    chosen = chosen_norm = None
    finite = [value for value in values if value is not None]
    if len(finite) == len(values):
        per_character = [
            value / len(choice) for value, choice in zip(finite, question.choices, strict=True)
        ]
        chosen = finite.index(max(finite))
        chosen_norm = per_character.index(max(per_character))
    return Choice(question.digest, question.gold, tuple(values), chosen, chosen_norm)


# Windows


def _score(engine: Engine, job: Windows) -> PerplexityResult:
    """Measure the loss on every window, predicting all tokens but the first.

    The harness's perplexity tasks predict the first token too, so this calls its log-likelihood of
    tokens instead.
    """
    lm = engine.harness_model(plain=True)
    lm.batch_size_per_gpu = max(1, LONGEST_WINDOW // job.size)
    items = []
    with engine.progress(job.name, "windows", len(job.windows)) as progress:
        for windows in _batches(job.windows, lm.batch_size_per_gpu):

            def score(windows: Sequence[list[int]] = windows) -> list[float | None]:
                requests = [(None, window[:1], window[1:]) for window in windows]
                scored = token_log_likelihoods(lm, requests)
                return [_finite(value) for value, _ in scored]

            values = engine.batch("windows", [list(window) for window in windows], score)
            items += [
                Window(tokens_digest(window), None if value is None else -value, len(window) - 1)
                for window, value in zip(windows, values, strict=True)
            ]
            progress.update(len(windows))
    return PerplexityResult(tuple(items), job.excluded, job.size, job.source)


# Tasks of the harness


def measure_harness_task(engine: Engine, task: HarnessTask) -> tuple[HarnessResult, Samples]:
    """Let lm-evaluation-harness measure one of its tasks, and return what it reports."""

    def run() -> dict[str, Any]:
        lm = engine.harness_model(plain=True)
        start = time.monotonic()
        report = run_harness_task(lm, task, engine.limit, engine.num_fewshot)
        samples = [
            {"harness_task": name, **sample}
            for name, logged in report.get("samples", {}).items()
            for sample in logged
        ]
        # Samples may hold values of any type, and NaN.
        logged = json.dumps(samples, default=str)
        return {"result": _reported(report, time.monotonic() - start), "samples": logged}

    key = [task.name, task.digest, engine.limit, engine.num_fewshot]
    stored = engine.batch("lm_eval", key, run)
    return HarnessResult.from_dict(stored["result"]), json.loads(stored["samples"])


def _reported(report: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Return the result in a harness report as JSON values."""
    items = [
        metric
        for name, values in {**report["results"], **report.get("groups", {})}.items()
        for metric in _harness_metrics(
            name, values, report["n-samples"].get(name, {}).get("effective")
        )
    ]
    examples = {name: count for name, count in report["n-shot"].items() if isinstance(count, int)}
    versions = {name: str(version) for name, version in report["versions"].items()}
    return HarnessResult(tuple(items), examples, versions, seconds).to_dict()


def _harness_metrics(
    name: str, values: Mapping[str, Any], count: int | None
) -> Iterator[HarnessMetric]:
    for metric, value in values.items():
        kind, comma, chosen = metric.partition(",")
        if not comma or kind.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{kind}_stderr,{chosen}")
        stderr = float(error) if isinstance(error, int | float) else None
        yield HarnessMetric(name, metric, _finite(value), stderr and _finite(stderr), count)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
