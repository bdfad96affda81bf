"""Studies: models x recipes x sparsities x calibration sets x seeds, every cell measured once.

A study is a YAML file (`docs/study.md`). Its cells are cached one by one under a key of all that
determines them, so a study that was killed goes on where it was, and one that grows measures only
what is new. A cell that fails is recorded with its error, and the others go on.
"""

import csv
import hashlib
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from optimum_cap.config import RECIPES, CAPConfig
from optimum_cap.data import local_presets
from optimum_cap.evaluation import (
    AccuracyResult,
    Evaluation,
    TaskData,
    check_counts,
    evaluate,
    load_task_data,
    resolve_tasks,
)
from optimum_cap.methods import CRITERIA
from optimum_cap.models import ModelView
from optimum_cap.pruner import CAPPruner
from optimum_cap.runtime import ProcessGroup, write_atomically
from optimum_cap.scoring import DECISIVE, UnitLosses, tensors_of

logger = logging.get_logger(__name__)

DENSE = "dense"
_LAYOUT = 2  # of a cell's file, and of the way that scores are made; part of its key
# Fields of CAPConfig that the axes decide, and one whose file the study keeps itself.
_OF_A_CELL = ("sparsity", "dataset", "seed", "scores")
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
    """What is measured.

    Attributes:
        models: Label -> Hub id or folder of a dense model.
        recipes: Label -> fields of `CAPConfig`.
        sparsities: Fractions of zeros.
        calibration: Label -> data set, as `CAPConfig` takes it.
        tasks: Names of evaluation tasks or groups.
        seeds: Seeds of the calibration examples.
        settings: Fields of `CAPConfig` for all recipes.
        data_dir: Folder of the evaluation data, and of the presets among the calibration data;
            `None` is the Hub.
        limit: Questions or windows per task.
        batch_size: Questions at a time.
        dtype: Of the weights.
        device_map: Where the models are placed.
    """

    models: dict[str, str]
    recipes: dict[str, dict[str, Any]]
    sparsities: list[float]
    calibration: dict[str, Any]
    tasks: list[str]
    seeds: list[int] = field(default_factory=lambda: [0])
    settings: dict[str, Any] = field(default_factory=dict)
    data_dir: str | None = None
    limit: int | None = None
    batch_size: int = 32
    dtype: str = "auto"
    device_map: str = "auto"

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> "Study":
        """Read a study from YAML.

        Args:
            path: The file.
            changes: Values that replace those of the file, under the same keys.

        Raises:
            ValueError: An unknown or missing key, or a value that cannot be used; the message names
                it. Every recipe is checked with every sparsity.
            FileNotFoundError: There is no such file, or none of a preset in the data folder.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"the study file {path} does not exist")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold keys and values, got {type(values).__name__}")
        values |= changes
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(map(str, values)) - set(known)):
            raise ValueError(
                f"unknown key(s) {', '.join(unknown)} in {path}; known: {', '.join(known)}"
            )
        needed = ("models", "recipes", "sparsities", "calibration", "tasks")
        if missing := [name for name in needed if not values.get(name)]:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
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
        if decided := sorted(set(study.settings) & set(_OF_A_CELL)):
            raise ValueError(
                f"settings of {path} hold {', '.join(decided)}, which a study decides per cell: "
                "leave them out"
            )
        check_counts(study.limit, study.batch_size)
        resolve_tasks(study.tasks)
        for cell in study.cells():
            cell.config()
        return study

    def cells(self) -> "Iterator[Cell]":
        """Yield every cell, model by model, the dense one first."""
        for label, model in self.models.items():
            yield Cell(label, model, DENSE, {}, None, None, None, None)
            axes = (self.calibration.items(), self.seeds, self.recipes.items(), self.sparsities)
            for (data, dataset), seed, (recipe, changes), sparsity in itertools.product(*axes):
                settings = {**self.settings, **changes}
                yield Cell(label, model, recipe, settings, sparsity, data, dataset, seed)


@dataclass(frozen=True)
class Cell:
    """One model, pruned in one way, or dense."""

    label: str
    model: str
    recipe: str
    settings: dict[str, Any]
    sparsity: float | None
    calibration: str | None
    dataset: Any
    seed: int | None

    def config(self) -> CAPConfig | None:
        """The configuration of the pruner; `None` of the dense model."""
        if self.recipe == DENSE:
            return None
        try:
            return CAPConfig(
                **{
                    **self.settings,
                    "sparsity": self.sparsity,
                    "dataset": self.dataset,
                    "seed": self.seed,
                }
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"recipe {self.recipe!r} of the study: {error}") from error

    def __str__(self) -> str:
        if self.recipe == DENSE:
            return f"{self.label} dense"
        return f"{self.label} {self.recipe} {self.sparsity:g} {self.calibration} seed {self.seed}"


def run_study(study: Study, folder: str | Path, jobs: int = 1) -> list[dict[str, Any]]:
    """Measure every cell that is not measured yet, and write all results.

    Args:
        study: What to measure.
        folder: Where `cells/`, `scores/` and `results.csv` are, or will be.
        jobs: Cells measured at a time, each in a process of its own with its share of the cores.
            Small models gain; another number of threads may round differently.

    Returns:
        The rows of `results.csv`: one per cell, task and metric.

    Raises:
        ValueError: `jobs` is no positive number, several processes were launched, or data of a
                task cannot be used.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be an integer of at least 1, got {jobs}")
    if (size := ProcessGroup.current().size) > 1:
        raise ValueError(
            f"{size} processes were launched, but a study is run by one: start it without "
            "torchrun or accelerate launch, and ask for several cells at a time with jobs"
        )
    folder = Path(folder)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    data = load_task_data(",".join(study.tasks), study.data_dir)
    files = _cell_files(study, data, folder)
    known = {file: _read(file) for _, file in files}
    missing = {file: cell for cell, file in files if _is_missing(known[file])}
    found = {file: cell for file, cell in known.items() if cell is not None}
    with logging.tqdm(
        total=len(known), initial=len(known) - len(missing), desc="Study", unit="cell"
    ) as progress:
        for file, measured in _measure_all(missing, study, data, jobs):
            found[file] = measured
            progress.set_postfix_str(str(missing[file]))
            progress.update()
    rows = [row for cell, file in files for row in _rows(cell, found[file])]
    lines = [_COLUMNS, *([row[column] for column in _COLUMNS] for row in rows)]
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    write_atomically(folder / "results.csv", text.getvalue().encode())
    return rows


def _is_missing(found: dict[str, Any] | None) -> bool:
    return found is None or bool(found["error"])


def _measure_all(
    missing: dict[Path, Cell], study: Study, data: TaskData, jobs: int
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Measure cells and write each to its file as soon as it is done; yield file and result."""
    if jobs == 1 or len(missing) < 2:
        for file, cell in missing.items():
            yield file, _measured_and_written(cell, file, study, data)
        return
    left = dict(missing)
    while left:
        for file, found in _measured_in_processes(dict(left), study, data, jobs):
            del left[file]
            yield file, found
        # If a process has died, it is known of which cells after a trial of each by itself.
        for file, cell in list(left.items())[:jobs]:
            results = dict(_measured_in_processes({file: cell}, study, data, 1))
            if not results:
                error = "the process that measured this cell died: killed, perhaps for its memory"
                logger.warning(f"{cell}: {error}")
                results[file] = _result(cell, error=error)
                write_atomically(file, json.dumps(results[file], indent=1).encode())
            del left[file]
            yield file, results[file]


def _measured_in_processes(
    cells: dict[Path, Cell], study: Study, data: TaskData, jobs: int
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield cells as they are measured, until all are or one of the processes has died."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Read when a process starts. The bars of several processes would overwrite each other.
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
            # Only a terminal sends its Ctrl-C to those of the pool too.
            for process in set(multiprocessing.active_children()).difference(others):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for the processes that start in this context."""
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
    found = _measured(cell, study, data, file.parents[1])
    write_atomically(file, json.dumps(found, indent=1).encode())
    return found


def _measured(cell: Cell, study: Study, data: TaskData, folder: Path) -> dict[str, Any]:
    """Measure one cell; what goes wrong is part of the result."""
    start = time.monotonic()
    evaluation = record = None
    error = None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            cell.model, dtype=study.dtype, device_map=study.device_map
        )
        tokenizer = AutoTokenizer.from_pretrained(cell.model)
        if (config := cell.config()) is not None:
            losses = None
            if CRITERIA[config.method.criterion].needs_scores:
                losses = _losses(cell, config, model, tokenizer, folder)
            CAPPruner(config).prune(model, tokenizer, losses=losses)
            record = model.pruning_record.to_dict()
        evaluation = evaluate(
            model, tokenizer, data=data, limit=study.limit, batch_size=study.batch_size
        )
    except Exception as failure:
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
        logger.warning(f"{cell}: {error}")
    return _result(cell, evaluation, record, time.monotonic() - start, error)


def _result(
    cell: Cell,
    evaluation: Evaluation | None = None,
    record: dict[str, Any] | None = None,
    seconds: float | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """What the file of a cell holds."""
    return {
        "cell": asdict(cell),
        "evaluation": evaluation.to_dict() if evaluation else None,
        "scores": record["scores"] if record else None,
        "matrices": record["matrices"] if record else None,
        "seconds": seconds,
        "error": error,
    }


def _losses(
    cell: Cell, config: CAPConfig, model: PreTrainedModel, tokenizer: Any, folder: Path
) -> UnitLosses:
    """Losses with each unit masked: measured once per model and calibration set."""
    decisive = {name: getattr(config, name) for name in DECISIVE if name != "dataset"}
    named = {
        "layout": _LAYOUT,
        "version": importlib.metadata.version("optimum-cap"),
        "model": _fingerprint(cell.model),
        "dataset": _fingerprint(cell.dataset),
        "dtype": str(model.dtype),
        **decisive,
    }
    file = folder / "scores" / f"{_digest(named)}.safetensors"
    file.parent.mkdir(exist_ok=True)
    with FileLock(file.with_suffix(".lock")):  # another cell may be measuring the same
        if file.is_file():
            try:
                units = ModelView.of(model, config.mlp_unit_size).units(config.scored_units)
                return UnitLosses(units, **load_file(file))
            except SafetensorError:
                logger.warning(f"{file} is damaged: its scores are measured again")
        losses = CAPPruner(config).measure(model, tokenizer)
        write_atomically(file, save(tensors_of(losses)))
    return losses


def _rows(cell: Cell, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The numbers of one cell: a row per task and metric, or one with the error."""
    where = {
        "model": cell.label,
        "recipe": cell.recipe,
        "sparsity": cell.sparsity if cell.sparsity is not None else 0.0,
        "calibration": cell.calibration,
        "seed": cell.seed,
    }
    empty = dict.fromkeys(_COLUMNS)
    if found["error"]:
        return [{**empty, **where, "error": found["error"]}]
    rows = []
    for task, result in Evaluation.from_dict(found["evaluation"]).tasks.items():
        common = {**empty, **where, "task": task, "n": len(result.items), "error": result.error}
        if isinstance(result, AccuracyResult):
            low, high = result.interval
            accuracy = {"metric": "accuracy", "value": result.accuracy, "low": low, "high": high}
            missing = result.without_answer / len(result.items)
            rows.append({**common, **accuracy})
            rows.append({**common, "metric": "loss", "value": result.answer_loss})
            rows.append({**common, "metric": "no_answer", "value": missing})
        else:
            rows.append({**common, "metric": "perplexity", "value": result.perplexity})
    return rows


# Keys


def _key(cell: Cell, evaluated: dict[str, Any]) -> str:
    config = cell.config()
    values, dataset = {}, None
    if config is not None:
        values = {**config.to_dict(), "dataset": None, "memory_budget": None}
        # Like the budget, it changes no more than rounding; cells from before it stay valid.
        del values["torch_compile"]
        if config.method.needs_data:
            dataset = _fingerprint(cell.dataset)
        elif config.method.criterion != "random":
            values["seed"] = None  # one cell serves all calibration sets and seeds
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
    """What tells a model, a data set or a list of them from another: of files, their content."""
    if isinstance(name, list):
        return [_fingerprint(entry) for entry in name]
    if isinstance(name, dict):
        return {**name, "path": _fingerprint(name.get("path"))}
    place = Path(str(name))
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.is_file())
        return [[file.name, _file_digest(file)] for file in files]
    preset, path = "", place
    if not place.is_file():
        preset, path = str(name).partition("=")[0], Path(str(name).partition("=")[2])
    return [preset, _file_digest(path)] if path.is_file() else name


_digests: dict[tuple[str, int, int], str] = {}


def _file_digest(path: Path) -> str:
    status = path.stat()
    known = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if known not in _digests:
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
            _digests[known] = digest.hexdigest()
    return _digests[known]


def _digest_of_tasks(data: TaskData) -> dict[str, str]:
    return {
        name: _digest([getattr(item, "digest", None) for item in what])
        if isinstance(what, tuple)
        else _digest(what.text)
        for name, (what, _) in data.items()
    }


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


# Files


def _read(file: Path) -> dict[str, Any] | None:
    """Read a cell; one that cannot be read is measured again."""
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        logger.warning(f"{file} is damaged: its cell is measured again")
        return None
    return values


def read_cells(study: Study, folder: str | Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yield the measured cells of a study with what their files hold."""
    data = load_task_data(",".join(study.tasks), study.data_dir)
    for cell, file in _cell_files(study, data, Path(folder)):
        if (found := _read(file)) is not None:
            yield cell, found


def _cell_files(study: Study, data: TaskData, folder: Path) -> list[tuple[Cell, Path]]:
    """Every cell, and the file that holds it, or will."""
    evaluated = {"tasks": _digest_of_tasks(data), "limit": study.limit, "dtype": study.dtype}
    return [(cell, folder / "cells" / f"{_key(cell, evaluated)}.json") for cell in study.cells()]


# The values of the file


def _list(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise ValueError(f"{name} of the study must be a list, got {values!r}")
    if len({json.dumps(value) for value in values}) < len(values):
        raise ValueError(f"{name} of the study names a value twice: {values}")
    return values


def _labelled(name: str, values: Any) -> dict[str, Any]:
    """Give a bare name, or each of a list of them, its last part as label."""
    if isinstance(values, dict):
        return {str(label): value for label, value in values.items()}
    names = values if isinstance(values, list) else [values]
    labelled = {Path(str(value)).name: value for value in names}
    if len(labelled) < len(names):
        raise ValueError(
            f"{name} of the study have the same last part: label them, as in "
            f"`{name}: {{first: {names[0]}}}`"
        )
    return labelled


def _recipes(values: Any) -> dict[str, dict[str, Any]]:
    """A list of names of recipes, or labels with fields of `CAPConfig`."""
    if isinstance(values, list):
        if unknown := [name for name in values if name not in RECIPES]:
            raise ValueError(
                f"unknown recipe {unknown[0]!r} in the study: choose from {', '.join(RECIPES)}, or "
                "give labels with fields of CAPConfig"
            )
        return {name: {"recipe": name} for name in _list("recipes", values)}
    if not isinstance(values, dict):
        raise ValueError(f"recipes of the study must be a list or labels, got {values!r}")
    recipes = {}
    for label, changes in values.items():
        changes = {"recipe": label} if changes is None else changes
        if not isinstance(changes, dict) or set(changes) & set(_OF_A_CELL):
            raise ValueError(
                f"recipe {label!r} of the study must be fields of CAPConfig other than "
                f"{', '.join(_OF_A_CELL)}, got {changes!r}"
            )
        recipes[str(label)] = changes
    if DENSE in recipes:
        raise ValueError(
            f"no recipe of the study can be called {DENSE!r}: that is the model itself"
        )
    return recipes
