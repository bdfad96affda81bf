"""Results of an evaluation: items, metrics, JSON and a table. Does not import torch."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, ClassVar

from optimum_cap.text import aligned

LAYOUT = 2
"""Version of the JSON file and of the measurements; other versions raise an error."""
MANY_WITHOUT_ANSWER = 0.5
"""Share of responses without an answer from which the accuracy is no longer informative."""
_Z = 1.959964  # 97.5 % quantile of the normal distribution
# Two-sided 95 % quantiles of Student's t by degrees of freedom (from a standard table).
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_T_MORE = 1.96


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927), within 0 and 1."""
    share = right / total
    centre = (share + _Z**2 / (2 * total)) / (1 + _Z**2 / total)
    spread = share * (1 - share) / total + _Z**2 / (4 * total**2)
    half = _Z * math.sqrt(spread) / (1 + _Z**2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % interval (Student's t).

    Args:
        values: One value per seed or answer, at least one.

    Returns:
        The mean and the half width; the latter is `None` for a single value.
    """
    if len(values) == 1:
        return values[0], None
    freedom = len(values) - 1
    quantile = _T[freedom - 1] if freedom <= len(_T) else _T_MORE
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


def median_and_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Return the median and its 95 % interval, which assumes no distribution.

    The interval lies between two of the sorted values, by the binomial distribution of the number
    of values below the median. `None` if there are fewer than 6 values.
    """
    count, below = len(values), -1
    outcomes = 1  # of 2**count, where at most `below + 1` values are smaller than the median
    while 40 * outcomes <= 2**count:
        below += 1
        outcomes += math.comb(count, below + 1)
    interval = None
    if below >= 0:
        ordered = sorted(values)
        interval = (float(ordered[below]), float(ordered[-1 - below]))
    return float(median(values)), interval


@dataclass(frozen=True)
class Answer:
    """The graded answer to one question.

    Attributes:
        digest: `row_digest` of the question and its worked answer.
        correct: Whether the final answer is right.
        answer: The final answer extracted from the response; `None` if the response has no marker
            `####` with an answer after it, which counts as wrong.
        tokens: Length of the response in tokens, without the end-of-sequence token.
        hit_limit: Whether the response was cut off at the limit of its length.
        fallback: Whether the answer is right by the task's lenient extraction; `None` if the task
            has none.
        loss: Mean loss over the tokens of the published worked answer, in nats; `None` if it is not
            finite or the answer does not fit into the model's context.
    """

    digest: str
    correct: bool
    answer: str | None
    tokens: int
    hit_limit: bool
    fallback: bool | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Transcript:
    """A question and a model's response.

    Attributes:
        digest: `row_digest` of the question and its worked answer.
        question: The question, without the worked examples and the chat template around it.
        response: The whole response.
    """

    digest: str
    question: str
    response: str


@dataclass(frozen=True)
class Choice:
    """The log-likelihoods of the choices of one question.

    Attributes:
        digest: `row_digest` of the question and its worked answer.
        gold: Position of the right choice.
        log_likelihoods: Summed log-likelihood of each choice in nats; `None` if it is not finite.
        chosen: Position of the most likely choice; `None` if a log-likelihood is not finite.
        chosen_norm: Position of the choice with the highest log-likelihood per character.
    """

    digest: str
    gold: int
    log_likelihoods: tuple[float | None, ...]
    chosen: int | None
    chosen_norm: int | None

    @property
    def correct(self) -> bool:
        return self.chosen == self.gold

    @property
    def correct_norm(self) -> bool:
        return self.chosen_norm == self.gold


@dataclass(frozen=True)
class Window:
    """The loss on one window of text.

    Attributes:
        digest: sha256 of its token ids.
        nll: Summed negative log-likelihood in nats; `None` if it is not finite.
        tokens: Number of tokens that were predicted: all but the first.
    """

    digest: str
    nll: float | None
    tokens: int


@dataclass(frozen=True)
class AccuracyResult:
    """Accuracy on one task.

    Attributes:
        items: One entry per question.
        excluded: Number of questions left out because the model was calibrated on them.
        max_new_tokens: Longest answer that could be generated, in tokens.
        source: Source of the questions.
        examples: Digests of the worked examples that the prompts show, in their order.
        examples_source: Source of these; empty if there are none.
        seconds: Time for generating all answers.
        transcripts: The first questions with their whole responses, as samples.
    """

    metric: ClassVar[str] = "accuracy"

    items: tuple[Answer, ...]
    excluded: int
    max_new_tokens: int
    source: dict[str, Any]
    examples: tuple[str, ...] = ()
    examples_source: dict[str, Any] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)
    transcripts: tuple[Transcript, ...] = ()

    @property
    def correct(self) -> int:
        return sum(item.correct for item in self.items)

    @property
    def accuracy(self) -> float:
        return self.correct / len(self.items)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson_interval(self.correct, len(self.items))

    @property
    def without_answer(self) -> int:
        """Number of responses without a marker `####` followed by an answer."""
        return sum(item.answer is None for item in self.items)

    @property
    def hardly_answers(self) -> bool:
        """Whether so many responses have no answer that the accuracy is not informative."""
        return self.without_answer >= MANY_WITHOUT_ANSWER * len(self.items)

    @property
    def lengths(self) -> list[int]:
        """Length of each response, in tokens."""
        return [item.tokens for item in self.items]

    @property
    def at_limit(self) -> int:
        """Number of responses that were cut off at `max_new_tokens`."""
        return sum(item.hit_limit for item in self.items)

    @property
    def seconds_per_answer(self) -> float:
        return self.seconds / len(self.items)

    @property
    def fallback_accuracy(self) -> float | None:
        """Accuracy by the task's lenient extraction; `None` if it has none."""
        if self.items[0].fallback is None:
            return None
        return sum(bool(item.fallback) for item in self.items) / len(self.items)

    @property
    def answer_loss(self) -> float | None:
        """Mean loss on the worked answers over the questions, in nats per token.

        It is more sensitive to pruning than accuracy. Questions without a loss are ignored; `None`
        if no question has one.
        """
        losses = [item.loss for item in self.items if item.loss is not None]
        return math.fsum(losses) / len(losses) if losses else None

    @property
    def error(self) -> str | None:
        """Always `None`, because every response is right or wrong."""
        return None

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "n": len(self.items),
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "correct": self.correct,
            "without_answer": self.without_answer,
            "fallback_accuracy": self.fallback_accuracy,
            "answer_loss": self.answer_loss,
            "tokens": _length_summary(self.lengths),
            "at_limit": self.at_limit,
            "at_limit_interval": list(wilson_interval(self.at_limit, len(self.items))),
            "seconds": self.seconds,
            "seconds_per_answer": self.seconds_per_answer,
            "excluded": self.excluded,
            "max_new_tokens": self.max_new_tokens,
            "source": self.source,
            "num_fewshot": len(self.examples),
            "examples": list(self.examples),
            "examples_source": self.examples_source,
            "items": [asdict(item) for item in self.items],
            "transcripts": [asdict(each) for each in self.transcripts],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AccuracyResult":
        return cls(
            tuple(Answer(**item) for item in values["items"]),
            values["excluded"],
            values["max_new_tokens"],
            values["source"],
            tuple(values["examples"]),
            values["examples_source"],
            values["seconds"],
            tuple(Transcript(**each) for each in values.get("transcripts", ())),
        )


def _length_summary(lengths: Sequence[int]) -> dict[str, Any]:
    """Return mean and median of answer lengths, with their intervals."""
    mean, half = mean_and_interval(lengths)
    middle, interval = median_and_interval(lengths)
    return {
        "mean": mean,
        "mean_interval": None if half is None else [mean - half, mean + half],
        "median": middle,
        "median_interval": None if interval is None else list(interval),
    }


@dataclass(frozen=True)
class ChoiceResult:
    """Accuracy on one task by the likelihood of the choices.

    Attributes:
        items: One entry per question.
        excluded: Number of questions left out because the model was calibrated on them.
        source: Source of the questions.
        examples: Digests of the worked examples that the prompts show, in their order.
        examples_source: Source of these; empty if there are none.
        seconds: Time that it took.
    """

    metric: ClassVar[str] = "choices"

    items: tuple[Choice, ...]
    excluded: int
    source: dict[str, Any]
    examples: tuple[str, ...] = ()
    examples_source: dict[str, Any] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)

    @property
    def correct(self) -> dict[str, int]:
        """Number of right choices: by log-likelihood (`acc`), and per character (`acc_norm`)."""
        return {
            "acc": sum(item.correct for item in self.items),
            "acc_norm": sum(item.correct_norm for item in self.items),
        }

    @property
    def acc(self) -> float:
        """Share of questions whose right choice has the highest log-likelihood."""
        return self.correct["acc"] / len(self.items)

    @property
    def acc_norm(self) -> float:
        """Share of questions whose right choice has the highest log-likelihood per character."""
        return self.correct["acc_norm"] / len(self.items)

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % Wilson intervals of both."""
        return {
            name: wilson_interval(count, len(self.items)) for name, count in self.correct.items()
        }

    @property
    def error(self) -> str | None:
        """Why choices could not be compared; `None` if all were."""
        nonfinite = sum(item.chosen is None for item in self.items)
        if not nonfinite:
            return None
        return (
            f"the log-likelihood of a choice is NaN or infinite in {nonfinite} of "
            f"{len(self.items)} questions; check the weights for NaN or huge values, or try dtype "
            "float32"
        )

    def to_dict(self) -> dict[str, Any]:
        intervals = self.intervals
        return {
            "metric": self.metric,
            "n": len(self.items),
            "acc": self.acc,
            "acc_interval": list(intervals["acc"]),
            "acc_norm": self.acc_norm,
            "acc_norm_interval": list(intervals["acc_norm"]),
            "error": self.error,
            "seconds": self.seconds,
            "excluded": self.excluded,
            "source": self.source,
            "num_fewshot": len(self.examples),
            "examples": list(self.examples),
            "examples_source": self.examples_source,
            "items": [asdict(item) for item in self.items],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ChoiceResult":
        items = (
            Choice(**{**item, "log_likelihoods": tuple(item["log_likelihoods"])})
            for item in values["items"]
        )
        return cls(
            tuple(items),
            values["excluded"],
            values["source"],
            tuple(values["examples"]),
            values["examples_source"],
            values["seconds"],
        )


@dataclass(frozen=True)
class HarnessMetric:
    """One metric of a task of lm-evaluation-harness.

    Attributes:
        task: Name of the task; for a group, the name of one of its tasks.
        metric: Name of the metric, with its filter, as the harness writes it: `acc,none`.
        value: Its value; `None` if it is not finite.
        stderr: Its standard error as computed by the harness; `None` if there is none.
        n: Number of items; `None` for a group.
    """

    task: str
    metric: str
    value: float | None
    stderr: float | None
    n: int | None


@dataclass(frozen=True)
class HarnessResult:
    """The results of a task of lm-evaluation-harness, as it reports them.

    Attributes:
        items: One entry per metric.
        num_fewshot: Number of worked examples, by task.
        versions: Version of the definition, by task.
        seconds: Time that it took.
    """

    metric: ClassVar[str] = "lm_eval"

    items: tuple[HarnessMetric, ...]
    num_fewshot: dict[str, Any]
    versions: dict[str, Any]
    seconds: float = field(default=0.0, compare=False)

    @property
    def error(self) -> str | None:
        """Which metrics are not finite; `None` if all are."""
        names = [f"{item.task} {item.metric}" for item in self.items if item.value is None]
        return f"not finite: {', '.join(names)}; check the weights for NaN" if names else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "num_fewshot": self.num_fewshot,
            "versions": self.versions,
            "seconds": self.seconds,
            "items": [asdict(item) for item in self.items],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HarnessResult":
        items = tuple(HarnessMetric(**item) for item in values["items"])
        return cls(items, values["num_fewshot"], values["versions"], values["seconds"])


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity over one text.

    Attributes:
        items: One entry per window.
        excluded: Number of windows left out because they overlap text that the model was calibrated
            on.
        window: Length of a window in tokens.
        source: Source of the text.
    """

    metric: ClassVar[str] = "perplexity"

    items: tuple[Window, ...]
    excluded: int
    window: int
    source: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Number of tokens that were predicted."""
        return sum(item.tokens for item in self.items)

    @property
    def perplexity(self) -> float | None:
        """The exponential of the mean loss per token; `None` if it is not finite."""
        losses = [item.nll for item in self.items if item.nll is not None]
        if len(losses) < len(self.items):
            return None
        try:
            return math.exp(math.fsum(losses) / self.tokens)
        except OverflowError:
            return None

    @property
    def error(self) -> str | None:
        """Why the perplexity is not finite; `None` if it is finite."""
        if self.perplexity is not None:
            return None
        nonfinite = sum(item.nll is None for item in self.items)
        if nonfinite:
            reason = f"the loss is NaN or infinite in {nonfinite} of {len(self.items)} windows"
        else:
            reason = "the exponential of the mean loss per token overflows"
        return (
            f"the perplexity is not finite: {reason}; check the weights for NaN or huge values, or "
            "try dtype float32"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "n": len(self.items),
            "perplexity": self.perplexity,
            "error": self.error,
            "tokens": self.tokens,
            "window": self.window,
            "excluded": self.excluded,
            "source": self.source,
            "items": [asdict(item) for item in self.items],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PerplexityResult":
        items = tuple(Window(**item) for item in values["items"])
        return cls(items, values["excluded"], values["window"], values["source"])


@dataclass(frozen=True)
class WorkedAnswer:
    """The loss on one published worked answer, given its question.

    Attributes:
        digest: `row_digest` of the question and its worked answer.
        loss: Mean loss over the tokens of the answer, in nats; `None` if it is not finite.
    """

    digest: str
    loss: float | None


@dataclass(frozen=True)
class LossResult:
    """The loss on the worked answers of one task.

    Attributes:
        items: One entry per question.
        excluded: Number of questions left out because the model was calibrated on them.
        too_long: Number of questions left out because question and answer do not fit into the
            model's context.
        source: Source of the questions.
    """

    metric: ClassVar[str] = "loss"

    items: tuple[WorkedAnswer, ...]
    excluded: int
    too_long: int
    source: dict[str, Any]

    @property
    def loss(self) -> float | None:
        """Mean over the questions, in nats per token; `None` if a loss is not finite."""
        losses = [item.loss for item in self.items if item.loss is not None]
        return math.fsum(losses) / len(losses) if len(losses) == len(self.items) else None

    @property
    def error(self) -> str | None:
        """Why there is no loss; `None` if there is one."""
        if self.loss is not None:
            return None
        nonfinite = sum(item.loss is None for item in self.items)
        return (
            f"the loss is NaN or infinite on {nonfinite} of {len(self.items)} answers; check the "
            "weights for NaN or huge values, or try dtype float32"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "n": len(self.items),
            "loss": self.loss,
            "error": self.error,
            "excluded": self.excluded,
            "too_long": self.too_long,
            "source": self.source,
            "items": [asdict(item) for item in self.items],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LossResult":
        items = tuple(WorkedAnswer(**item) for item in values["items"])
        return cls(items, values["excluded"], values["too_long"], values["source"])


Result = AccuracyResult | ChoiceResult | PerplexityResult | LossResult | HarnessResult


@dataclass(frozen=True)
class Evaluation:
    """The results of one model.

    Attributes:
        model: Name of the model.
        tasks: Result per task, in the requested order.
        settings: Seed, limit, batch size, requested worked examples and longest answer, dtype,
            device, and whether a chat template was used.
        versions: Version per library.
        seconds: Duration of the evaluation in seconds.
    """

    model: str
    tasks: Mapping[str, Result]
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float

    @property
    def errors(self) -> dict[str, str]:
        """Error message per task that has one."""
        return {name: result.error for name, result in self.tasks.items() if result.error}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without NaN."""
        return {
            "evaluation_layout": LAYOUT,
            "model": self.model,
            "settings": self.settings,
            "versions": self.versions,
            "seconds": self.seconds,
            "tasks": {name: result.to_dict() for name, result in self.tasks.items()},
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Evaluation":
        """Rebuild an evaluation from `to_dict`.

        Raises:
            ValueError: The values are not an evaluation, or have another version.
        """
        layout = values.get("evaluation_layout") if isinstance(values, dict) else None
        if layout != LAYOUT:
            raise ValueError(
                f"expected the JSON that `optimum-cli cap eval -o` writes (evaluation_layout "
                f"{LAYOUT}), got evaluation_layout {layout}: evaluate the model again"
            )
        try:
            return cls(
                values["model"],
                {
                    name: _RESULTS[task["metric"]].from_dict(task)
                    for name, task in values["tasks"].items()
                },
                values["settings"],
                values["versions"],
                values["seconds"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the evaluation is incomplete ({type(error).__name__}: {error}): evaluate the "
                "model again"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the JSON to a file."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Read a file written by `save`.

        Raises:
            ValueError: The file does not contain an evaluation.
            FileNotFoundError: The file does not exist.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"the evaluation file {path} does not exist: check its path")
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as an evaluation: {error}") from error

    def table(self) -> str:
        """Return the results as tables for the terminal, a line per task and metric, with notes."""
        lengths = self.length_rows()
        lengths_table = ["", aligned(lengths, left=1)] if len(lengths) > 1 else []
        return "\n".join([aligned(self.rows(), left=1), *self.notes(), *lengths_table])

    def rows(self) -> list[list[str]]:
        """Return the table of results, with its header: a row per task and metric."""
        rows = [["task", "n", "result", "95 % interval", "no answer", "loss", "left out"]]
        for name, result in self.tasks.items():
            rows += _result_rows(name, result)
        return rows

    def notes(self) -> list[str]:
        """Return the lines below the table, each about one task."""
        return [note for name, result in self.tasks.items() for note in _notes(name, result)]

    def length_rows(self) -> list[list[str]]:
        """Return the table of the lengths of answers: its header, and a row per task that has any.

        The last column is the time per answer, on the machine that measured it.
        """
        rows = [
            ["task", "tokens per answer", "95 %", "median", "95 %", "at limit", "95 %", "s/answer"]
        ]
        for name, result in self.tasks.items():
            if isinstance(result, AccuracyResult):
                mean, half = mean_and_interval(result.lengths)
                middle, interval = median_and_interval(result.lengths)
                limits = wilson_interval(result.at_limit, len(result.items))
                rows.append(
                    [
                        name,
                        f"{mean:.1f}",
                        "-" if half is None else f"{mean - half:.1f} to {mean + half:.1f}",
                        f"{middle:g}",
                        "-" if interval is None else f"{interval[0]:g} to {interval[1]:g}",
                        f"{result.at_limit / len(result.items):.1%}",
                        f"{limits[0]:.1%} to {limits[1]:.1%}",
                        f"{result.seconds_per_answer:.3g}",
                    ]
                )
        return rows


def _result_rows(name: str, result: Result) -> list[list[str]]:
    """Return the cells of each metric of a task."""
    count = str(len(result.items))
    if isinstance(result, AccuracyResult):
        missing = f"{result.without_answer / len(result.items):.1%}"
        loss = "-" if result.answer_loss is None else f"{result.answer_loss:.4f}"
        cells = [f"{result.accuracy:.1%}", _percents(result.interval), missing, loss]
        return [[name, count, *cells, str(result.excluded)]]
    if isinstance(result, ChoiceResult):
        failed = result.error is not None
        return [
            [
                name,
                count,
                f"{metric} {'not finite' if failed else f'{right / len(result.items):.1%}'}",
                "-" if failed else _percents(result.intervals[metric]),
                *("-", "-", str(result.excluded)),
            ]
            for metric, right in result.correct.items()
        ]
    if isinstance(result, HarnessResult):
        return [
            [
                name if name.endswith(f":{item.task}") else f"{name} {item.task}",
                "-" if item.n is None else str(item.n),
                f"{item.metric} {'not finite' if item.value is None else f'{item.value:.4f}'}",
                "-" if item.stderr is None else f"± {item.stderr:.4f} (s.e.)",
                *("-", "-", "-"),
            ]
            for item in result.items
        ]
    if isinstance(result, LossResult):
        loss = "not finite" if result.loss is None else f"{result.loss:.4f}"
        return [[name, count, "-", "-", "-", loss, str(result.excluded)]]
    value = result.perplexity
    cells = ["not finite" if value is None else f"ppl {value:.4g}", "-", "-", "-"]
    return [[name, count, *cells, str(result.excluded)]]


def _percents(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def _notes(name: str, result: Result) -> list[str]:
    """Return the lines below the table about a task."""
    notes = []
    if isinstance(result, AccuracyResult):
        if result.hardly_answers:
            notes.append(f"WARNING: {hardly_answers_warning(name, result)}")
        if result.fallback_accuracy is not None:
            notes.append(
                f"{name}: {result.fallback_accuracy:.1%} with flexible extraction (the last number "
                "of the response is its answer)"
            )
    if isinstance(result, AccuracyResult | ChoiceResult) and result.examples:
        notes.append(f"{name}: the prompts show {len(result.examples)} worked examples")
    if isinstance(result, PerplexityResult):
        notes.append(
            f"{name}: {len(result.items)} windows of {result.window} tokens, {result.tokens:,} "
            "tokens predicted"
        )
    if isinstance(result, LossResult) and result.too_long:
        notes.append(
            f"{name}: {result.too_long} questions left out, because the model cannot take them "
            "with their answers"
        )
    if not isinstance(result, HarnessResult) and result.excluded:
        items = "windows" if isinstance(result, PerplexityResult) else "questions"
        notes.append(
            f"{name}: {result.excluded} {items} left out, because the model was calibrated on them"
        )
    return notes


def hardly_answers_warning(name: str, result: AccuracyResult, who: str = "the model") -> str:
    """Return the warning that too few responses have an answer for an informative accuracy."""
    shown = len(result.examples)
    return (
        f"{name}: {who} gives no answer that can be extracted in {result.without_answer} of "
        f"{len(result.items)} responses, which count as wrong, so the accuracy says little: see "
        "what it writes with log_samples (--log-samples), and show it "
        f"{'more' if shown else 'some'} worked examples with num_fewshot (--num-fewshot)"
        + (f", of which there were {shown}" if shown else "")
    )


_RESULTS: dict[str, Any] = {
    kind.metric: kind
    for kind in (AccuracyResult, ChoiceResult, PerplexityResult, LossResult, HarnessResult)
}
