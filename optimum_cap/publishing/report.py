"""A page about a checkpoint: facts, results, pictures, settings and record in one HTML file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from transformers.utils import logging

from optimum_cap.checkpoint import (
    RECORD_NAME,
    RESULTS_NAME,
    CheckpointSummary,
    PruningRecord,
    count_zeros,
    describe_answers,
    describe_recovery,
    describe_refinement,
    describe_removal,
    file_of_checkpoint,
    heat_map,
    inspect_checkpoint,
    sparsity_picture,
)
from optimum_cap.config import CAPConfig
from optimum_cap.publishing.results import TaskResults, load_results, result_tables
from optimum_cap.runtime import write_atomically
from optimum_cap.text import enumeration, format_size, printable, printable_values, public_name
from optimum_cap.version import __version__

logger = logging.get_logger(__name__)

_SITES_SHOWN = 20


@dataclass(frozen=True)
class _Picture:
    title: str
    text: str
    svg: Markup


@dataclass(frozen=True)
class _Table:
    title: str
    rows: list[list[str]]
    text: str = ""
    numbers: bool = True


def write_html_report(
    path_or_repo: str,
    file: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Write a self-contained page about a checkpoint, which needs no other files and no network.

    Args:
        path_or_repo: Folder of the checkpoint, or its repository on the Hub. The weights are not
            read.
        file: File to write.
        revision: Branch, tag or commit of the repository.
        token: Token for the Hub.

    Raises:
        ValueError: It is not a CAP checkpoint, or its record or its results are damaged.
        FileNotFoundError: It is neither a folder nor a repository that can be read.
        OSError: The file cannot be written.
    """
    summary = inspect_checkpoint(path_or_repo, revision=revision, token=token)
    folder = file_of_checkpoint(path_or_repo, RECORD_NAME, revision=revision, token=token).parent
    try:  # to the same folder
        file_of_checkpoint(path_or_repo, RESULTS_NAME, revision=revision, token=token)
    except FileNotFoundError as error:  # most checkpoints have no results
        logger.warning(f"the report has no results: {error}")
    page = html_report(public_name(path_or_repo) or "", summary, load_results(folder))
    write_atomically(Path(file), page.encode("utf-8", "backslashreplace"))


def html_report(name: str, summary: CheckpointSummary, results: dict[str, TaskResults]) -> str:
    """Return the page.

    Args:
        name: Name of the checkpoint.
        summary: Its record and its sizes.
        results: Its evaluation results, by task.
    """
    # Names in a record are untrusted; the template escapes them for HTML.
    values = printable_values(summary.record.to_dict())
    record = PruningRecord.from_dict(values)
    template = files("optimum_cap.publishing").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    found = result_tables(results)
    shown = (found.compared, found.alone, found.lengths)
    return environment.from_string(template).render(
        title=printable(name.removeprefix("./")),
        summary=_sentence(record),
        facts=list(_facts(record, summary)),
        results=[printable_values(table) for table in shown if table],
        notes=[printable(note) for note in found.notes],
        answers=_answers(results),
        pictures=list(_pictures(record)),
        tables=list(_tables(record)),
        record=json.dumps(values, indent=2),
        version=__version__,
    )


def _sentence(record: PruningRecord) -> str:
    """Return a sentence that describes the model."""
    method = CAPConfig.from_dict(record.config).method
    base = record.base_model or "an unknown model"
    what = f"Pruned from {base} by recipe {record.config['recipe']}"
    return f"{what} (criterion {method.criterion}, allocation {method.allocation})."


def _facts(record: PruningRecord, summary: CheckpointSummary) -> Iterator[tuple[str, str]]:
    """Yield the facts at the top of the page."""
    if record.removed:
        removed = record.removed
        share = removed["parameters_after"] / max(removed["parameters_before"], 1)
        yield "parameters left", f"{removed['parameters_after']:,} ({share:.1%})"
        yield "size", format_size(summary.weight_bytes)
    else:
        yield "zeros", f"{record.sparsity:.2%}"
        yield "prunable weights", f"{record.total:,}"
        yield "size", format_size(summary.weight_bytes)
        yield "when dense", format_size(summary.dense_bytes)
    yield "format", summary.checkpoint_format
    if record.calibration:
        sources = [source["name"] for source in record.calibration.get("sources", [])]
        yield (
            "calibrated on",
            f"{record.config['num_samples']} examples of {enumeration(sources) or 'unknown data'}",
        )


def _answers(results: dict[str, TaskResults]) -> dict[str, str] | None:
    """Return the answers of both models to one question; `None` if there are none."""
    for name, task in results.items():
        if (pair := task.transcripts()) is not None:
            dense, pruned = pair
            return {
                "task": name,
                "question": dense.question.strip(),
                "dense": dense.response.strip(),
                "pruned": pruned.response.strip(),
            }
    return None


def _pictures(record: PruningRecord) -> Iterator[_Picture]:
    """Yield the pictures that the record has data for."""
    if record.matrices and not record.removed:
        yield _Picture(
            "Sparsity by layer and projection",
            "Share of zeros in each projection; the experts of a layer count as one.",
            Markup(sparsity_picture(record.matrices, inline=True)),
        )
    if (svg := _sensitivity_picture(record)) is not None:
        yield _Picture(
            "Sensitivity of each site",
            "Divergence of the predictions from those of the dense model if this site alone is "
            f"pruned, in nats per scored token ({record.sensitivities_are}). Colors are "
            "logarithmic.",
            svg,
        )
    if (svg := _score_picture(record)) is not None:
        yield _Picture(
            "Causal scores of attention heads",
            "Loss with the head switched off minus the loss without, in nats per token.",
            svg,
        )


def _sensitivity_picture(record: PruningRecord) -> Markup | None:
    cells: dict[tuple[str, int], float] = {}
    for site in record.sensitivities:
        if site.divergence is not None:
            cells[site.label.partition(".")[2], site.layer] = site.divergence
    return _heat_map(cells, "Sensitivity by layer and site", "{:.3g}", logarithmic=True)


def _score_picture(record: PruningRecord) -> Markup | None:
    heads = [score for score in record.scores if score.kind == "attention"]
    cells = {
        (f"head {score.unit}", score.layer): score.score
        for score in heads
        if score.score is not None
    }
    return _heat_map(cells, "Causal scores by layer and head", "{:+.4f}")


def _heat_map(
    cells: dict[tuple[str, int], float], title: str, form: str, logarithmic: bool = False
) -> Markup | None:
    """Return a heat map of values by row and layer; `None` if there are no values."""
    if not cells:
        return None
    rows = list(dict.fromkeys(row for row, _ in cells))
    layers = sorted({layer for _, layer in cells})
    return Markup(
        heat_map(
            {
                (rows.index(row), layers.index(layer)): value
                for (row, layer), value in cells.items()
            },
            rows=rows,
            columns=[str(layer) for layer in layers],
            title=title,
            form=form,
            column_label="layer",
            inline=True,
            logarithmic=logarithmic,
        )
    )


def _tables(record: PruningRecord) -> Iterator[_Table]:
    """Yield the tables of steps, settings, sensitivities and zeros."""
    yield _Table("What was done", [["step", "details"], *_steps(record)], numbers=False)
    yield _Table(
        "Settings",
        [["setting", "value", "default"], *_settings(record)],
        "Those that differ from their defaults come first.",
        numbers=False,
    )
    measured = [site for site in record.sensitivities if site.divergence is not None]
    measured.sort(key=lambda site: -(site.divergence or 0.0))
    if measured:
        rows = [
            [site.label, f"{site.divergence:.3g}", f"{site.sparsity:.1%}"]
            for site in measured[:_SITES_SHOWN]
        ]
        yield _Table(
            "Most sensitive sites",
            [["layer.site", f"nats per token, {record.sensitivities_are}", "sparsity"], *rows],
            f"{min(_SITES_SHOWN, len(measured))} of {len(measured)}.",
        )
    if record.matrices and not record.removed:
        sums: dict[str, list[int]] = {}
        for (_, projection), (zeros, total) in count_zeros(record.matrices).items():
            of_projection = sums.setdefault(projection, [0, 0])
            of_projection[0] += zeros
            of_projection[1] += total
        rows = [
            [name, f"{total:,}", f"{zeros / total:.2%}"] for name, (zeros, total) in sums.items()
        ]
        yield _Table("Zeros per projection", [["projection", "weights", "zeros"], *rows])
    versions = [[name, version] for name, version in record.versions.items()]
    yield _Table("Created with", [["library", "version"], *versions], numbers=False)


def _settings(record: PruningRecord) -> list[list[str]]:
    """Return a row per setting, with the default if the value differs from it."""
    method = CAPConfig.from_dict(record.config).method
    required = {name: record.config[name] for name in ("sparsity", "recipe")}
    defaults = CAPConfig(**required).to_dict()
    changed: list[list[str]] = []
    others: list[list[str]] = []
    for name, value in sorted(record.config.items()):
        if name == "quant_method":
            continue
        # A setting that is not set is the recipe's.
        effective = getattr(method, name, None) if value is None else value
        shown = "-" if effective is None else str(effective)
        if name in required:
            changed.insert(0, [name, shown, ""])
        elif value != defaults.get(name):
            changed.append([name, shown, str(defaults.get(name))])
        else:
            others.append([name, shown, ""])
    return [*changed, *others]


def _steps(record: PruningRecord) -> Iterator[list[str]]:
    """Yield a row per step of making the model."""
    revision = f" at revision {record.base_revision}" if record.base_revision else ""
    yield ["base model", f"{record.base_model or 'unknown'}{revision}"]
    for source in record.calibration.get("sources", []):
        details = ", ".join(
            f"{key} {value}"
            for key, value in source.items()
            if value is not None and not isinstance(value, list | dict)
        )
        yield ["calibration data", details]
    if answers := record.calibration.get("answers"):
        yield ["answers", describe_answers(answers)]
    if record.intact_loss is not None:
        yield ["loss of the dense model", f"{record.intact_loss:.4f} nats per scored token"]
    if record.removed:
        yield ["removed", describe_removal(record.removed)]
    if record.refine:
        yield ["refined", f"{describe_refinement(record.refine)} for each layer"]
    for recovery in record.recovery:
        yield ["recovered", describe_recovery(recovery)]
    for compacted in record.compacted:
        yield ["compacted", describe_removal(compacted)]
    for weights in record.dense:
        why = "left dense" if weights.prunable else "not supported, left dense"
        yield [why, f"{weights.name} ({weights.weights:,} weights)"]
