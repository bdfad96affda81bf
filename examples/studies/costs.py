"""Recipes of a study at one sparsity: what is lost, against the best peer, and what pruning took.

    python examples/studies/costs.py runs/smollm2/results.csv 0.5
    python examples/studies/costs.py runs/smollm2/results.csv 0.5 --plot runs/smollm2/costs.png

The loss is the mean over tasks, its increase that over the dense model. The ratio divides it by the
increase of the best peer with the same seed; the best peer is the one with the lowest mean. ± is
the 95 % interval over seeds (Student's t). Memory is the peak of the process in GB.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from increases import over_tasks, read, shown

PEERS = ("magnitude", "wanda", "sparsegpt", "owl_sparsegpt")
COLUMNS = ("recipe", "loss", "increase", "ratio", "perplexity", "seconds", "CPU seconds", "memory")
USAGE = {"seconds": (".0f", 1), "cpu_seconds": (".0f", 1), "peak_memory": (".2f", 1e-9)}

Values = dict[str, list[float]]
"""Values by recipe, one per seed."""


def values_of(path: Path, metric: str, sparsity: float) -> dict[str, Values]:
    """Return the means over tasks by model and recipe, the dense model's among them."""
    found = {}
    for model, sparsities in read(path, metric).items():
        recipes = {**sparsities.get(0.0, {}), **sparsities.get(sparsity, {})}
        found[model] = {recipe: over_tasks(tasks) for recipe, tasks in recipes.items()}
    return found


def increases_of(losses: Values) -> Values:
    [dense] = losses["dense"]
    return {
        recipe: [value - dense for value in values]
        for recipe, values in losses.items()
        if recipe != "dense"
    }


def ratios(increases: Values, peers: list[str]) -> Values:
    """Divide increases by those of the best peer, seed by seed; empty if that one loses nothing."""
    names = [name for name in peers if name in increases]
    if not names:
        return {}
    best = increases[min(names, key=lambda name: fmean(increases[name]))]
    if min(best) <= 0:
        return {}
    return {
        recipe: [ours / theirs for ours, theirs in zip(values, best, strict=True)]
        for recipe, values in increases.items()
        if len(values) == len(best)
    }


def table(path: Path, sparsity: float, peers: list[str]) -> list[str]:
    """Return the lines of the table, one per model and recipe."""
    losses = values_of(path, "loss", sparsity)
    perplexities = values_of(path, "perplexity", sparsity)
    usage = {metric: values_of(path, metric, sparsity) for metric in USAGE}
    lines = [f"| model | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for model, of_model in losses.items():
        increases = increases_of(of_model)
        columns: list[tuple[Values, Callable[[list[float]], str]]] = [
            (of_model, lambda values: shown(values, ".3f")),
            (increases, lambda values: shown(values, ".3f")),
            (ratios(increases, peers), lambda values: shown(values, ".2f")),
            (perplexities.get(model, {}), lambda values: shown(values, ".1f")),
        ]
        for metric, (digits, factor) in USAGE.items():
            shown_usage = _shown_with(digits, factor)
            columns.append((usage[metric].get(model, {}), shown_usage))
        for recipe in of_model:
            cells = [form(values[recipe]) if recipe in values else "" for values, form in columns]
            lines.append(f"| {model} | {recipe} | {' | '.join(cells)} |")
    return lines


def _shown_with(digits: str, factor: float) -> Callable[[list[float]], str]:
    return lambda values: shown(values, digits, factor)


def plot(path: Path, sparsity: float, file: Path) -> None:
    """Draw the loss increase against the CPU seconds of pruning, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = values_of(path, "loss", sparsity)
    seconds = values_of(path, "cpu_seconds", sparsity)
    figure, axes = pyplot.subplots(
        1, len(losses), figsize=(5.5 * len(losses), 4), squeeze=False, layout="constrained"
    )
    for axis, (model, of_model) in zip(axes[0], losses.items(), strict=True):
        for recipe, values in increases_of(of_model).items():
            if recipe not in seconds.get(model, {}):
                continue
            x, y = fmean(seconds[model][recipe]), fmean(values)
            axis.plot(x, y, "o")
            axis.annotate(recipe, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axis.set_xscale("log")
        axis.set_xlabel("CPU seconds of pruning")
        axis.set_title(f"{model}, {sparsity:.0%}")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("increase of the loss, nats per token")
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.csv of a study")
    parser.add_argument("sparsity", type=float)
    parser.add_argument("--peers", nargs="+", default=PEERS, help="default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw loss against time")
    arguments = parser.parse_args()
    print("\n".join(table(arguments.results, arguments.sparsity, list(arguments.peers))))
    if arguments.plot:
        plot(arguments.results, arguments.sparsity, arguments.plot)


if __name__ == "__main__":
    main()
