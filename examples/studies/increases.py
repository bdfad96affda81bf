"""A recipe of a study against the best of the others at each sparsity: what the loss gains.

    python examples/studies/increases.py runs/quality/results.csv causal
    python examples/studies/increases.py runs/quality/results.csv causal --against paper

The loss (or perplexity) is the mean over tasks, its increase that over the dense model, the best
peer the one with the lowest. ± is the 95 % interval over seeds (Student's t). Accuracies are
compared task by task, each with the peer that is the best there, in points.
"""

import argparse
import csv
from pathlib import Path
from statistics import fmean

from optimum_cap.evaluation import mean_and_interval

Seeds = dict[str, float]
"""Values by seed; of a recipe that uses no data the one value has the seed 0."""


def read(path: Path, metric: str) -> dict[str, dict[float, dict[str, dict[str, Seeds]]]]:
    """Return values by model, sparsity (0 is dense), recipe, task and seed."""
    found: dict[str, dict[float, dict[str, dict[str, Seeds]]]] = {}
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["metric"] == metric and row["value"]:
                recipes = found.setdefault(row["model"], {}).setdefault(float(row["sparsity"]), {})
                seeds = recipes.setdefault(row["recipe"], {}).setdefault(row["task"], {})
                seeds[row["seed"]] = float(row["value"])
    return found


def over_tasks(tasks: dict[str, Seeds]) -> list[float]:
    """Mean over tasks, per seed."""
    seeds = sorted(next(iter(tasks.values())))
    return [fmean(own[seed] for own in tasks.values()) for seed in seeds]


def shown(values: list[float], digits: str = ".2g", factor: float = 1) -> str:
    mean, half = mean_and_interval([factor * value for value in values])
    return f"{mean:{digits}}" + ("" if half is None else f" ± {half:{digits.lstrip('+')}}")


def points(ours: Seeds, peers: dict[str, Seeds]) -> str:
    """Difference of accuracies to the best of the peers, in points."""
    name = max(peers, key=lambda peer: fmean(peers[peer].values()))
    alone = fmean(peers[name].values())
    paired = peers[name].keys() == ours.keys()
    return shown([v - (peers[name][s] if paired else alone) for s, v in ours.items()], "+.1f", 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.csv of a study")
    parser.add_argument("recipe")
    parser.add_argument("--against", nargs="+", help="peers (default: all others but the paper's)")
    arguments = parser.parse_args()
    ours, accuracy = arguments.recipe, read(arguments.results, "accuracy")
    losses = read(arguments.results, "loss") or read(arguments.results, "perplexity")
    print("| model | sparsity | best peer | its increase | ours | ratio | accuracy, points |")
    print("|---" * 7 + "|")
    for model, sparsities in losses.items():
        [dense] = over_tasks(sparsities[0.0]["dense"])
        for sparsity, recipes in sorted(sparsities.items()):
            if ours not in recipes:
                continue
            names = arguments.against or [name for name in recipes if name not in (ours, "paper")]
            increases = {
                name: [value - dense for value in over_tasks(recipes[name])]
                for name in (*names, ours)
            }
            best = min(names, key=lambda name: fmean(increases[name]))
            ratio = "-"  # of nothing
            if (theirs := fmean(increases[best])) > 0:
                ratio = f"{fmean(increases[ours]) / theirs:.2f}"
            answers = accuracy.get(model, {}).get(sparsity, {})
            gained = [
                points(own, {name: answers[name][task] for name in names})
                for task, own in answers.get(ours, {}).items()
            ]
            print(
                f"| {model} | {sparsity:.0%} | {best} | {shown(increases[best])} | "
                f"{shown(increases[ours])} | {ratio} | {', '.join(gained)} |"
            )


if __name__ == "__main__":
    main()
