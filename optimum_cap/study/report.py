"""Reports of a study: Markdown tables and plots."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimum_cap.evaluation import mean_and_interval
from optimum_cap.study.study import DENSE, Study, read_cells
from optimum_cap.version import install_command

Row = dict[str, Any]

_METRICS = {
    "accuracy": "accuracy",
    "loss": "loss on worked answers, nats per token",
    "perplexity": "perplexity",
    "acc": "accuracy by the likelihood of the choices",
    "acc_norm": "accuracy by the likelihood per character of the choices",
    "tokens": "length of answers, tokens",
    "at_limit": "answers at the limit of their length",
}
_USAGE = {
    "seconds": "seconds",
    "cpu_seconds": "CPU seconds of all threads",
    "peak_memory": "peak memory of the process",
    "peak_gpu_memory": "peak memory of a GPU",
}
_SHARES = ("accuracy", "acc", "acc_norm", "at_limit")
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vPX*"
_UNITS = {"attention": "head", "mlp": "MLP unit", "expert": "expert unit"}
_WIDEST = 40  # units per layer up to which a heat map grows in width and has a tick per unit
_LINES = ("-", "--", ":")  # the style changes each time the colors repeat


def write_report(study: Study, rows: list[Row], folder: str | Path) -> list[Path]:
    """Write `results.md` and the plots.

    Args:
        study: The study.
        rows: The result of `run_study`.
        folder: Folder of the study.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed; the table is still written.
    """
    folder = Path(folder)
    table = folder / "results.md"
    table.write_text(markdown(rows), encoding="utf-8")
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"the table is in {table}, but plots need matplotlib ({error}): run "
            f"{install_command('report')}"
        ) from error
    matplotlib.use("Agg")
    return [table, *_curves(rows, folder), *_heat_maps(study, folder)]


def markdown(rows: list[Row]) -> str:
    """Return one table (recipes by sparsities) per model, calibration set, task and metric.

    Numbers are means over seeds with 95 % intervals; the last section lists failed cells.
    """
    lines = ["# Results", ""]
    for (model, calibration, task, metric), group in _groups(rows, _METRICS | _USAGE).items():
        dense = _values(group, DENSE, 0.0)
        sparsities = sorted({row["sparsity"] for row in group if row["recipe"] != DENSE})
        recipes = list(dict.fromkeys(row["recipe"] for row in group if row["recipe"] != DENSE))
        seeds = len({row["seed"] for row in group if row["recipe"] != DENSE})
        lines.append(f"## {model}: {task}, {(_METRICS | _USAGE)[metric]}")
        lines.append("")
        baseline = f"dense {_number(metric, dense)}" if dense else "dense not measured"
        note = "" if metric in _USAGE else f"; {baseline}"
        lines.append(f"Calibrated on {calibration}, {seeds} seed(s){note}.")
        lines.append("")
        lines.append(f"| recipe | {' | '.join(f'{value:.0%}' for value in sparsities)} |")
        lines.append("|---" * (len(sparsities) + 1) + "|")
        for recipe in recipes:
            cells = [_number(metric, _values(group, recipe, value)) for value in sparsities]
            lines.append(f"| {recipe} | {' | '.join(cells)} |")
        lines.append("")
    failed = [row for row in rows if row["error"]]
    if failed:
        lines += ["## Failed", ""]
        lines += [
            f"- {row['model']} {row['recipe']} {row['sparsity']:g} {row['calibration']} seed "
            f"{row['seed']}{' ' + row['task'] if row['task'] else ''}: {row['error']}"
            for row in failed
        ]
        lines.append("")
    return "\n".join(lines)


def _groups(
    rows: list[Row], metrics: Mapping[str, str]
) -> dict[tuple[str, str, str, str], list[Row]]:
    """Group rows by model, calibration set, task and metric; each group has the dense rows too."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    measured = [row for row in rows if row["metric"] in metrics]
    for row in measured:
        if row["recipe"] != DENSE:
            key = (row["model"], row["calibration"], row["task"], row["metric"])
            groups.setdefault(key, []).append(row)
    for (model, _, task, metric), group in groups.items():
        group += [
            row
            for row in measured
            if row["recipe"] == DENSE
            and (row["model"], row["task"], row["metric"]) == (model, task, metric)
        ]
    return groups


def _values(group: Iterable[Row], recipe: str, sparsity: float) -> list[float]:
    return [
        row["value"]
        for row in group
        if (row["recipe"], row["sparsity"]) == (recipe, sparsity) and row["value"] is not None
    ]


def _number(metric: str, values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, half = mean_and_interval(values)
    if metric in _SHARES:
        return f"{mean:.1%}" + ("" if half is None else f" ± {100 * half:.1f}")
    if metric in ("peak_memory", "peak_gpu_memory"):
        return f"{mean / 1e9:.3g} GB" + ("" if half is None else f" ± {half / 1e9:.2g}")
    return f"{mean:.4g}" + ("" if half is None else f" ± {half:.2g}")


def _curves(rows: list[Row], folder: Path) -> list[Path]:
    """Plot the metric against sparsity: one figure per model, calibration set and metric."""
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter, PercentFormatter

    figures: dict[tuple[str, str, str], list[tuple[str, list[Row]]]] = {}
    for (model, calibration, task, metric), group in _groups(rows, _METRICS).items():
        figures.setdefault((model, calibration, metric), []).append((task, group))
    files = []
    for (model, calibration, metric), tasks in figures.items():
        figure, axes = pyplot.subplots(
            1,
            len(tasks),
            figsize=(1.2 + 4.0 * len(tasks), 3.9),
            squeeze=False,
            layout="constrained",
        )
        for axis, (task, group) in zip(axes[0], tasks, strict=True):
            _curve(axis, metric, group)
            axis.set_title(task.removeprefix("tiny_reasoner_"))
            axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.set_xlabel("sparsity")
            if metric in _SHARES:
                axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            elif metric != "tokens":
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(LogFormatter())  # plain numbers instead of powers
                axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        if metric in _SHARES:
            lowest = min(axis.get_ylim()[0] for axis in axes[0])
            for axis in axes[0]:
                axis.set_ylim(max(-0.03, lowest), 1.02)
        axes[0][0].set_ylabel(_METRICS[metric])
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        figure.suptitle(f"{model}, calibrated on {calibration}")
        path = folder / f"{_slug(model)}_{_slug(calibration)}_{metric}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)
        files.append(path)
    return files


def _curve(axis: Any, metric: str, group: list[Row]) -> None:
    """Draw a line per recipe with 95 % intervals: over seeds, or of a single accuracy."""
    if dense := _values(group, DENSE, 0.0):
        axis.axhline(dense[0], color="#666666", linestyle=":", linewidth=1.2, label=DENSE)
    recipes = list(dict.fromkeys(row["recipe"] for row in group if row["recipe"] != DENSE))
    for index, recipe in enumerate(recipes):
        recipe_rows = [row for row in group if row["recipe"] == recipe and row["value"] is not None]
        sparsities = sorted({row["sparsity"] for row in recipe_rows})
        means, lows, highs = [], [], []
        for sparsity in sparsities:
            values = _values(recipe_rows, recipe, sparsity)
            mean, half = mean_and_interval(values)
            low, high = mean, mean
            if half is not None:
                low, high = mean - half, mean + half
            elif metric in _SHARES:
                (row,) = [row for row in recipe_rows if row["sparsity"] == sparsity]
                low, high = row["low"], row["high"]
            means.append(mean)
            lows.append(max(0.0, mean - low))
            highs.append(max(0.0, high - mean))
        axis.errorbar(
            sparsities,
            means,
            yerr=(lows, highs),
            color=_COLORS[index % len(_COLORS)],
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=_LINES[index // len(_COLORS) % len(_LINES)],
            markersize=4.5,
            linewidth=1.4,
            elinewidth=0.9,
            capsize=2.5,
            label=recipe,
        )
    axis.grid(alpha=0.25)


def _heat_maps(study: Study, folder: Path) -> list[Path]:
    """Plot heat maps of the causal scores, layers by units, per model and calibration set.

    Heads, MLP units and expert units have separate panels with the same color scale.
    """
    import numpy as np
    from matplotlib import pyplot
    from matplotlib.colors import SymLogNorm

    cell_scores: dict[tuple[str, str], dict[int | None, list[dict[str, Any]]]] = {}
    for cell, measured in read_cells(study, folder):
        if measured["scores"] and cell.calibration is not None:
            by_seed = cell_scores.setdefault((cell.label, cell.calibration), {})
            # Scores of all units take precedence over scores of heads only.
            if len(measured["scores"]) > len(by_seed.get(cell.seed, ())):
                by_seed[cell.seed] = measured["scores"]
    files = []
    for (model, calibration), by_seed in cell_scores.items():
        seed, scores = next(iter(by_seed.items()))
        panels = _score_panels(scores)
        layers = len(next(iter(panels.values())))
        widths = [0.55 * min(values.shape[1], _WIDEST) for values in panels.values()]
        figure, axes = pyplot.subplots(
            1,
            len(panels),
            figsize=(2.6 + sum(widths) + 0.6 * (len(panels) - 1), 1.8 + 0.42 * layers),
            width_ratios=widths,
            squeeze=False,
            layout="constrained",
        )
        largest = max(float(np.nanmax(np.abs(values), initial=0)) for values in panels.values())
        limit = largest or 1.0
        for axis, (kind, values) in zip(axes[0], panels.items(), strict=True):
            image = axis.imshow(
                values,
                cmap="RdBu_r",
                norm=SymLogNorm(limit / 20, vmin=-limit, vmax=limit),
                aspect="auto",
            )
            if values.size <= 400:
                _write_values(axis, values, limit)
            if values.shape[1] <= _WIDEST:
                axis.set_xticks(range(values.shape[1]))
            axis.set_yticks(range(layers))
            axis.set_xlabel(_UNITS[kind])
        axes[0][0].set_ylabel("layer")
        title = f"{model}, {calibration}, seed {seed}"
        if len(panels) == 1:
            axes[0][0].set_title(title, fontsize=10)
        else:
            figure.suptitle(title, fontsize=10)
        ticks = [-limit, -limit / 10, 0.0, limit / 10, limit]
        bar = figure.colorbar(image, ax=axes[0][-1], ticks=ticks, format="%.2g")
        bar.minorticks_off()
        bar.set_label("causal score, nats per token")
        path = folder / f"{_slug(model)}_{_slug(calibration)}_scores.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)
        files.append(path)
    return files


def _score_panels(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the scores by kind of unit, `[layers, units of a layer]`, padded with NaN."""
    import numpy as np

    layers = 1 + max(score["layer"] for score in scores)
    rows: dict[str, list[list[float]]] = {}
    for score in scores:
        kind_rows = rows.setdefault(score["kind"], [[] for _ in range(layers)])
        kind_rows[score["layer"]].append(np.nan if score["score"] is None else score["score"])
    panels = {}
    for kind in [kind for kind in _UNITS if kind in rows]:
        lists = rows[kind]
        panels[kind] = np.full((layers, max(map(len, lists))), np.nan)
        for layer, values in enumerate(lists):
            panels[kind][layer, : len(values)] = values
    return panels


def _write_values(axis: Any, values: Any, limit: float) -> None:
    """Write each score into its cell of the heat map."""
    import numpy as np

    for (layer, unit), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        axis.text(
            unit,
            layer,
            f"{value:.2g}" if abs(value) < 0.01 else f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if abs(value) > limit / 5 else "black",
        )


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)
