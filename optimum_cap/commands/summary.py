"""Summaries and tables of a checkpoint that the commands print."""

from typing import TYPE_CHECKING

from optimum_cap.text import aligned, format_duration, format_size

if TYPE_CHECKING:
    from optimum_cap.checkpoint import CheckpointSummary, MatrixSparsity, SiteSensitivity, UnitScore
    from optimum_cap.runtime import Usage

_UNITS_SHOWN = 5
_SITES_SHOWN = 10


def summary_rows(summary: "CheckpointSummary") -> list[tuple[str, str]]:
    """Return rows of label and value: units, weights, sparsity, threshold, size."""
    from optimum_cap.checkpoint import (
        describe_answers,
        describe_recovery,
        describe_refinement,
        describe_removal,
    )

    record = summary.record
    rows: list[tuple[str, str]] = []
    if record.scores:
        rows.append(scored_row([(score.kind, score.layer) for score in record.scores]))
        rows += _ranked(record.scores)
    if answers := record.calibration.get("answers"):
        rows.append(("answers", describe_answers(answers)))
    if record.refine:
        rows.append(("refined", f"{describe_refinement(record.refine)} for each layer"))
    rows += [("recovered", describe_recovery(each)) for each in record.recovery]
    if record.removed:
        rows.append(("removed", describe_removal(record.removed)))
    rows += [("compacted", describe_removal(each)) for each in record.compacted]
    if record.removed:
        return [*rows, ("size", format_size(summary.weight_bytes))]
    for label, dense in (
        ("unsupported", record.unsupported),
        ("left dense", [each for each in record.dense if each.prunable]),
    ):
        if dense:
            names = ", ".join(f"{each.name} ({each.weights:,})" for each in dense)
            rows.append((label, f"{record.share_of(dense):.1%} of the linear weights: {names}"))
    share = summary.weight_bytes / summary.dense_bytes
    rows += [
        ("zeros", f"{record.zeros:,} of {record.total:,} prunable weights"),
        ("sparsity", f"{record.sparsity:.6f} ({record.config.get('sparsity')} requested)"),
    ]
    if record.threshold is not None:
        rows.append(("threshold", f"{record.threshold:.6g} (importance)"))
    size = f"{format_size(summary.weight_bytes)} {summary.checkpoint_format}"
    rows.append(("size", f"{size}, {share:.1%} of {format_size(summary.dense_bytes)} dense"))
    return rows


def usage_rows(usage: "Usage") -> list[tuple[str, str]]:
    """Return time and peak memory as labels and values."""
    rows = [("time", format_duration(usage.seconds))]
    memory = [
        f"{format_size(size)}{where} at the peak"
        for size, where in ((usage.peak_memory, ""), (usage.peak_gpu_memory, " of a GPU"))
        if size is not None
    ]
    return [*rows, ("memory", ", ".join(memory))] if memory else rows


def scored_row(units: "list[tuple[str, int]]") -> tuple[str, str]:
    """Return a row with the number of scored units, given the kind and layer of each."""
    from optimum_cap.checkpoint import count_units

    layers = len({layer for _, layer in units})
    if all(kind == "attention" for kind, _ in units):
        return "heads", f"{len(units)} scored in {layers} layers"
    return "units", f"{count_units(kind for kind, _ in units)} scored in {layers} layers"


def sparsity_table(matrices: "list[MatrixSparsity]") -> str:
    """Return a table of the sparsity per layer (rows) and projection (columns).

    The experts of a layer share one cell; `-` marks projections that a layer does not have or that
    were left dense.
    """
    from optimum_cap.checkpoint import count_zeros, short_names

    counts = count_zeros(matrices)
    layers = sorted({layer for layer, _ in counts})
    projections = list(dict.fromkeys(projection for _, projection in counts))

    def share(cells: list[tuple[int, int]]) -> str:
        total = sum(total for _, total in cells)
        return f"{sum(zeros for zeros, _ in cells) / total:.3f}" if total else "-"

    def row(name: str, of: list[int]) -> list[str]:
        cells = [
            [counts[layer, projection] for layer in of if (layer, projection) in counts]
            for projection in projections
        ]
        return [name, *map(share, cells), share([cell for column in cells for cell in column])]

    rows = [["layer", *short_names(projections), "all"]]
    rows += [row(str(layer), [layer]) for layer in layers]
    rows.append(row("all", layers))
    return aligned(rows)


def sensitivity_table(sensitivities: "list[SiteSensitivity]") -> str:
    """Return a table of the sites whose pruning changes the predictions the most and the least.

    One line counts the sites in between.
    """
    ranked = sorted(
        sensitivities,
        key=lambda site: float("inf") if site.divergence is None else site.divergence,
        reverse=True,
    )

    def row(site: "SiteSensitivity") -> list[str]:
        measured = (site.divergence, site.standard_error)
        numbers = ["-" if number is None else f"{number:.3g}" for number in measured]
        return [site.label, *numbers, f"{site.sparsity:.3f}"]

    rows = [["layer.site", "nats per token", "standard error", "sparsity"], *map(row, ranked)]
    if (left := len(ranked) - 2 * _SITES_SHOWN) > 0:
        rows[_SITES_SHOWN + 1 : -_SITES_SHOWN] = [[f"{left} more", "", "", ""]]
    return aligned(rows)


def _ranked(scores: "list[UnitScore]") -> list[tuple[str, str]]:
    """Return the units with the highest and the lowest scores as two rows."""
    finite = sorted(
        (score for score in scores if score.score is not None),
        key=lambda score: score.score or 0.0,
        reverse=True,
    )
    if not finite:
        return []

    def line(chosen: "list[UnitScore]") -> str:
        return ", ".join(f"{unit.label} ({unit.score:+.4f})" for unit in chosen)

    named = "layer.head" if all(unit.kind == "attention" for unit in scores) else "layer.unit"
    return [
        ("most needed", line(finite[:_UNITS_SHOWN]) + f"  {named} (nats per token)"),
        ("least needed", line(finite[: -_UNITS_SHOWN - 1 : -1])),
    ]
