"""Results of a checkpoint: stored next to its weights, and shown on its model card."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from optimum_cap.checkpoint import (
    CARD_NAME,
    RECORD_NAME,
    RESULTS_NAME,
    plain_markdown,
    read_card,
    read_record,
    read_results,
    with_results,
    write_results,
)
from optimum_cap.evaluation import (
    COLUMNS,
    AccuracyResult,
    ChoiceResult,
    Evaluation,
    HarnessResult,
    LossResult,
    MetricComparison,
    PerplexityResult,
    Result,
    Transcript,
    compare,
)
from optimum_cap.runtime import write_atomically
from optimum_cap.text import enumeration, printable, public_name

_OF_THE_MACHINE = "seconds per answer"  # not comparable across machines
_LONGEST = 2000  # characters of a question or an answer that a card shows
_LENGTH_COLUMNS = 7  # of `Evaluation.length_rows`: all but the time


@dataclass(frozen=True)
class TaskResults:
    """The results on one task.

    Attributes:
        pruned: Evaluation of the checkpoint on this task alone.
        dense: The same for the dense model; `None` if it was not measured.
    """

    pruned: Evaluation
    dense: Evaluation | None = None

    def comparisons(self) -> list[MetricComparison] | str | None:
        """Return the comparisons, or why there are none; `None` without a dense result."""
        if self.dense is None:
            return None
        (comparisons,) = compare(self.dense, self.pruned).values()
        return comparisons

    def transcripts(self) -> tuple[Transcript, Transcript] | None:
        """Return both responses to the first common question; `None` if there is none."""
        if self.dense is None:
            return None
        dense, pruned = (
            {each.digest: each for each in _transcripts(evaluation)}
            for evaluation in (self.dense, self.pruned)
        )
        shared = next((digest for digest in dense if digest in pruned), None)
        return None if shared is None else (dense[shared], pruned[shared])


def _transcripts(evaluation: Evaluation) -> Iterator[Transcript]:
    for result in evaluation.tasks.values():
        if isinstance(result, AccuracyResult):
            yield from result.transcripts


def check_has_card(folder: str | os.PathLike[str]) -> None:
    """Check that results can be added to the model card of a checkpoint.

    Args:
        folder: The checkpoint.

    Raises:
        ValueError: It is not the folder of a CAP checkpoint, has no card, or its card or its
            results cannot be read.
        OSError: The folder cannot be written to.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(
            f"{os.fspath(folder)} is no folder, so it has no model card that results can be added "
            "to: download it first (`hf download REPO --local-dir DIR`), and name that folder"
        )
    load_results(folder)
    if not (path / CARD_NAME).is_file():
        raise ValueError(
            f"{path} has no {CARD_NAME}, to which the results could be added: save the model "
            "again, or write one"
        )
    with_results(read_card(path / CARD_NAME), "", [], path.name)
    if not os.access(path, os.W_OK):
        raise OSError(
            f"the folder {path} cannot be written, so no results can be added to its card"
        )


def load_results(folder: str | os.PathLike[str]) -> dict[str, TaskResults]:
    """Return the stored results of a checkpoint, by task.

    Raises:
        ValueError: It is not a CAP checkpoint, or a file is damaged.
    """
    path = Path(folder)
    _, files = read_record(path / RECORD_NAME, os.fspath(folder))
    stored = read_results(path, files["digests"])
    try:
        results = {name: _stored_results(name, values) for name, values in stored.items()}
        results_section(results)  # the file is untrusted; invalid values cannot be rendered
        for each in results.values():
            list(_metadata(each.pruned))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        problem = printable(f"{type(error).__name__}: {error}")
        raise ValueError(
            f"{path / RESULTS_NAME} cannot be read ({problem:.200}): delete the file and measure "
            "again"
        ) from error
    return results


def _stored_results(name: str, values: Mapping[str, Any]) -> TaskResults:
    """Return the results of a task that `add_results` stored."""
    pruned, dense = (
        None if values[side] is None else Evaluation.from_dict(values[side])
        for side in ("pruned", "dense")
    )
    if pruned is None or any(each and list(each.tasks) != [name] for each in (pruned, dense)):
        raise ValueError(f"the results of {name} are not those of one task")
    return TaskResults(pruned, dense)


def add_results(
    folder: str | os.PathLike[str], pruned: Evaluation, dense: Evaluation | None = None
) -> None:
    """Store results next to the weights of a checkpoint, and show them on its model card.

    They replace earlier results of the same tasks. Without `dense`, an earlier result of the dense
    model is kept if it is for the same questions. The rest of the card does not change.

    Args:
        folder: The checkpoint.
        pruned: Its evaluation.
        dense: The dense model's.

    Raises:
        ValueError: As for `check_has_card`; or the evaluations cannot be compared, or there are
            none.
        OSError: A file cannot be written.
    """
    if not pruned.tasks:
        raise ValueError(f"the evaluation of {pruned.model} has no results to add to the card")
    check_has_card(folder)
    path = Path(folder)
    record, files = read_record(path / RECORD_NAME, os.fspath(folder))
    results = load_results(path)
    for name in pruned.tasks:
        earlier = results.get(name)
        of_dense = None
        if dense is not None and name in dense.tasks:
            of_dense = _of_task(dense, name, record.base_model)
        elif earlier is not None and _is_comparable(pruned, earlier.dense, name):
            of_dense = earlier.dense
        results[name] = TaskResults(_of_task(pruned, name, None), of_dense)
    section = results_section(results)
    card = path / CARD_NAME
    metadata = [each for one in results.values() for each in _metadata(one.pruned)]
    text = with_results(read_card(card), section, metadata, path.resolve().name)
    stored = {
        name: {
            "pruned": each.pruned.to_dict(),
            "dense": None if each.dense is None else each.dense.to_dict(),
        }
        for name, each in results.items()
    }
    write_results(path, files["digests"], stored)
    write_atomically(card, text.encode())


def _of_task(evaluation: Evaluation, task: str, name: str | None) -> Evaluation:
    """Return the evaluation of one task, under a name without local paths."""
    public = public_name(evaluation.model)
    if name is not None and (public is None or public.startswith("./")):
        public = name
    return dataclasses.replace(evaluation, model=public or "", tasks={task: evaluation.tasks[task]})


def _is_comparable(pruned: Evaluation, dense: Evaluation | None, task: str) -> bool:
    if dense is None:
        return False
    try:
        compare(dense, pruned, [task])
    except ValueError:  # other questions, or other worked examples
        return False
    return True


@dataclass(frozen=True)
class ResultTables:
    """The results of all tasks as tables, each with a header, or empty if there are no results.

    Attributes:
        compared: Results that were compared with the dense model.
        alone: The other results.
        lengths: Lengths of the answers for the other results.
        notes: Notes about the tasks.
    """

    compared: list[list[str]]
    alone: list[list[str]]
    lengths: list[list[str]]
    notes: list[str]


def result_tables(results: Mapping[str, TaskResults]) -> ResultTables:
    """Return the results as tables, for the card and the report."""
    tables = ResultTables([], [], [], [])
    for name, task in results.items():
        comparisons = task.comparisons()
        if isinstance(comparisons, list):
            _extend(tables.compared, [list(COLUMNS), *(each.cells() for each in comparisons)])
        else:
            _extend(tables.alone, task.pruned.rows())
            _extend(tables.lengths, task.pruned.length_rows())
            if comparisons is not None:
                tables.notes.append(f"{name}: {comparisons}")
        tables.notes.extend(task.pruned.notes())
    return tables


def _extend(table: list[list[str]], rows: list[list[str]]) -> None:
    """Add the rows of another table with the same header."""
    header, *others = rows
    if others:
        table += others if table else [header, *others]


def results_section(results: Mapping[str, TaskResults]) -> str:
    """Return the results as Markdown: tables, settings, and one answer of each model."""
    tables = result_tables(results)
    lines: list[str] = []
    if tables.compared:
        lines += [
            "Both models got the same questions. A difference whose 95 % interval contains 0 is "
            "not statistically significant.",
            "",
            *_table([row for row in tables.compared if row[1] != _OF_THE_MACHINE]),
            "",
        ]
    if tables.alone:
        lines += ["Measured without the dense model:", "", *_table(tables.alone), ""]
    if tables.lengths:
        lines += [*_table([row[:_LENGTH_COLUMNS] for row in tables.lengths]), ""]
    lines += [f"- {plain_markdown(note)}" for note in [*tables.notes, *_settings(results)]]
    for name, task in results.items():
        if (pair := task.transcripts()) is not None:
            return "\n".join([*lines, "", *_answers(name, *pair)])
    return "\n".join(lines)


def _settings(results: Mapping[str, TaskResults]) -> list[str]:
    """Return a line for each set of settings that tasks were measured with."""
    ways: dict[str, list[str]] = {}
    for name, task in results.items():
        settings, versions = task.pruned.settings, task.pruned.versions
        ways.setdefault(
            f"{settings.get('dtype')}, seed {settings.get('seed')}, limit {settings.get('limit')}, "
            "greedy decoding, with "
            + enumeration([f"{library} {version}" for library, version in versions.items()]),
            [],
        ).append(name)
    return [f"{enumeration(names)}: {way}" for way, names in ways.items()]


def _answers(task: str, dense: Transcript, pruned: Transcript) -> list[str]:
    """Return the answers of both models to one question."""
    return [
        "### An answer before and after",
        "",
        f"To the first question of {plain_markdown(task)} that both models got:",
        "",
        *_block(dense.question),
        "",
        "The dense model answers:",
        "",
        *_block(dense.response),
        "",
        "The pruned model answers:",
        "",
        *_block(pruned.response),
    ]


def _block(text: str) -> list[str]:
    """Return text as a code block, which shows it verbatim."""
    shown = text.strip() if len(text) <= _LONGEST else f"{text.strip()[:_LONGEST]} ..."
    lines = [printable(line).replace("<!--", "<! --") for line in shown.splitlines()]
    fence = "`" * (3 + max((line.count("`") for line in lines), default=0))
    return [f"{fence}text", *lines, fence]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table whose header is the first row."""
    header, *others = rows
    return [
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
        *(f"| {' | '.join(map(plain_markdown, row))} |" for row in others),
    ]


def _metadata(evaluation: Evaluation) -> Iterator[EvalResult]:
    """Yield the results in the form of card metadata (`model-index`)."""
    for name, result in evaluation.tasks.items():
        source: dict[str, Any] = getattr(result, "source", {})
        for metric, value, text in _metrics(result):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=source.get("hub_id", name),
                dataset_name=name,
                dataset_config=source.get("config"),
                dataset_split=source.get("split"),
                dataset_revision=source.get("revision"),
                metric_type=metric,
                metric_value=value,
                metric_name=text,
            )


def _metrics(result: Result) -> Iterator[tuple[str, float, str]]:
    """Yield type, value and name of each metric that is finite."""
    if isinstance(result, AccuracyResult):
        yield "accuracy", result.accuracy, _named("accuracy", result.interval)
        lengths = result.lengths
        yield "tokens", sum(lengths) / len(lengths), "tokens per answer"
    elif isinstance(result, ChoiceResult):
        if result.error is None:
            for metric, interval in result.intervals.items():
                yield metric, getattr(result, metric), _named(metric, interval)
    elif isinstance(result, PerplexityResult):
        if result.perplexity is not None:
            yield "perplexity", result.perplexity, "perplexity per token"
    elif isinstance(result, LossResult):
        if result.loss is not None:
            yield "loss", result.loss, "loss on worked answers, nats per token"
    elif isinstance(result, HarnessResult):
        for item in result.items:
            if item.value is not None:
                yield item.metric.partition(",")[0], item.value, f"{item.task} {item.metric}"


def _named(metric: str, interval: tuple[float, float]) -> str:
    return f"{metric}, 95 % interval {interval[0]:.1%} to {interval[1]:.1%}"
