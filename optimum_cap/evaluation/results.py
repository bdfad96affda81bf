"""Results of an evaluation: items, metrics, JSON and a table. Does not import torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar

from optimum_cap.text import aligned

_LAYOUT = 1  # version of the JSON file; other versions raise an error
_Z = 1.959964  # 97.5 % quantile of the normal distribution
# Two-sided 95 % quantiles of Student's t by degrees of freedom (any table of the distribution).
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
    """Return the mean over seeds and half the width of its 95 % interval (Student's t).

    Args:
        values: One value per seed, at least one.

    Returns:
        The mean, and the half width; `None` if there is a single value.
    """
    if len(values) == 1:
        return values[0], None
    freedom = len(values) - 1
    quantile = _T[freedom - 1] if freedom <= len(_T) else _T_MORE
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Answer:
    """The graded answer to one question.

    Attributes:
        digest: `row_digest` of the question and its worked answer.
        correct: Whether the final answer is right.
        answer: The final answer extracted from the response; `None` if the response has no marker
            `####` with an answer after it, which counts as wrong.
        fallback: Whether the answer is right by the task's lenient extraction; `None` if the task
            has none.
        loss: Mean loss over the tokens of the published worked answer, in nats; `None` if it is not
            finite or the model cannot take the whole answer.
    """

    digest: str
    correct: bool
    answer: str | None
    fallback: bool | None = None
    loss: float | None = None


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
    """

    metric: ClassVar[str] = "accuracy"

    items: tuple[Answer, ...]
    excluded: int
    max_new_tokens: int
    source: dict[str, Any]

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
    def fallback_accuracy(self) -> float | None:
        """Accuracy by the task's lenient extraction; `None` if it has none."""
        if self.items[0].fallback is None:
            return None
        return sum(bool(item.fallback) for item in self.items) / len(self.items)

    @property
    def answer_loss(self) -> float | None:
        """Mean loss on the worked answers over the questions, in nats per token.

        It is more sensitive to pruning than accuracy. Questions without a loss are left out; `None`
        if no question has one.
        """
        losses = [item.loss for item in self.items if item.loss is not None]
        return math.fsum(losses) / len(losses) if losses else None

    @property
    def error(self) -> str | None:
        """Always `None`: every response is right or wrong."""
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
            "excluded": self.excluded,
            "max_new_tokens": self.max_new_tokens,
            "source": self.source,
            "items": [asdict(item) for item in self.items],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AccuracyResult":
        items = tuple(Answer(**item) for item in values["items"])
        return cls(items, values["excluded"], values["max_new_tokens"], values["source"])


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
        too_long: Number of questions left out because the model cannot take question and answer.
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


TaskResult = AccuracyResult | PerplexityResult | LossResult


@dataclass(frozen=True)
class Evaluation:
    """The results of one model.

    Attributes:
        model: Name of the model.
        tasks: Result per task, in the requested order.
        settings: Seed, limit, batch size, dtype, device, and whether a chat template was used.
        versions: Version per library.
        seconds: Duration of the evaluation in seconds.
    """

    model: str
    tasks: dict[str, TaskResult]
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
            "evaluation_layout": _LAYOUT,
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
        if layout != _LAYOUT:
            raise ValueError(
                f"expected the JSON that `optimum-cli cap eval -o` writes (evaluation_layout "
                f"{_LAYOUT}), got evaluation_layout {layout}: evaluate the model again"
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
        """Return a table for the terminal, one line per task."""
        rows = [["task", "n", "result", "95 % interval", "no answer", "loss", "left out"]]
        notes = []
        for name, result in self.tasks.items():
            if isinstance(result, AccuracyResult):
                low, high = result.interval
                missing = result.without_answer / len(result.items)
                loss = "-" if result.answer_loss is None else f"{result.answer_loss:.4f}"
                interval = f"{low:.1%} to {high:.1%}"
                cells = [f"{result.accuracy:.1%}", interval, f"{missing:.1%}", loss]
                if result.fallback_accuracy is not None:
                    notes.append(
                        f"{name}: {result.fallback_accuracy:.1%} with flexible extraction (the "
                        "last number of the response is its answer)"
                    )
                items = "questions"
            elif isinstance(result, LossResult):
                loss = "not finite" if result.loss is None else f"{result.loss:.4f}"
                cells = ["-", "-", "-", loss]
                if result.too_long:
                    notes.append(
                        f"{name}: {result.too_long} questions left out, because the model cannot "
                        "take them with their answers"
                    )
                items = "questions"
            else:
                value = result.perplexity
                cells = ["not finite" if value is None else f"ppl {value:.4g}", "-", "-", "-"]
                notes.append(
                    f"{name}: {len(result.items)} windows of {result.window} tokens, "
                    f"{result.tokens:,} tokens predicted"
                )
                items = "windows"
            rows.append([name, str(len(result.items)), *cells, str(result.excluded)])
            if result.excluded:
                notes.append(
                    f"{name}: {result.excluded} {items} left out, because the model was "
                    "calibrated on them"
                )
        return "\n".join([aligned(rows, left=1), *notes])


_RESULTS: dict[str, type[AccuracyResult] | type[PerplexityResult] | type[LossResult]] = {
    AccuracyResult.metric: AccuracyResult,
    PerplexityResult.metric: PerplexityResult,
    LossResult.metric: LossResult,
}
