"""Paired comparison of two evaluations: differences over the same items, with significance tests.

Does not import torch.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from optimum_cap.evaluation.results import (
    AccuracyResult,
    Answer,
    Evaluation,
    LossResult,
    PerplexityResult,
    Window,
    WorkedAnswer,
    mean_and_interval,
    wilson_interval,
)
from optimum_cap.text import aligned

_RESAMPLES = 10_000
_SEED = 0
_Item = TypeVar("_Item", Answer, Window, WorkedAnswer)


@dataclass(frozen=True)
class TaskComparison:
    """Comparison of two models on one task, over the items that both have.

    Attributes:
        task: Name of the task.
        metric: `"accuracy"`, `"perplexity"` or `"loss"`.
        n: Number of common items: questions or windows.
        only_dense: Number of items that only the dense model has; they are dropped.
        only_pruned: Number of items that only the pruned model has; they are dropped.
        dense: Metric of the dense model over the common items.
        pruned: Metric of the pruned model over the common items.
        interval: 95 % interval of `difference`: Newcombe's for accuracy, a paired bootstrap over
            windows for perplexity, Student's t over the paired questions for a loss; `None` with a
            single window or question.
        p_value: p-value of the exact two-sided McNemar test; `None` for perplexity and loss.
    """

    task: str
    metric: str
    n: int
    only_dense: int
    only_pruned: int
    dense: float
    pruned: float
    interval: tuple[float, float] | None
    p_value: float | None

    @property
    def difference(self) -> float:
        """Pruned minus dense: accuracy as a fraction of 1, perplexity, or nats per token."""
        return self.pruned - self.dense


def compare(
    dense: Evaluation, pruned: Evaluation, tasks: Iterable[str] | None = None
) -> dict[str, TaskComparison | str]:
    """Compare two evaluations task by task.

    Args:
        dense: The baseline.
        pruned: The evaluation to compare with it.
        tasks: Names of tasks; `None` takes those that both have.

    Returns:
        Per task, the comparison, or the reason why there is none: a perplexity is not finite.

    Raises:
        ValueError: An evaluation lacks a task, there is no common task, or a task has no common
            items.
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
    """Return a comparison as a table for the terminal, with a note on dropped items per task."""
    rows = [["task", "n", "dense", "pruned", "difference", "95 % interval", "p"]]
    notes = []
    for name, comparison in compare(dense, pruned, tasks).items():
        if isinstance(comparison, str):
            rows.append([name, "-", "-", "-", "-", "-", "-"])
            notes.append(f"{name}: {comparison}")
            continue
        rows.append(_cells(comparison))
        if comparison.only_dense or comparison.only_pruned:
            notes.append(
                f"{name}: dropped {comparison.only_dense} items that only the dense model has and "
                f"{comparison.only_pruned} that only the pruned model has"
            )
    return "\n".join(
        [f"dense   {dense.model}", f"pruned  {pruned.model}", "", aligned(rows, left=1), *notes]
    )


def _cells(comparison: TaskComparison) -> list[str]:
    is_accuracy = comparison.metric == "accuracy"
    noun = "loss" if comparison.metric == "loss" else "ppl"

    def plain(value: float) -> str:
        return f"{value:.1%}" if is_accuracy else f"{noun} {value:.4g}"

    def signed(value: float) -> str:
        return f"{100 * value:+.1f} points" if is_accuracy else f"{value:+.4g}"

    interval = "-"
    if comparison.interval is not None:
        low, high = comparison.interval
        # The column before already shows the unit.
        interval = " to ".join(signed(value).removesuffix(" points") for value in (low, high))
    return [
        comparison.task,
        str(comparison.n),
        plain(comparison.dense),
        plain(comparison.pruned),
        signed(comparison.difference),
        interval,
        "-" if comparison.p_value is None else f"{comparison.p_value:.3g}",
    ]


def _compare_task(name: str, dense: Evaluation, pruned: Evaluation) -> TaskComparison | str:
    for side in (dense, pruned):
        if (error := side.tasks[name].error) is not None:
            return f"not compared: for {side.model}, {error}"
    first, second = dense.tasks[name], pruned.tasks[name]
    if isinstance(first, AccuracyResult) and isinstance(second, AccuracyResult):
        answers = _paired(first.items, second.items)
        _check_pairs(name, answers, dense, pruned)
        return _compare_answers(name, answers, len(first.items), len(second.items))
    if isinstance(first, PerplexityResult) and isinstance(second, PerplexityResult):
        windows = _paired(first.items, second.items)
        _check_pairs(name, windows, dense, pruned)
        return _compare_windows(name, windows, len(first.items), len(second.items))
    if isinstance(first, LossResult) and isinstance(second, LossResult):
        worked = _paired(first.items, second.items)
        _check_pairs(name, worked, dense, pruned)
        return _compare_losses(name, worked, len(first.items), len(second.items))
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


def _compare_answers(
    name: str, pairs: list[tuple[Answer, Answer]], first: int, second: int
) -> TaskComparison:
    counts = Counter((dense.correct, pruned.correct) for dense, pruned in pairs)
    both, lost = counts[True, True], counts[True, False]
    won, neither = counts[False, True], counts[False, False]
    total = len(pairs)
    return TaskComparison(
        name,
        AccuracyResult.metric,
        total,
        first - total,
        second - total,
        (both + lost) / total,
        (both + won) / total,
        newcombe_interval(both, won, lost, neither),
        mcnemar_p_value(won, lost),
    )


def mcnemar_p_value(won: int, lost: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    Args:
        won: Number of items that only the second model has right.
        lost: Number of items that only the first model has right.
    """
    total = won + lost
    tail = sum(math.comb(total, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**total)


def newcombe_interval(both: int, won: int, lost: int, neither: int) -> tuple[float, float]:
    """Return the 95 % interval of the paired difference of two proportions, second minus first.

    Newcombe 1998 (Statistics in Medicine 17:2635), method 10, combines the Wilson intervals of both
    proportions with their correlation. It is valid for small samples and if the models never
    disagree.

    Args:
        both: Number of items that both have right.
        won: Number of items that only the second has right.
        lost: Number of items that only the first has right.
        neither: Number of items that both have wrong.
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


def _compare_windows(
    name: str, pairs: list[tuple[Window, Window]], first: int, second: int
) -> TaskComparison:
    # All losses are finite: a result with a non-finite loss has an error and is not compared.
    losses = np.array([[window.nll for window in pair] for pair in pairs], dtype=np.float64)
    tokens = np.array([pair[0].tokens for pair in pairs], dtype=np.float64)
    dense, pruned = np.exp(losses.sum(0) / tokens.sum())
    interval = bootstrap_interval(losses, tokens) if len(pairs) > 1 else None
    total = len(pairs)
    return TaskComparison(
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
) -> TaskComparison:
    # All losses are finite: a result with a non-finite loss has an error and is not compared.
    losses = np.array([[answer.loss for answer in pair] for pair in pairs], dtype=np.float64)
    dense, pruned = losses.mean(0)
    mean, half = mean_and_interval((losses[:, 1] - losses[:, 0]).tolist())
    total = len(pairs)
    return TaskComparison(
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


def bootstrap_interval(losses: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of a difference of perplexities, second minus first.

    Windows are drawn with replacement, each with its losses under both models, 10,000 times with a
    fixed seed.

    Args:
        losses: Summed losses in nats, `[windows, 2]`.
        tokens: Tokens predicted, `[windows]`.
    """
    generator = np.random.default_rng(_SEED)
    count = len(tokens)
    differences = []
    for _ in range(_RESAMPLES // 1000):  # in parts, to bound the memory
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=1000)
        dense, pruned = np.exp(drawn @ losses / (drawn @ tokens)[:, None]).T
        differences.append(pruned - dense)
    low, high = np.percentile(np.concatenate(differences), [2.5, 97.5])
    return float(low), float(high)
