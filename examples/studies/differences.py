"""Two recipes of a study side by side, paired by seed.

    python examples/studies/differences.py runs/reproduction/results.csv paper wanda
    python examples/studies/differences.py runs/off_task/results.csv paper@reasoning paper@wikitext

Prints the mean over seeds of each, and of their difference with its 95 % interval (Student's t);
of losses and perplexities the difference of the logarithms, as a ratio.
"""

import argparse
import csv
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from optimum_cap.evaluation import mean_and_interval

Key = tuple[str, str, str, float]


def read(path: Path, recipe: str) -> dict[Key, dict[str, float]]:
    """Return the values of `RECIPE` or `RECIPE@CALIBRATION` by cell and seed."""
    name, _, calibration = recipe.partition("@")
    found: dict[Key, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["recipe"] == name and calibration in ("", row["calibration"]) and row["value"]:
                key = (row["model"], row["task"], row["metric"], float(row["sparsity"]))
                found.setdefault(key, {})[row["seed"]] = float(row["value"])
    if not found:
        raise SystemExit(f"{path} has no values of {recipe}")
    return found


def compared(
    first: dict[Key, dict[str, float]], second: dict[Key, dict[str, float]], metrics: list[str]
) -> Iterator[str]:
    """Yield a line of the table per cell that both have."""
    for key, ours in first.items():
        theirs = second.get(key, {})
        seeds = sorted(ours.keys() & theirs.keys())
        model, task, metric, sparsity = key
        if not seeds or metric not in metrics:
            continue
        pairs = [(ours[seed], theirs[seed]) for seed in seeds]
        means = [fmean(values) for values in zip(*pairs, strict=True)]
        if metric == "accuracy":
            shown = [f"{100 * mean:.1f}" for mean in means]
            mean, half = mean_and_interval([100 * (a - b) for a, b in pairs])
            difference = f"{mean:+.1f}" + ("" if half is None else f" ± {half:.1f}")
        else:
            shown = [f"{mean:.4g}" for mean in means]
            mean, half = mean_and_interval([math.log(a / b) for a, b in pairs])
            difference = f"{math.exp(mean):.2f} times"
            if half is not None:
                difference += f" ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})"
        cells = (model, task, metric, f"{sparsity:.0%}", *shown, difference, str(len(seeds)))
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.csv of a study")
    parser.add_argument("first", help="RECIPE or RECIPE@CALIBRATION")
    parser.add_argument("second", help="RECIPE or RECIPE@CALIBRATION")
    parser.add_argument("--metrics", nargs="+", default=["accuracy", "loss", "perplexity"])
    arguments = parser.parse_args()
    first, second = (read(arguments.results, name) for name in (arguments.first, arguments.second))
    print(
        f"| model | task | metric | sparsity | {arguments.first} | {arguments.second} | "
        "difference | seeds |"
    )
    print("|---" * 8 + "|")
    for line in compared(first, second, arguments.metrics):
        print(line)


if __name__ == "__main__":
    main()
