"""Paired comparison of two evaluations: differences over the same items, with significance tests.

Does not import torch.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from optimum_cap.evaluation.results import (
    AccuracyResult,
    Answer,
    Choice,
    ChoiceResult,
    Evaluation,
    HarnessResult,
    LossResult,
    PerplexityResult,
    Result,
    Window,
    WorkedAnswer,
    hardly_answers_warning,
    mean_and_interval,
    wilson_interval,
)
from optimum_cap.text import aligned

_RESAMPLES = 10_000
_SEED = 0
_Z = 1.959964  # 97.5 % quantile of the normal distribution
_SHARES = ("accuracy", "no answer", "at limit", "acc", "acc_norm")
_RATIOS = ("tokens per answer", "seconds per answer")
COLUMNS = ("task", "metric", "n", "dense", "pruned", "difference", "95 % interval", "p")
"""Header of a table of comparisons, whose rows are `MetricComparison.cells`."""
_Item = TypeVar("_Item", Answer, Choice, Window, WorkedAnswer)


@dataclass(frozen=True)
class MetricComparison:
    """Comparison of two models by one metric of a task, over their common items.

    Attributes:
        task: Name of the task.
        metric: `"accuracy"`, `"no answer"` or `"at limit"`, each a share of the answers;
            `"tokens per answer"` or `"seconds per answer"`, means; `"acc"` or `"acc_norm"`;
            `"perplexity"`; `"loss"`, in nats per token; or a metric of lm-evaluation-harness.
        n: Number of common items: questions or windows; `None` for the harness's metrics.
        only_dense: Number of items that only the dense model has, which are dropped.
        only_pruned: Number of items that only the pruned model has, which are dropped.
        dense: Metric of the dense model over the common items.
        pruned: Metric of the pruned model over the common items.
        interval: 95 % interval of `difference`, or of `change` for lengths: Newcombe's for shares,
            a paired bootstrap for lengths and perplexity, Student's t over the paired questions for
            a loss, and for the harness's metrics from the standard errors, as if the models had
            answered different questions; `None` if there is none.
        p_value: p-value of the exact two-sided McNemar test for shares, and of a two-sided
            sign-flip test of the paired differences for lengths; `None` for other metrics.
    """

    task: str
    metric: str
    n: int | None
    only_dense: int
    only_pruned: int
    dense: float
    pruned: float
    interval: tuple[float, float] | None
    p_value: float | None

    @property
    def difference(self) -> float:
        """Pruned minus dense: shares as fractions of 1, lengths in tokens, times in seconds."""
        return self.pruned - self.dense

    @property
    def change(self) -> float | None:
        """`difference` as a fraction of the dense value; `None` if that is 0."""
        return self.difference / self.dense if self.dense else None

    def cells(self) -> list[str]:
        """Return the row of a table with the columns `COLUMNS`."""
        return _cells(self)


def compare(
    dense: Evaluation, pruned: Evaluation, tasks: Iterable[str] | None = None
) -> dict[str, list[MetricComparison] | str]:
    """Compare two evaluations task by task.

    Args:
        dense: The baseline.
        pruned: The evaluation to compare with it.
        tasks: Names of tasks; `None` takes the common ones.

    Returns:
        Per task, a comparison per metric, the main one first; or the reason why there is none, such
        as a value that is not finite.

    Raises:
        ValueError: An evaluation lacks a task, there is no common task, a task has no common
            items, or its prompts show different worked examples.
    """
    common = [name for name in dense.tasks if name in pruned.tasks]
    names = common if tasks is None else list(tasks)
    if not names:
        raise ValueError(
            f"{dense.model} ({', '.join(dense.tasks)}) and {pruned.model} "
            f"({', '.join(pruned.tasks)}) have no task in common: evaluate both on the same task"
        )
    for name in names:
        for side in (dense, pruned):
            if name not in side.tasks:
                raise ValueError(
                    f"the evaluation of {side.model} has no task {name!r}, only "
                    f"{', '.join(side.tasks)}: evaluate it again with this task"
                )
    return {name: _compare_task(name, dense, pruned) for name in names}


def comparison_table(dense: Evaluation, pruned: Evaluation, tasks: Iterable[str] | None) -> str:
    """Return a comparison as a table for the terminal, with notes on each task."""
    rows = [list(COLUMNS)]
    notes = []
    for name, comparisons in compare(dense, pruned, tasks).items():
        if isinstance(comparisons, str):
            rows.append([name, *["-"] * 7])
            notes.append(f"{name}: {comparisons}")
            continue
        rows += [comparison.cells() for comparison in comparisons]
        first = comparisons[0]
        if first.only_dense or first.only_pruned:
            notes.append(
                f"{name}: dropped {first.only_dense} items that only the dense model has and "
                f"{first.only_pruned} that only the pruned model has"
            )
        notes += _notes(name, dense.tasks[name], pruned.tasks[name])
    return "\n".join(
        [f"dense   {dense.model}", f"pruned  {pruned.model}", "", aligned(rows, left=2), *notes]
    )


def _notes(name: str, dense: Result, pruned: Result) -> list[str]:
    """Return notes about a compared task."""
    if not isinstance(dense, AccuracyResult) or not isinstance(pruned, AccuracyResult):
        return []
    notes = []
    if dense.hardly_answers:
        notes.append(f"WARNING: {hardly_answers_warning(name, dense, 'the dense model')}")
    if dense.max_new_tokens != pruned.max_new_tokens:
        notes.append(
            f"{name}: answers of the dense model could have {dense.max_new_tokens} tokens, those "
            f"of the pruned model {pruned.max_new_tokens}"
        )
    return notes


def _cells(comparison: MetricComparison) -> list[str]:
    metric = comparison.metric
    # The previous column already shows the unit.
    interval = "-"
    if comparison.interval is not None:
        ends = (_signed(metric, value).split(" ")[0] for value in comparison.interval)
        interval = " to ".join(ends)
    shown = comparison.change if metric in _RATIOS else comparison.difference
    return [
        comparison.task,
        metric,
        "-" if comparison.n is None else str(comparison.n),
        _plain(metric, comparison.dense),
        _plain(metric, comparison.pruned),
        "-" if shown is None else _signed(metric, shown),
        interval,
        "-" if comparison.p_value is None else f"{comparison.p_value:.3g}",
    ]


def _plain(metric: str, value: float) -> str:
    if metric in _SHARES:
        return f"{value:.1%}"
    if metric == "tokens per answer":
        return f"{value:.1f}"
    if metric == "seconds per answer":
        return f"{value:.3g}"
    return f"ppl {value:.4g}" if metric == PerplexityResult.metric else f"{value:.4f}"


def _signed(metric: str, value: float) -> str:
    if metric in _SHARES:
        return f"{100 * value:+.1f} points"
    if metric in _RATIOS:
        return f"{100 * value:+.1f} %"
    return f"{value:+.4g}" if metric == PerplexityResult.metric else f"{value:+.4f}"


def _compare_task(name: str, dense: Evaluation, pruned: Evaluation) -> list[MetricComparison] | str:
    for side in (dense, pruned):
        if (error := side.tasks[name].error) is not None:
            return f"not compared: for {side.model}, {error}"
    first, second = dense.tasks[name], pruned.tasks[name]
    if isinstance(first, AccuracyResult) and isinstance(second, AccuracyResult):
        _check_examples(name, first.examples, second.examples, dense, pruned)
        answers = _paired(first.items, second.items)
        _check_pairs(name, answers, dense, pruned)
        return _compare_answers(name, answers, first, second)
    if isinstance(first, ChoiceResult) and isinstance(second, ChoiceResult):
        _check_examples(name, first.examples, second.examples, dense, pruned)
        choices = _paired(first.items, second.items)
        _check_pairs(name, choices, dense, pruned)
        sizes = (len(first.items), len(second.items))
        return [
            _compare_shares(name, "acc", [(a.correct, b.correct) for a, b in choices], sizes),
            _compare_shares(
                name, "acc_norm", [(a.correct_norm, b.correct_norm) for a, b in choices], sizes
            ),
        ]
    if isinstance(first, PerplexityResult) and isinstance(second, PerplexityResult):
        windows = _paired(first.items, second.items)
        _check_pairs(name, windows, dense, pruned)
        return [_compare_windows(name, windows, len(first.items), len(second.items))]
    if isinstance(first, LossResult) and isinstance(second, LossResult):
        worked = _paired(first.items, second.items)
        _check_pairs(name, worked, dense, pruned)
        return [_compare_losses(name, worked, len(first.items), len(second.items))]
    if isinstance(first, HarnessResult) and isinstance(second, HarnessResult):
        return _compare_reports(name, first, second, dense, pruned)
    raise ValueError(
        f"task {name} was measured by {first.metric} for {dense.model}, but by {second.metric} for "
        f"{pruned.model}: evaluate both again"
    )


def _paired(first: Sequence[_Item], second: Sequence[_Item]) -> list[tuple[_Item, _Item]]:
    """Pair the items with the same digest; among equal digests, the k-th with the k-th."""

    def keyed(items: Sequence[_Item]) -> dict[tuple[str, int], _Item]:
        seen: Counter[str] = Counter()
        by_key = {}
        for item in items:
            by_key[item.digest, seen[item.digest]] = item
            seen[item.digest] += 1
        return by_key

    others = keyed(second)
    return [(item, others[key]) for key, item in keyed(first).items() if key in others]


def _check_pairs(name: str, pairs: Sequence[object], dense: Evaluation, pruned: Evaluation) -> None:
    if not pairs:
        raise ValueError(
            f"task {name}: {dense.model} and {pruned.model} have no item in common: evaluate both "
            "on the same data, with the same seed and, for perplexity, the same tokenizer and "
            "window"
        )


def _check_examples(
    name: str,
    first: Sequence[str],
    second: Sequence[str],
    dense: Evaluation,
    pruned: Evaluation,
) -> None:
    if first != second:
        counts = "other ones" if len(first) == len(second) else f"{len(first)} and {len(second)}"
        raise ValueError(
            f"task {name}: the prompts of {dense.model} and {pruned.model} show different worked "
            f"examples ({counts}): evaluate both with the same num_fewshot (--num-fewshot), seed "
            "and data"
        )


def _compare_answers(
    name: str,
    pairs: list[tuple[Answer, Answer]],
    first: AccuracyResult,
    second: AccuracyResult,
) -> list[MetricComparison]:
    sizes = (len(first.items), len(second.items))
    shares = [
        _compare_shares(name, metric, [(flag(a), flag(b)) for a, b in pairs], sizes)
        for metric, flag in _FLAGS.items()
    ]
    lengths = np.array([[a.tokens, b.tokens] for a, b in pairs], dtype=np.float64)
    total = len(pairs)
    dropped = (sizes[0] - total, sizes[1] - total)
    dense, pruned = (float(mean) for mean in lengths.mean(0))
    length = MetricComparison(
        name,
        "tokens per answer",
        total,
        *dropped,
        dense,
        pruned,
        ratio_interval(lengths) if total > 1 and dense else None,
        sign_flip_p_value(lengths[:, 1] - lengths[:, 0]),
    )
    # Batches are timed as a whole, so these are means over all answers of each model.
    seconds = MetricComparison(
        name,
        "seconds per answer",
        total,
        *dropped,
        first.seconds_per_answer,
        second.seconds_per_answer,
        None,
        None,
    )
    return [*shares, length, seconds]


_FLAGS: dict[str, Callable[[Answer], bool]] = {
    "accuracy": lambda answer: answer.correct,
    "no answer": lambda answer: answer.answer is None,
    "at limit": lambda answer: answer.hit_limit,
}


def _compare_shares(
    name: str, metric: str, pairs: Sequence[tuple[bool, bool]], sizes: tuple[int, int]
) -> MetricComparison:
    """Compare the share of items for which something holds, given whether it holds per pair."""
    counts = Counter(pairs)
    both, lost = counts[True, True], counts[True, False]
    won, neither = counts[False, True], counts[False, False]
    total = len(pairs)
    return MetricComparison(
        name,
        metric,
        total,
        sizes[0] - total,
        sizes[1] - total,
        (both + lost) / total,
        (both + won) / total,
        newcombe_interval(both, won, lost, neither),
        mcnemar_p_value(won, lost),
    )


def _compare_windows(
    name: str, pairs: list[tuple[Window, Window]], first: int, second: int
) -> MetricComparison:
    # All losses are finite: a result with a non-finite loss has an error and is not compared.
    losses = np.array([[window.nll for window in pair] for pair in pairs], dtype=np.float64)
    tokens = np.array([pair[0].tokens for pair in pairs], dtype=np.float64)
    dense, pruned = np.exp(losses.sum(0) / tokens.sum())
    interval = bootstrap_interval(losses, tokens) if len(pairs) > 1 else None
    total = len(pairs)
    return MetricComparison(
        name,
        PerplexityResult.metric,
        total,
        first - total,
        second - total,
        float(dense),
        float(pruned),
        interval,
        None,
    )


def _compare_losses(
    name: str, pairs: list[tuple[WorkedAnswer, WorkedAnswer]], first: int, second: int
) -> MetricComparison:
    # All losses are finite: a result with a non-finite loss has an error and is not compared.
    losses = np.array([[answer.loss for answer in pair] for pair in pairs], dtype=np.float64)
    dense, pruned = losses.mean(0)
    mean, half = mean_and_interval((losses[:, 1] - losses[:, 0]).tolist())
    total = len(pairs)
    return MetricComparison(
        name,
        LossResult.metric,
        total,
        first - total,
        second - total,
        float(dense),
        float(pruned),
        None if half is None else (mean - half, mean + half),
        None,
    )


def _compare_reports(
    name: str, first: HarnessResult, second: HarnessResult, dense: Evaluation, pruned: Evaluation
) -> list[MetricComparison]:
    """Compare metrics that lm-evaluation-harness reports; they are not paired."""
    settings: tuple[tuple[str, Any, Any], ...] = (
        ("numbers of worked examples", first.num_fewshot, second.num_fewshot),
        ("versions", first.versions, second.versions),
        ("numbers of items", _counts(first), _counts(second)),
    )
    for what, dense_value, pruned_value in settings:
        if dense_value != pruned_value:
            raise ValueError(
                f"task {name} has different {what} for {dense.model} ({dense_value}) and "
                f"{pruned.model} ({pruned_value}): evaluate both again in the same way"
            )
    others = {(item.task, item.metric): item for item in second.items}
    comparisons = []
    for item in first.items:
        other = others[item.task, item.metric]
        if item.value is None or other.value is None:
            continue  # the caller has reported the error
        interval = None
        if item.stderr is not None and other.stderr is not None:
            half = _Z * math.hypot(item.stderr, other.stderr)
            interval = (other.value - item.value - half, other.value - item.value + half)
        comparisons.append(
            MetricComparison(
                name if name.endswith(f":{item.task}") else f"{name} {item.task}",
                item.metric,
                item.n,
                0,
                0,
                item.value,
                other.value,
                interval,
                None,
            )
        )
    return comparisons


def _counts(result: HarnessResult) -> dict[str, int | None]:
    return {f"{item.task} {item.metric}": item.n for item in result.items}


def mcnemar_p_value(won: int, lost: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    Args:
        won: Number of items that only the second model gets right.
        lost: Number of items that only the first model gets right.
    """
    total = won + lost
    tail = sum(math.comb(total, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**total)


def newcombe_interval(both: int, won: int, lost: int, neither: int) -> tuple[float, float]:
    """Return the 95 % interval of the paired difference of two proportions, second minus first.

    Newcombe 1998 (Statistics in Medicine 17:2635), method 10, combines the Wilson intervals of both
    proportions with their correlation. It is valid for small samples, and when the models never
    disagree.

    Args:
        both: Number of items that both get right.
        won: Number of items that only the second gets right.
        lost: Number of items that only the first gets right.
        neither: Number of items that both get wrong.
    """
    total = both + won + lost + neither
    first, second = (both + lost) / total, (both + won) / total
    first_low, first_high = wilson_interval(both + lost, total)
    second_low, second_high = wilson_interval(both + won, total)
    product = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    excess = float(both * neither - won * lost)
    if excess > 0:
        excess = max(excess - total / 2, 0.0)  # the continuity correction of the paper
    correlation = excess / math.sqrt(product) if product else 0.0

    def joined(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    difference = second - first
    return (
        difference - joined(second - second_low, first_high - first),
        difference + joined(second_high - second, first - first_low),
    )


def bootstrap_interval(losses: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of a difference of perplexities, second minus first.

    Windows are drawn with replacement, each with its losses under both models, 10,000 times with a
    fixed seed.

    Args:
        losses: Summed losses in nats, `[windows, 2]`.
        tokens: Tokens predicted, `[windows]`.
    """
    differences = []
    for drawn in _resamples(len(tokens)):
        dense, pruned = np.exp(drawn @ losses / (drawn @ tokens)[:, None]).T
        differences.append(pruned - dense)
    return _percentile_interval(differences)


def ratio_interval(lengths: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of the second mean over the first, minus 1.

    Items are drawn with replacement, each with its lengths under both models, 10,000 times with a
    fixed seed.

    Args:
        lengths: Length of each answer, `[answers, 2]`; not all of the first model's are 0.
    """
    ratios = []
    for drawn in _resamples(len(lengths)):
        first, second = (drawn @ lengths).T
        ratios.append(second[first > 0] / first[first > 0] - 1)
    return _percentile_interval(ratios)


def _resamples(count: int) -> Iterator[np.ndarray]:
    """Yield, in parts, how often each of `count` items is drawn, int64 `[resamples, count]`."""
    generator = np.random.default_rng(_SEED)
    for _ in range(_RESAMPLES // 1000):  # in parts, to bound memory use
        yield generator.multinomial(count, np.full(count, 1 / count), size=1000)


def _percentile_interval(parts: Sequence[np.ndarray]) -> tuple[float, float]:
    low, high = np.percentile(np.concatenate(parts), [2.5, 97.5])
    return float(low), float(high)


def sign_flip_p_value(differences: np.ndarray) -> float:
    """Return the two-sided p-value of the hypothesis that paired differences are symmetric about 0.

    The signs of the differences are drawn 10,000 times with a fixed seed.

    Args:
        differences: Second minus first, `[items]`.
    """
    generator = np.random.default_rng(_SEED)
    observed = abs(differences.sum()) * (1 - 1e-12)
    extreme = 0
    for _ in range(_RESAMPLES // 1000):
        signs = generator.choice((-1.0, 1.0), size=(1000, len(differences)))
        extreme += int((abs(signs @ differences) >= observed).sum())
    return (1 + extreme) / (1 + _RESAMPLES)
