"""Studies: models x recipes x sparsities x calibration sets x seeds, each cell measured once.

A study is a YAML file (`docs/study.md`). Each cell is cached under a key of everything that
determines its result, so an interrupted study resumes, and an extended study measures only the new
cells. If a cell fails, its error is recorded and the study continues.
"""

import csv
import dataclasses
import gc
import hashlib
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.config import RECIPES, CAPConfig, effective
from optimum_cap.data import load_tokenizer_of, local_presets, usable_tokenizer
from optimum_cap.evaluation import (
    LAYOUT,
    AccuracyResult,
    ChoiceResult,
    Evaluation,
    HarnessResult,
    LossResult,
    Result,
    TaskData,
    TaskItems,
    check_counts,
    evaluate,
    load_task_data,
    resolve_tasks,
    result_name,
    wilson_interval,
)
from optimum_cap.methods import CRITERIA
from optimum_cap.models import ModelView, check_saved_with_lm_head, load_model, sees_images
from optimum_cap.progress import progress_bar
from optimum_cap.pruner import CAPPruner
from optimum_cap.runtime import (
    JsonFiles,
    ProcessGroup,
    Usage,
    usage_of_block,
    write_atomically,
)
from optimum_cap.scoring import DECISIVE, UnitLosses, tensors_of
from optimum_cap.text import did_you_mean
from optimum_cap.yaml_files import read_yaml

logger = logging.get_logger(__name__)

DENSE = "dense"
_LAYOUT = 2  # version of cell files and of the score computation; part of the key
PRUNING = "pruning"
"""Value of the column `task` in rows with the cost of pruning."""
# CAPConfig fields that are axes of the study, and `scores`, which the study manages itself.
_CELL_FIELDS = ("sparsity", "dataset", "seed", "scores")
_COLUMNS = (
    "model",
    "recipe",
    "sparsity",
    "calibration",
    "seed",
    "task",
    "metric",
    "value",
    "low",
    "high",
    "n",
    "error",
)


@dataclass(frozen=True)
class Study:
    """The definition of a study.

    Attributes:
        models: Label -> Hub id or folder of a dense model.
        recipes: Label -> fields of `CAPConfig`.
        sparsities: Fractions of zeros.
        calibration: Label -> data set, as for `CAPConfig.dataset`.
        tasks: Names of evaluation tasks or groups.
        seeds: Seeds for the selection of calibration examples.
        settings: Fields of `CAPConfig`, for all recipes on which they have an effect.
        data_dir: Folder with the evaluation data and with the presets among the calibration data;
            `None` downloads them from the Hub.
        limit: Questions or windows per task; `None` is all. A mapping limits only the tasks or
            groups it names.
        num_fewshot: Worked examples in prompts; `None` is each task's default.
        max_new_tokens: Longest answer in tokens; `None` is each task's limit.
        include_path: Folder with task definitions for lm-evaluation-harness.
        batch_size: Questions per batch.
        dtype: dtype of the weights, as for `from_pretrained`.
        device_map: Placement of the models, as for `from_pretrained`.
        resume: Whether an interrupted cell resumes instead of starting over. It then takes as much
            disk space as the model, and the time of an interrupted pruning run is not recorded.
    """

    models: dict[str, str]
    recipes: dict[str, dict[str, Any]]
    sparsities: list[float]
    calibration: dict[str, Any]
    tasks: list[str]
    seeds: list[int] = field(default_factory=lambda: [0])
    settings: dict[str, Any] = field(default_factory=dict)
    data_dir: str | None = None
    limit: int | dict[str, int] | None = None
    num_fewshot: int | None = None
    max_new_tokens: int | None = None
    include_path: str | None = None
    batch_size: int = 32
    dtype: str = "auto"
    device_map: str = "auto"
    resume: bool = False

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> "Study":
        """Read a study from YAML.

        Args:
            path: The file.
            **changes: Values that override those in the file, by key.

        Raises:
            ValueError: A key is unknown or missing, or a value cannot be used; the message names
                the key. Every recipe is checked with every sparsity.
            FileNotFoundError: The file does not exist, or the data folder has no file for a preset.
        """
        values = read_yaml(Path(path), "study file")
        values |= changes
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(map(str, values)) - set(known)):
            raise ValueError(
                f"unknown key(s) {', '.join(unknown)} in {path}"
                f"{did_you_mean(unknown[0], known)}; known: {', '.join(known)}"
            )
        required = ("models", "recipes", "sparsities", "calibration", "tasks")
        if missing := [name for name in required if not values.get(name)]:
            raise ValueError(f"{path} has no values for {', '.join(missing)}: add them")
        calibration = _labelled("calibration", values["calibration"])
        if (folder := values.get("data_dir")) is not None:
            calibration = {k: local_presets(v, Path(folder)) for k, v in calibration.items()}
        study = cls(
            **{
                **values,
                "models": _labelled("models", values["models"]),
                "recipes": _recipes(values["recipes"]),
                "calibration": calibration,
                "sparsities": _list("sparsities", values["sparsities"]),
                "tasks": _list("tasks", values["tasks"]),
                "seeds": _list("seeds", values.get("seeds", [0])),
            }
        )
        if conflicts := sorted(set(study.settings) & set(_CELL_FIELDS)):
            raise ValueError(
                f"settings of {path} contain {', '.join(conflicts)}, which the study sets for each "
                "cell: leave them out"
            )
        for limit in study.limits.values():
            check_counts(limit, study.batch_size, study.num_fewshot, study.max_new_tokens)
        if not isinstance(study.resume, bool):
            raise ValueError(f"resume of {path} must be true or false, got {study.resume!r}")
        resolve_tasks(study.tasks)
        configs = [cell.config() for cell in study.cells()]
        defaults = CAPConfig(sparsity=0.5)
        for name, value in study.settings.items():
            if value != getattr(defaults, name, None) and not any(
                config and name in config.fields_used for config in configs
            ):
                raise ValueError(
                    f"setting {name!r} of {path} has no effect with any recipe of the study: leave "
                    "it out"
                )
        return study

    @property
    def limits(self) -> dict[str, int | None]:
        """The limit of each task, with groups expanded.

        Raises:
            ValueError: A task is unknown, or `limit` names one that is not in the study.
        """
        tasks = [result_name(name) for name in resolve_tasks(self.tasks)]
        if not isinstance(self.limit, dict):
            return dict.fromkeys(tasks, self.limit)
        limits: dict[str, int | None] = dict.fromkeys(tasks)
        for name, limit in self.limit.items():
            for task in map(result_name, resolve_tasks(str(name))):
                if task not in limits:
                    raise ValueError(
                        f"limit of the study names {name!r}, but the tasks are "
                        f"{', '.join(tasks)}: add it to the tasks, or leave it out"
                    )
                limits[task] = limit
        return limits

    def cells(self) -> "Iterator[Cell]":
        """Yield every cell, model by model, starting with the dense model."""
        for label, model in self.models.items():
            yield Cell(label, model, DENSE, {}, None, None, None, None)
            axes = (self.calibration.items(), self.seeds, self.recipes.items(), self.sparsities)
            for (data, dataset), seed, (recipe, changes), sparsity in itertools.product(*axes):
                settings = effective(self.settings, changes)
                yield Cell(label, model, recipe, settings, sparsity, data, dataset, seed)


@dataclass(frozen=True)
class Cell:
    """One measurement of a study: a pruned model, or the dense model."""

    label: str
    model: str
    recipe: str
    settings: dict[str, Any]
    sparsity: float | None
    calibration: str | None
    dataset: Any
    seed: int | None

    def config(self) -> CAPConfig | None:
        """Return the pruning config; `None` for the dense model."""
        if self.recipe == DENSE:
            return None
        try:
            axes = {"sparsity": self.sparsity, "dataset": self.dataset, "seed": self.seed}
            return CAPConfig(**effective(axes, self.settings))
        except (TypeError, ValueError) as error:
            raise ValueError(f"recipe {self.recipe!r} of the study: {error}") from error

    def __str__(self) -> str:
        if self.recipe == DENSE:
            return f"{self.label} dense"
        return f"{self.label} {self.recipe} {self.sparsity:g} {self.calibration} seed {self.seed}"


def run_study(study: Study, folder: str | Path, jobs: int = 1) -> list[dict[str, Any]]:
    """Measure the missing and failed cells, and write `results.csv`.

    Args:
        study: The study.
        folder: Folder of the study, with `cells/`, `scores/`, `unfinished/` and `results.csv`;
            created if needed.
        jobs: Number of cells to measure in parallel, each in its own process with its share of the
            cores. This is faster for small models; a different number of threads may change
            rounding.

    Returns:
        The rows of `results.csv`: one per cell, task and metric. The cost of pruning is in rows
        with the task `"pruning"`.

    Raises:
        ValueError: `jobs` is not positive, several processes were launched, or the data of a task
            cannot be used.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be an integer of at least 1, got {jobs}")
    if (size := ProcessGroup.current().size) > 1:
        raise ValueError(
            f"{size} processes were launched, but a study runs in one: start it without torchrun "
            "or accelerate launch, and set jobs to measure several cells in parallel"
        )
    folder = Path(folder)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    data = _task_data(study)
    files = _cell_files(study, data, folder)
    cached = {file: _read(file) for _, file in files}
    missing = {file: cell for cell, file in files if _is_missing(cached[file])}
    results = {file: result for file, result in cached.items() if result is not None}
    with progress_bar(
        total=len(cached), initial=len(cached) - len(missing), desc="Study", unit="cell"
    ) as progress:
        for file, result in _measure_all(missing, study, data, jobs):
            results[file] = result
            _write_rows(folder, files, results)
            progress.set_postfix_str(str(missing[file]))
            progress.update()
    return _write_rows(folder, files, results)


def _write_rows(
    folder: Path, files: list[tuple[Cell, Path]], results: dict[Path, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Write the rows of the measured cells to `results.csv`, and return them."""
    rows = [row for cell, file in files if file in results for row in _rows(cell, results[file])]
    lines = [_COLUMNS, *([row[column] for column in _COLUMNS] for row in rows)]
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    write_atomically(folder / "results.csv", text.getvalue().encode())
    return rows


def _task_data(study: Study) -> TaskData:
    return load_task_data(study.tasks, study.data_dir, study.num_fewshot, study.include_path)


def _is_missing(result: dict[str, Any] | None) -> bool:
    return result is None or bool(result["error"])


def _measure_all(
    missing: dict[Path, Cell], study: Study, data: TaskData, jobs: int
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Measure cells and write each to its file when done; yield file and result."""
    if jobs == 1 or len(missing) < 2:
        for file, cell in missing.items():
            yield file, _measured_and_written(cell, file, study, data)
        return
    left = dict(missing)
    while left:
        for file, result in _measured_in_processes(dict(left), study, data, jobs):
            del left[file]
            yield file, result
        # A process died: measure the next cells one at a time, to find the cell that caused it.
        for file, cell in list(left.items())[:jobs]:
            results = dict(_measured_in_processes({file: cell}, study, data, 1))
            if not results:
                error = "the process that measured this cell was killed, perhaps for its memory use"
                logger.warning(f"{cell}: {error}")
                results[file] = _result(cell, error=error)
                write_atomically(file, json.dumps(results[file], indent=1).encode())
            del left[file]
            yield file, results[file]


def _measured_in_processes(
    cells: dict[Path, Cell], study: Study, data: TaskData, jobs: int
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield cells as they are measured, until all are done or a process has died."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # These variables are read when a process starts. Progress bars are disabled because bars of
    # several processes would overwrite each other.
    with _environment(OMP_NUM_THREADS=str(threads), TQDM_DISABLE="1"):
        others = multiprocessing.active_children()
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
        try:
            running = {
                pool.submit(_measured_and_written, cell, file, study, data): file
                for file, cell in cells.items()
            }
            for future in as_completed(running):
                yield running[future], future.result()
        except BrokenProcessPool:
            return
        except KeyboardInterrupt:
            # A terminal also sends Ctrl-C to the processes of the pool; other senders do not.
            for process in set(multiprocessing.active_children()).difference(others):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for processes that start in this context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _measured_and_written(cell: Cell, file: Path, study: Study, data: TaskData) -> dict[str, Any]:
    result = _measured(cell, study, data, file)
    write_atomically(file, json.dumps(result, indent=1).encode())
    if not result["error"]:
        shutil.rmtree(_resume_dir(file), ignore_errors=True)
    return result


def _resume_dir(file: Path) -> Path:
    """Return the folder in which an unfinished cell stores its progress."""
    return file.parents[1] / "unfinished" / file.stem


def _measured(cell: Cell, study: Study, data: TaskData, file: Path) -> dict[str, Any]:
    """Measure one cell; an error becomes part of the result."""
    start = time.monotonic()
    evaluation = record = usage = None
    error = None
    gc.collect()  # frees reference cycles left by the previous cell
    try:
        model = load_model(cell.model, dtype=study.dtype, device_map=study.device_map)
        check_saved_with_lm_head(model.config, cell.model)
        tokenizer = load_tokenizer_of(cell.model, sees_images(type(model).__name__))
        if (config := cell.config()) is not None:
            usage = _pruned_and_stored(cell, config, model, tokenizer, study, file)
            record = model.pruning_record.to_dict()
        resume_dir = _resume_dir(file) if study.resume else None
        evaluation = _evaluated(model, usable_tokenizer(tokenizer), study, data, resume_dir)
    except Exception as failure:
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
        logger.warning(f"{cell}: {error}")
    return _result(cell, evaluation, record, time.monotonic() - start, error, usage)


def _evaluated(
    model: PreTrainedModel,
    tokenizer: Any,
    study: Study,
    data: TaskData,
    resume_dir: Path | None,
) -> Evaluation:
    """Evaluate a model on all tasks; tasks with the same limit run together."""
    limits = study.limits
    parts = [
        evaluate(
            model,
            tokenizer,
            data={name: items for name, items in data.items() if limits[name] == limit},
            limit=limit,
            batch_size=study.batch_size,
            num_fewshot=study.num_fewshot,
            max_new_tokens=study.max_new_tokens,
            resume_dir=resume_dir,
        )
        for limit in dict.fromkeys(limits.values())
    ]
    results = {name: result for part in parts for name, result in part.tasks.items()}
    return dataclasses.replace(
        parts[0],
        tasks={name: results[name] for name in data},
        settings={**parts[0].settings, "limit": study.limit},
        seconds=sum(part.seconds for part in parts),
    )


def _pruned_and_stored(
    cell: Cell,
    config: CAPConfig,
    model: PreTrainedModel,
    tokenizer: Any,
    study: Study,
    file: Path,
) -> Usage | None:
    """Prune a model; return the cost of pruning, if known.

    The cost is stored in case the cell is interrupted later; it is unknown if pruning was
    interrupted.
    """
    resume_dir = _resume_dir(file)
    was_interrupted = resume_dir.exists()
    if study.resume and "resume_dir" in config.fields_used:
        config = dataclasses.replace(config, resume_dir=resume_dir)
    usage = _pruned(cell, config, model, tokenizer, file.parents[1])
    if not study.resume:
        return usage
    files = JsonFiles(resume_dir)
    if was_interrupted:
        stored = files.read("usage")
        return None if stored is None else Usage(**stored)
    if usage is not None:
        files.write("usage", asdict(usage))
    return usage


def _pruned(
    cell: Cell, config: CAPConfig, model: PreTrainedModel, tokenizer: Any, folder: Path
) -> Usage | None:
    """Prune a model; return the cost of pruning, with the causal scores that cells share."""
    losses, scoring = None, None
    if needs_scores := CRITERIA[config.method.criterion].needs_scores:
        losses, scoring = _losses(cell, config, model, tokenizer, folder)
    with usage_of_block() as pruning:
        CAPPruner(config).prune(model, tokenizer, losses=losses)
    if not needs_scores:
        return pruning
    return None if scoring is None else scoring + pruning


def _result(
    cell: Cell,
    evaluation: Evaluation | None = None,
    record: dict[str, Any] | None = None,
    seconds: float | None = None,
    error: str | None = None,
    usage: Usage | None = None,
) -> dict[str, Any]:
    """Return the content of a cell's file."""
    return {
        "cell": asdict(cell),
        "evaluation": evaluation.to_dict() if evaluation else None,
        "scores": record["scores"] if record else None,
        "matrices": record["matrices"] if record else None,
        "seconds": seconds,
        "pruning": asdict(usage) if usage else None,
        "error": error,
    }


def _losses(
    cell: Cell, config: CAPConfig, model: PreTrainedModel, tokenizer: Any, folder: Path
) -> tuple[UnitLosses, Usage | None]:
    """Return the losses with each unit masked, measured once per model and calibration set.

    Returns:
        The losses, and the cost of measuring them, which is `None` if measuring was interrupted.
    """
    decisive = {name: getattr(config, name) for name in DECISIVE if name != "dataset"}
    key = {
        "layout": _LAYOUT,
        "version": importlib.metadata.version("optimum-cap"),
        "model": _fingerprint(cell.model),
        "dataset": _fingerprint(cell.dataset),
        "dtype": str(model.dtype),
        **decisive,
    }
    file = folder / "scores" / f"{_digest(key)}.safetensors"
    file.parent.mkdir(exist_ok=True)
    with FileLock(file.with_suffix(".lock")):  # another cell may be measuring the same losses
        if file.is_file():
            try:
                units = ModelView.of(model, config.mlp_unit_size).units(config.scored_units)
                with safe_open(file, "pt") as stored:
                    values = json.loads((stored.metadata() or {}).get("usage", "null"))
                return UnitLosses(units, **load_file(file)), values and Usage(**values)
            except SafetensorError:
                logger.warning(f"{file} is damaged: measuring its scores again")
        was_interrupted = config.resume_dir is not None and Path(config.resume_dir).exists()
        with usage_of_block() as measured:
            losses = CAPPruner(config).measure(model, tokenizer)
        usage = None if was_interrupted else measured
        metadata = {"usage": json.dumps(usage and asdict(usage))}
        write_atomically(file, save(tensors_of(losses), metadata))
    return losses, usage


def _rows(cell: Cell, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of one cell: one per task and metric, or one with the error."""
    axes = {
        "model": cell.label,
        "recipe": cell.recipe,
        "sparsity": cell.sparsity if cell.sparsity is not None else 0.0,
        "calibration": cell.calibration,
        "seed": cell.seed,
    }
    empty = dict.fromkeys(_COLUMNS)
    if result["error"]:
        return [{**empty, **axes, "error": result["error"]}]
    rows = []
    for metric, value in (result.get("pruning") or {}).items():
        if value is not None:
            rows.append({**empty, **axes, "task": PRUNING, "metric": metric, "value": value})
    for task, scored in Evaluation.from_dict(result["evaluation"]).tasks.items():
        common = {**empty, **axes, "task": task, "n": len(scored.items), "error": scored.error}
        rows += [{**common, **metric} for metric in _metrics(scored)]
    return rows


def _metrics(scored: Result) -> Iterator[dict[str, Any]]:
    """Yield, for each metric of a task, the columns specific to that metric."""
    if isinstance(scored, AccuracyResult):
        lengths = scored.to_dict()["tokens"]
        count = len(scored.items)
        yield _metric("accuracy", scored.accuracy, scored.interval)
        yield _metric("loss", scored.answer_loss)
        yield _metric("no_answer", scored.without_answer / count)
        yield _metric("tokens", lengths["mean"], lengths["mean_interval"])
        yield _metric("median_tokens", lengths["median"], lengths["median_interval"])
        limits = wilson_interval(scored.at_limit, count)
        yield _metric("at_limit", scored.at_limit / count, limits)
        yield _metric("seconds_per_answer", scored.seconds_per_answer)
    elif isinstance(scored, ChoiceResult):
        intervals = scored.intervals
        yield _metric("acc", scored.acc, intervals["acc"])
        yield _metric("acc_norm", scored.acc_norm, intervals["acc_norm"])
    elif isinstance(scored, LossResult):
        yield _metric("loss", scored.loss)
    elif isinstance(scored, HarnessResult):
        for item in scored.items:
            yield {**_metric(f"{item.task} {item.metric}", item.value), "n": item.n}
    else:
        yield _metric("perplexity", scored.perplexity)


def _metric(
    name: str, value: float | None, interval: Sequence[float] | None = None
) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {"metric": name, "value": value, "low": low, "high": high}


# Keys


def _key(cell: Cell, evaluated: dict[str, Any]) -> str:
    config = cell.config()
    values, dataset = {}, None
    if config is not None:
        values = {**config.to_dict(), "dataset": None, "memory_budget": None}
        # These fields change at most rounding; cells from before they existed stay valid.
        for name in ("torch_compile", "strict"):
            del values[name]
        if config.method.needs_data:
            dataset = _fingerprint(cell.dataset)
        elif config.method.criterion != "random":
            values["seed"] = None  # all calibration sets and seeds give the same result
    return _digest(
        {
            "layout": _LAYOUT,
            "version": importlib.metadata.version("optimum-cap"),
            "model": _fingerprint(cell.model),
            "config": values,
            "dataset": dataset,
            "evaluated": evaluated,
        }
    )


def _fingerprint(name: Any) -> Any:
    """Return a JSON value that identifies a model, a data set or a list of them.

    Files are identified by their content, other values by name.
    """
    if isinstance(name, list):
        return [_fingerprint(entry) for entry in name]
    if isinstance(name, dict):
        return {**name, "path": _fingerprint(name.get("path"))}
    path = Path(str(name))
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return [[file.name, _file_digest(file)] for file in files]
    preset = ""
    if not path.is_file():
        preset, path = str(name).partition("=")[0], Path(str(name).partition("=")[2])
    return [preset, _file_digest(path)] if path.is_file() else name


_digests: dict[tuple[str, int, int], str] = {}


def _file_digest(path: Path) -> str:
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _digests:
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
            _digests[key] = digest.hexdigest()
    return _digests[key]


def _digest_of_tasks(data: TaskData) -> dict[str, str]:
    digests = {}
    for name, task in data.items():
        if not isinstance(task, TaskItems):
            digests[name] = task.digest
        elif isinstance(task.items, tuple):
            digests[name] = _digest([item.digest for item in (*task.items, *task.examples)])
        else:
            digests[name] = _digest(task.items.text)
    return digests


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


# Files


def _read(file: Path) -> dict[str, Any] | None:
    """Return the content of a cell's file; `None` if it is missing or damaged."""
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        logger.warning(f"{file} is damaged: measuring its cell again")
        return None
    return values


def read_cells(study: Study, folder: str | Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yield the measured cells of a study, with the content of their files."""
    data = _task_data(study)
    for cell, file in _cell_files(study, data, Path(folder)):
        if (result := _read(file)) is not None:
            yield cell, result


def _cell_files(study: Study, data: TaskData, folder: Path) -> list[tuple[Cell, Path]]:
    """Return every cell with the path of its file."""
    evaluated = {
        "layout": LAYOUT,
        "tasks": _digest_of_tasks(data),
        "limit": study.limit,
        "num_fewshot": study.num_fewshot,
        "max_new_tokens": study.max_new_tokens,
        "dtype": study.dtype,
    }
    return [(cell, folder / "cells" / f"{_key(cell, evaluated)}.json") for cell in study.cells()]


# The values of the file


def _list(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise ValueError(f"{name} of the study must be a list, got {values!r}")
    if len({json.dumps(value) for value in values}) < len(values):
        raise ValueError(f"{name} of the study has a duplicate value: {values}")
    return values


def _labelled(name: str, values: Any) -> dict[str, Any]:
    """Return label -> value; an unlabelled name gets its last path component as label."""
    if isinstance(values, dict):
        return {str(label): value for label, value in values.items()}
    names = values if isinstance(values, list) else [values]
    labelled = {Path(str(value)).name: value for value in names}
    if len(labelled) < len(names):
        raise ValueError(
            f"{name} of the study must have different last path components, got {names}: label "
            f"them, as in `{name}: {{first: {names[0]}}}`"
        )
    return labelled


def _recipes(values: Any) -> dict[str, dict[str, Any]]:
    """Return label -> fields of `CAPConfig`, from a list of recipe names or from labels."""
    if isinstance(values, list):
        if unknown := [name for name in values if name not in RECIPES]:
            raise ValueError(
                f"unknown recipe {unknown[0]!r} in the study: choose from {', '.join(RECIPES)}, or "
                "use labels with fields of CAPConfig"
            )
        return {name: {"recipe": name} for name in _list("recipes", values)}
    if not isinstance(values, dict):
        raise ValueError(
            f"recipes of the study must be a list of names or a mapping of labels, got {values!r}"
        )
    recipes = {}
    for label, changes in values.items():
        changes = {"recipe": label} if changes is None else changes
        if not isinstance(changes, dict) or set(changes) & set(_CELL_FIELDS):
            raise ValueError(
                f"recipe {label!r} of the study must be fields of CAPConfig other than "
                f"{', '.join(_CELL_FIELDS)}, got {changes!r}"
            )
        recipes[str(label)] = changes
    if DENSE in recipes:
        raise ValueError(
            f"recipe label {DENSE!r} is reserved for the dense model: choose another label"
        )
    return recipes
