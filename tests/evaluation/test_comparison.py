"""Comparison: statistics against their definitions and simulation, pairing, what is refused."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
from scipy.stats import binomtest

from optimum_cap.evaluation.comparison import (
    MetricComparison,
    bootstrap_interval,
    compare,
    comparison_table,
    mcnemar_p_value,
    newcombe_interval,
    ratio_interval,
    sign_flip_p_value,
)
from optimum_cap.evaluation.results import (
    AccuracyResult,
    Answer,
    Choice,
    ChoiceResult,
    Evaluation,
    HarnessMetric,
    HarnessResult,
    PerplexityResult,
    Result,
    Window,
)


def evaluation(model: str, **tasks: Result) -> Evaluation:
    return Evaluation(model, tasks, {}, {}, 0.0)


def compared(dense: Evaluation, pruned: Evaluation) -> dict[str, MetricComparison]:
    """The comparison of the only task, by metric."""
    (found,) = compare(dense, pruned).values()
    assert not isinstance(found, str), found
    return {comparison.metric: comparison for comparison in found}


def answers(right: str, digests: str | None = None) -> AccuracyResult:
    """One item per character: `1` is right; the digests are letters."""
    digests = digests or "abcdefghijklmnopqrstuvwxyz"[: len(right)]
    items = (Answer(d, r == "1", None, 4, False) for d, r in zip(digests, right, strict=True))
    return AccuracyResult(tuple(items), 0, 8, {})


def windows(*losses: float | None, tokens: int = 10) -> PerplexityResult:
    items = (Window(str(index), nll, tokens) for index, nll in enumerate(losses))
    return PerplexityResult(tuple(items), 0, tokens + 1, {})


@pytest.mark.parametrize(
    ("won", "lost"), [(0, 0), (1, 0), (5, 5), (2, 12), (12, 2), (0, 10), (30, 45)]
)
def test_mcnemar_is_the_exact_binomial_test(won: int, lost: int) -> None:
    total = won + lost
    chances = [math.comb(total, k) / 2**total for k in range(total + 1)]
    # Outcomes as likely as the observed one, or less.
    expected = sum(chance for chance in chances if chance <= chances[won] * (1 + 1e-9))
    assert mcnemar_p_value(won, lost) == pytest.approx(min(1.0, expected))


@pytest.mark.parametrize(
    ("both", "won", "lost", "neither"), [(2, 9, 7, 3), (36, 12, 2, 10), (60, 5, 9, 40)]
)
def test_newcombe_interval_joins_wilson_intervals_with_the_correlation(
    both: int, won: int, lost: int, neither: int
) -> None:
    counts = np.array([both, won, lost, neither])
    first, second = (np.repeat(flags, counts) for flags in ([1, 0, 1, 0], [1, 1, 0, 0]))
    total, excess = counts.sum(), both * neither - won * lost
    correlation = np.corrcoef(first, second)[0, 1]
    if excess > 0:  # corrected for continuity, towards 0
        correlation *= max(excess - total / 2, 0) / excess
    limits = [
        binomtest(int(flags.sum()), int(total)).proportion_ci(0.95, method="wilson")
        for flags in (first, second)
    ]
    p, q = first.mean(), second.mean()
    below = np.array([q - limits[1].low, limits[0].high - p])
    above = np.array([limits[1].high - q, p - limits[0].low])
    joined = np.array([[1, -correlation], [-correlation, 1]])
    expected = (
        q - p - np.sqrt(below @ joined @ below),
        q - p + np.sqrt(above @ joined @ above),
    )
    assert newcombe_interval(both, won, lost, neither) == pytest.approx(expected, abs=1e-6)


def test_newcombe_interval_is_antisymmetric_and_holds_the_difference() -> None:
    for both, won, lost, neither in itertools.product((0, 1, 7), repeat=4):
        if not (total := both + won + lost + neither):
            continue
        low, high = newcombe_interval(both, won, lost, neither)
        assert low - 1e-9 <= (won - lost) / total <= high + 1e-9
        assert newcombe_interval(both, lost, won, neither) == pytest.approx((-high, -low))


def test_newcombe_interval_covers_the_truth_in_95_per_cent() -> None:
    chances = np.array([0.6, 0.15, 0.05, 0.2])
    drawn = np.random.default_rng(0).multinomial(100, chances, size=2000)
    inside = [low <= 0.1 <= high for low, high in (newcombe_interval(*map(int, d)) for d in drawn)]
    assert 0.93 <= np.mean(inside) <= 0.98


def test_bootstrap_interval_covers_the_truth_in_about_95_per_cent() -> None:
    generator = np.random.default_rng(0)
    tokens = np.full(40, 100.0)
    inside = []
    for _ in range(60):
        text = generator.normal(2.0, 0.3, 40)  # what both models find hard
        dense, pruned = (text + generator.normal(shift, 0.02, 40) for shift in (0.0, 0.1))
        low, high = bootstrap_interval(100 * np.stack([dense, pruned], axis=1), tokens)
        truth = math.exp(2.1) - math.exp(2.0)
        inside.append(low <= truth <= high)
        # Paired: far narrower than the spread of the text itself would make it.
        assert high - low < 0.5
    assert np.mean(inside) >= 0.85


def test_items_are_paired_by_digest() -> None:
    found = compared(
        evaluation("dense", task=answers("1100", "abcd")),
        evaluation("pruned", task=answers("10111", "dcbxy")),
    )["accuracy"]
    assert (found.n, found.only_dense, found.only_pruned) == (3, 1, 2)
    # b: right, right; c: wrong, wrong; d: wrong, right.
    assert (found.dense, found.pruned) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found.p_value == 1.0
    assert found.interval == newcombe_interval(1, 1, 0, 1)


def test_equal_items_pair_in_their_order() -> None:
    found = compared(
        evaluation("dense", task=answers("10", "aa")), evaluation("pruned", task=answers("0", "a"))
    )["accuracy"]
    assert (found.n, found.only_dense, found.dense, found.pruned) == (1, 1, 1.0, 0.0)


def test_perplexities_over_common_windows() -> None:
    dense = evaluation("dense", text=windows(10.0, 20.0, 30.0, 90.0))
    pruned = evaluation("pruned", text=windows(11.0, 22.0, 33.0))
    found = compared(dense, pruned)["perplexity"]
    assert (found.n, found.only_dense, found.p_value) == (3, 1, None)
    assert found.dense == pytest.approx(math.exp(2.0))
    assert found.pruned == pytest.approx(math.exp(2.2))
    assert found.interval is not None
    assert 0 < found.interval[0] < found.difference < found.interval[1]
    table = comparison_table(dense, pruned, None)
    assert "text: dropped 1 items that only the dense model has and 0" in table
    assert compared(dense, dense)["perplexity"].interval == (0.0, 0.0)


def test_one_window_has_no_interval() -> None:
    one = evaluation("one", text=windows(10.0))
    assert compared(one, one)["perplexity"].interval is None


def test_a_perplexity_that_is_not_finite_is_said_and_the_rest_compared() -> None:
    dense = evaluation("dense", task=answers("10"), text=windows(10.0, 20.0))
    pruned = evaluation("pruned", task=answers("11"), text=windows(10.0, None))
    found = compare(dense, pruned)
    assert isinstance(found["text"], str)
    assert "for pruned, the perplexity is not finite" in found["text"]
    assert not isinstance(found["task"], str)
    huge = evaluation("huge", text=windows(1e5, 1e5))
    assert "overflows" in huge.errors["text"]


def test_what_cannot_be_compared_is_refused() -> None:
    dense = evaluation("dense", task=answers("10"))
    with pytest.raises(ValueError, match="have no task in common: evaluate both"):
        compare(dense, evaluation("pruned", other=answers("10")))
    with pytest.raises(ValueError, match="evaluation of dense has no task 'other', only task"):
        compare(dense, evaluation("pruned", task=answers("1"), other=answers("10")), ["other"])
    with pytest.raises(ValueError, match="dense and pruned have no item in common"):
        compare(dense, evaluation("pruned", task=answers("11", "xy")))
    with pytest.raises(ValueError, match="by accuracy for dense, but by perplexity for pruned"):
        compare(dense, evaluation("pruned", task=windows(1.0)))


# Lengths, choices, and what the harness reports


def lengths(*tokens: int, seconds: float = 0.0, limit: int = 100) -> AccuracyResult:
    """One answer per length, wrong and cut off at the limit."""
    items = (
        Answer(str(index), False, "1", count, count >= limit) for index, count in enumerate(tokens)
    )
    return AccuracyResult(tuple(items), 0, limit, {}, seconds=seconds)


def test_answers_are_compared_by_length_limit_and_time() -> None:
    dense = evaluation("dense", task=lengths(10, 20, 30, 40, seconds=2.0))
    pruned = evaluation("pruned", task=lengths(20, 40, 60, 100, seconds=5.0))
    found = compared(dense, pruned)
    tokens = found["tokens per answer"]
    assert (tokens.dense, tokens.pruned) == (25.0, 55.0)
    assert tokens.change == pytest.approx(1.2)
    assert tokens.interval is not None
    assert 1.0 <= tokens.interval[0] < 1.2 < tokens.interval[1] < 1.5
    assert (found["at limit"].dense, found["at limit"].pruned) == (0.0, 0.25)
    assert found["at limit"].interval == newcombe_interval(0, 1, 0, 3)
    assert found["no answer"].p_value == 1.0
    seconds = found["seconds per answer"]
    assert (seconds.dense, seconds.pruned, seconds.interval) == (0.5, 1.25, None)
    table = comparison_table(dense, pruned, None)
    assert re.search(r"tokens per answer +4 +25\.0 +55\.0 +\+120\.0 % +\+1\d\d\.\d to \+1", table)
    assert re.search(r"seconds per answer +4 +0\.5 +1\.25 +\+150\.0 % +- +-", table)


@pytest.mark.slow
def test_the_interval_of_the_ratio_of_lengths_covers_the_truth() -> None:
    generator = np.random.default_rng(0)
    inside = []
    for _ in range(60):
        dense = generator.gamma(4.0, 50.0, 80)
        pruned = 1.3 * dense * generator.uniform(0.8, 1.2, 80)
        low, high = ratio_interval(np.stack([dense, pruned], axis=1))
        inside.append(low <= 0.3 <= high)
        assert high - low < 0.12  # paired: the spread of the lengths themselves cancels
    assert np.mean(inside) >= 0.87


def test_the_sign_flip_test_is_exact_up_to_its_draws() -> None:
    differences = np.array([1.0, 2.0, -3.0, 4.0, 5.0])
    signs = itertools.product((-1, 1), repeat=5)
    sums = [abs(np.dot(each, differences)) for each in signs]
    exact = np.mean([total >= differences.sum() - 1e-9 for total in sums])
    assert sign_flip_p_value(differences) == pytest.approx(exact, abs=0.02)
    assert sign_flip_p_value(np.zeros(4)) == 1.0


def test_a_dense_model_without_answers_is_told() -> None:
    silent = evaluation("dense", task=answers("0000"))
    table = comparison_table(silent, silent, None)
    assert (
        "WARNING: task: the dense model gives no answer that can be extracted in 4 of 4 responses"
        in table
    )
    assert "--log-samples" in table
    assert "--num-fewshot" in table
    speaks = evaluation("dense", task=lengths(1, 2, 3))
    assert "WARNING" not in comparison_table(speaks, speaks, None)


def test_prompts_with_other_examples_are_not_compared() -> None:
    plain = lengths(1, 2)
    shown = dataclasses.replace(plain, examples=("x", "y"))
    others = dataclasses.replace(plain, examples=("x", "z"))
    with pytest.raises(ValueError, match=r"show different worked examples \(0 and 2\): evaluate"):
        compare(evaluation("dense", task=plain), evaluation("pruned", task=shown))
    with pytest.raises(ValueError, match=r"show different worked examples \(other ones\)"):
        compare(evaluation("dense", task=others), evaluation("pruned", task=shown))
    longer = dataclasses.replace(plain, max_new_tokens=50)
    table = comparison_table(
        evaluation("dense", task=plain), evaluation("pruned", task=longer), None
    )
    assert "task: answers of the dense model could have 100 tokens, those of the pruned" in table


def test_choices_are_compared_by_both_accuracies() -> None:
    def choices(*chosen: tuple[int, int]) -> ChoiceResult:
        items = (Choice(str(index), 0, (-1.0, -2.0), *pair) for index, pair in enumerate(chosen))
        return ChoiceResult(tuple(items), 0, {})

    found = compared(
        evaluation("dense", task=choices((0, 0), (0, 1), (1, 1))),
        evaluation("pruned", task=choices((0, 0), (1, 0), (1, 0))),
    )
    assert [(each.metric, each.dense, each.pruned) for each in found.values()] == [
        ("acc", pytest.approx(2 / 3), pytest.approx(1 / 3)),
        ("acc_norm", pytest.approx(1 / 3), 1.0),
    ]
    assert found["acc"].interval == newcombe_interval(1, 0, 1, 1)
    assert found["acc_norm"].p_value == mcnemar_p_value(2, 0)


def test_metrics_of_the_harness_are_compared_by_their_standard_errors() -> None:
    def report(value: float, error: float | None, n: int = 10) -> HarnessResult:
        items = (HarnessMetric("t", "acc,none", value, error, n),)
        return HarnessResult(items, {"t": 0}, {"t": "1.0"})

    dense = evaluation("dense", **{"lm_eval:t": report(0.5, 0.03)})
    pruned = evaluation("pruned", **{"lm_eval:t": report(0.4, 0.04)})
    found = compared(dense, pruned)["acc,none"]
    assert found.difference == pytest.approx(-0.1)
    assert found.interval == pytest.approx((-0.1 - 1.96 * 0.05, -0.1 + 1.96 * 0.05), abs=1e-4)
    exact = evaluation("pruned", **{"lm_eval:t": report(0.4, None)})
    assert compared(dense, exact)["acc,none"].interval is None
    fewer = evaluation("pruned", **{"lm_eval:t": report(0.4, 0.04, 5)})
    with pytest.raises(ValueError, match="lm_eval:t has different numbers of items for dense"):
        compare(dense, fewer)
