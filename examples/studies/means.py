"""Means over tasks of a study: a line per recipe, loss and accuracy for each model.

    python examples/studies/means.py runs/ablation/results.csv 0.7

± is the 95 % interval over seeds (Student's t).
"""

import argparse
from pathlib import Path

from increases import over_tasks, read, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.csv of a study")
    parser.add_argument("sparsity", type=float)
    arguments = parser.parse_args()
    metrics = {"loss": (".4f", 1), "perplexity": (".2f", 1), "accuracy": (".1f", 100)}
    columns, cells = [], {}
    for metric, (digits, factor) in metrics.items():
        for model, sparsities in read(arguments.results, metric).items():
            columns.append(f"{model}, {metric}")
            for recipe, tasks in {**sparsities[0.0], **sparsities[arguments.sparsity]}.items():
                value = shown(over_tasks(tasks), digits, factor)
                cells.setdefault(recipe, {})[columns[-1]] = value
    print(f"| recipe | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for recipe, own in cells.items():
        print(f"| {recipe} | {' | '.join(own.get(column, '-') for column in columns)} |")


if __name__ == "__main__":
    main()
