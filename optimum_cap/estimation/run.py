"""Estimates of the operations, time, memory and disk space of scoring, pruning and evaluation.

The model is built on the meta device from its configuration, so no weights are read or allocated.
`work.py` counts the work, `hardware.py` provides the rates, and `costs.py` combines the two.
"""

import json
import math
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from optimum_cap.config import RECIPES, CAPConfig
from optimum_cap.data import build_calibration_set, shared_prefix
from optimum_cap.estimation.costs import ESTIMATOR_COSTS, Cost, CostModel
from optimum_cap.estimation.disk import SIZES
from optimum_cap.estimation.hardware import Hardware, Size, find_hardware
from optimum_cap.estimation.parts import RemovalCosts, RemovedParts, Smaller, model_on_meta
from optimum_cap.estimation.structured import PATTERN, MeasuredParts, StructuredCosts
from optimum_cap.estimation.work import ModelWork, Workload, count_work
from optimum_cap.evaluation import (
    DEFAULT_TASKS,
    HARNESS_PREFIX,
    LOSS_PREFIX,
    check_counts,
    resolve_tasks,
)
from optimum_cap.methods import CRITERIA, SMALLER_PATTERNS
from optimum_cap.models import find_sites
from optimum_cap.scoring import DECISIVE, WORTHWHILE_SHARE
from optimum_cap.study import Study
from optimum_cap.text import aligned, format_duration, format_size, labelled

EXAMPLES = 128
TOKENS = 256
SPARSITY = 0.5
_BOUNDS = (
    "Upper bounds: adaptive stops as soon as the scores are known well enough, and most of the "
    "model's own answers end before the longest one."
)


@dataclass(frozen=True)
class Estimate:
    """The cost of scoring, pruning and evaluating a model.

    Attributes:
        model: Name of the model.
        parameters: Number of parameters.
        prunable: Number of prunable weights.
        heads: Number of attention heads.
        mlp_groups: Number of MLP units.
        experts: Number of experts.
        scored: Number of units that are scored.
        weight_bytes: Bytes of the weights in the dtype of the computation.
        shape: Lengths of the calibration set.
        hardware: The rates.
        costs: One entry per estimator, recipe and evaluation, or per step of removing parts.
        sparsity: Sparsity of the checkpoint, or the requested fraction of removed parts.
        checkpoint: Bytes of the weights on disk in each format; a model that loses parts is always
            saved dense.
        smaller: The size of a model that loses parts; `None` if it keeps them.
    """

    model: str
    parameters: int
    prunable: int
    heads: int
    mlp_groups: int
    experts: int
    scored: int
    weight_bytes: float
    shape: Workload
    hardware: Hardware
    costs: tuple[Cost, ...]
    sparsity: float
    checkpoint: dict[str, float]
    smaller: Smaller | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes as plain JSON values."""
        return asdict(self)

    def table(self) -> str:
        """Return the estimate as a table for a terminal of 80 columns."""
        shape, hardware = self.shape, self.hardware
        shared = f", the first {shape.prefix} shared" if shape.prefix else ""
        facts = {
            "model": f"{self.model}, {self.parameters / 1e9:.3g} B parameters, "
            f"{self.prunable / 1e9:.3g} B prunable, {format_size(int(self.weight_bytes))}",
            **(self._units() if self.smaller is None else self._left(self.smaller)),
            "calibration": f"{shape.examples} examples of {shape.tokens} tokens{shared}, "
            f"{shape.scored} scored",
            "hardware": f"{hardware.name}, {hardware.count} x {format_size(int(hardware.memory))}",
            "rates": hardware.source,
        }
        if tasks := next((cost.name for cost in self.costs if "," in cost.name), None):
            facts["tasks"] = tasks
        header = ("step", "", "operations", "time", "memory", "disk", "devices")
        rows = [
            (
                cost.step,
                f"{cost.name.count(',') + 1} tasks" if "," in cost.name else cost.name,
                f"{cost.operations:.2e}" if cost.operations else "-",
                format_duration(cost.seconds),
                format_size(int(cost.memory)),
                format_size(int(cost.disk)) if cost.disk else "-",
                str(cost.devices),
            )
            for cost in self.costs
        ]
        table = aligned([header, *rows], left=2)
        bounds = [_BOUNDS] if self.smaller is None else []
        notes = [f"\n{textwrap.fill(note, 80)}" for note in [*bounds, *self._warnings()]]
        return "\n".join([labelled(facts.items()), "", table, *notes])

    def _units(self) -> dict[str, str]:
        """Return the table rows about the units and the checkpoint."""
        units = {"heads": self.heads, "MLP units": self.mlp_groups, "experts": self.experts}
        sizes = {name: format_size(int(size)) for name, size in self.checkpoint.items()}
        return {
            "units": ", ".join(f"{count:,} {name}" for name, count in units.items() if count)
            + (f"; {self.scored:,} units scored" if self.scored != self.heads else ""),
            "checkpoint": f"{self.sparsity:.0%} zeros: dense {sizes['dense']}, packed "
            f"{sizes['packed']}, coded about {sizes['coded']}",
        }

    def _left(self, smaller: Smaller) -> dict[str, str]:
        """Return what the table says of a model that loses parts."""
        size = (
            f"{smaller.parameters / 1e9:.3g} B parameters, "
            f"{smaller.parameters / self.parameters:.1%}, {format_size(smaller.disk)} on disk"
        )
        if smaller.before is None or smaller.after is None or smaller.weights_left is None:
            return {
                "removed": "the parts that matter least, of all kinds",
                "left": f"about {size}",
            }
        count = smaller.before - smaller.after
        parts = "key/value heads" if smaller.pattern == "heads" else smaller.pattern
        each = "" if smaller.pattern == "layers" else " of each layer"
        which = "" if smaller.alike else f"; layers differ in size, without layers 1 to {count}"
        return {
            "removed": f"{count:,} of {smaller.before:,} {parts}{each}",
            "left": size + which,
            "promise": f"{1 / smaller.weights_left:.2f} times as fast, as "
            f"{smaller.weights_left:.1%} of the weights that multiply a token are left",
        }

    def _warnings(self) -> list[str]:
        hardware = self.hardware
        most = max(cost.devices for cost in self.costs)
        if most <= hardware.count:
            return []
        least = min(cost.devices for cost in self.costs)
        count = str(most) if least == most else f"{least} to {most}"
        return [
            f"{self.model} does not fit {hardware.name} in every step: one copy needs {count} "
            f"devices of {format_size(int(hardware.memory))}, there are {hardware.count}. Times "
            "are those of as many devices as a step needs, which work one after the other.",
        ]


def estimate(
    model: str | Path | PretrainedConfig,
    hardware: str | Hardware = "measured",
    *,
    examples: int = EXAMPLES,
    tokens: int = TOKENS,
    scored: int | None = None,
    prefix: int = 0,
    sparsity: float = SPARSITY,
    limit: int | None = None,
    batch_size: int = 32,
    scored_units: str = "heads",
    mlp_unit_size: int | None = None,
    num_fewshot: int = 0,
    max_new_tokens: int = CAPConfig.max_new_tokens,
    pattern: str = "unstructured",
    **load_options: Any,
) -> Estimate:
    """Estimate the cost of scoring, pruning and evaluating a model, from its configuration alone.

    With a pattern that removes parts, the estimate covers choosing and refining the parts, and the
    resulting model. Options for scoring, evaluation and the model's own answers then have no
    effect.

    Args:
        model: A folder, a Hub id, a configuration file, or a configuration.
        hardware: A name for `find_hardware`, or rates.
        examples: Number of calibration examples.
        tokens: Tokens per example.
        scored: Scored tokens per example; `None` is half of the tokens after the prefix.
        prefix: Tokens at the start shared by all examples, which exact scoring computes once.
        sparsity: Sparsity of the pruned checkpoint, which determines its size on disk; or the
            fraction of the parts that are removed (with `"structured"`, of the parameters).
        limit: Questions or windows per evaluation task; `None` is all.
        batch_size: Questions per batch.
        scored_units: Units to score: `"heads"`, or `"all"` (heads, MLPs and experts).
        mlp_unit_size: Channels per MLP or expert unit; `None` is all of them.
        num_fewshot: Worked examples in the prompts of the evaluation.
        max_new_tokens: Longest answer of the model to a calibration prompt (`answers="model"`).
        pattern: `"experts"`, `"heads"`, `"channels"` or `"layers"` to remove these, `"structured"`
            to remove parts of all these kinds; or `"unstructured"`.
        **load_options: Passed to `AutoConfig.from_pretrained`: `revision`, `token`, ...

    Raises:
        ValueError: A count, the hardware or the architecture cannot be used, or these parts cannot
            be removed from the model.
        FileNotFoundError: The model does not exist.
    """
    shape = _workload(examples, tokens, scored, prefix)
    check_counts(limit, batch_size, num_fewshot, max_new_tokens)
    _check_pattern(pattern)
    # Check the values.
    CAPConfig(sparsity=sparsity, recipe="paper", scored_units=scored_units)
    config = load_config(model, **load_options)
    work = work_of(config, mlp_unit_size, scored_units)
    parts = None
    if pattern in SMALLER_PATTERNS:
        parts = _parts_of(config, CAPConfig(sparsity, pattern=pattern))
    cost_model = _cost_model(work, config, hardware, tokens)
    removal = None if parts is None else _removal_costs(parts, cost_model)
    if removal is None:
        costs = [cost_model.scoring(name, shape) for name in ESTIMATOR_COSTS]
        costs.append(cost_model.paper(shape, sparsity))
        for name in ("causal", "causal_fast", "wanda", "sparsegpt"):
            costs.append(cost_model.pruning(name, RECIPES[name], shape, sparsity))
        costs.append(cost_model.answering(shape, max_new_tokens))
        limits = dict.fromkeys(DEFAULT_TASKS, limit)
        costs.append(cost_model.evaluation(limits, batch_size, num_fewshot))
        checkpoint = {name: size(work, sparsity, cost_model.stored) for name, size in SIZES.items()}
    else:
        costs = removal.all(shape)
        checkpoint = {"dense": float(removal.left.disk)}
    return Estimate(
        model=str(model) if isinstance(model, str | Path) else config.model_type,
        parameters=work.parameters,
        prunable=work.prunable,
        heads=work.heads,
        mlp_groups=sum(layer.groups for layer in work.layers),
        experts=sum(layer.experts for layer in work.layers),
        scored=work.scored,
        weight_bytes=cost_model.weights,
        shape=shape,
        hardware=cost_model.hardware,
        costs=tuple(costs),
        sparsity=sparsity,
        checkpoint=checkpoint,
        smaller=None if removal is None else removal.left,
    )


def _check_pattern(pattern: str) -> None:
    """Check that estimates support a pattern.

    Raises:
        ValueError: They do not.
    """
    if pattern not in ("unstructured", *SMALLER_PATTERNS):
        raise ValueError(
            f"there is no estimate for pattern {pattern!r}: choose "
            f"{', '.join(map(repr, SMALLER_PATTERNS))}, or 'unstructured', which costs "
            "about as much as N:M with the same sparsity"
        )


def _parts_of(config: PretrainedConfig, pruning: CAPConfig) -> RemovedParts | MeasuredParts:
    """Return what a pattern removes or measures; the errors are those of pruning."""
    kind = MeasuredParts if pruning.pattern == PATTERN else RemovedParts
    return kind.of(config, pruning)


def _removal_costs(
    parts: RemovedParts | MeasuredParts, cost_model: CostModel
) -> RemovalCosts | StructuredCosts:
    if isinstance(parts, MeasuredParts):
        return StructuredCosts(parts, cost_model)
    return RemovalCosts(parts, cost_model)


def load_config(model: str | Path | PretrainedConfig, **load_options: Any) -> PretrainedConfig:
    """Load the configuration of a model from a folder, a configuration file or the Hub.

    Raises:
        ValueError: The file or folder has no configuration of a supported model type.
        FileNotFoundError: `model` is neither a file, nor a folder, nor a Hub id that can be read.
    """
    if isinstance(model, PretrainedConfig):
        return model
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if path.is_file():
        return _config_in(path, **load_options)
    if Path(model).is_dir():
        raise FileNotFoundError(f"the folder {model} has no config.json: name a model's folder")
    try:
        return AutoConfig.from_pretrained(model, **load_options)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no model {str(model)!r}: it is neither a folder nor a configuration file, and "
            f"reading it from the Hub failed ({type(error).__name__}); check the name"
        ) from error


def _config_in(path: Path, **load_options: Any) -> PretrainedConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values.get("model_type") if isinstance(values, dict) else None
        if kind is None:
            raise ValueError("it has no model_type")
        return AutoConfig.from_pretrained(path, **load_options)
    except ValueError as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"{path} is not the configuration of a model: {reason}") from error


def work_of(
    config: PretrainedConfig, mlp_unit_size: int | None = None, scored_units: str = "heads"
) -> ModelWork:
    """Count the work of a model built from its configuration on the meta device."""
    model = model_on_meta(config)
    return count_work(model, find_sites(model, mlp_unit_size), scored_units)


def size_of(work: ModelWork, tokens: int) -> Size:
    """Return the sizes of a model that `hardware.measure` uses."""
    layer = work.layers[0]
    wide = max(product.inputs for product in layer.rest)
    return Size(layer.hidden, wide, layer.heads, tokens)


def lengths_of(config: CAPConfig, tokenizer: Any) -> dict[str, int]:
    """Return the mean `tokens` and `scored` tokens of calibration examples, and their `prefix`.

    The means are rounded up. The prefix is what exact scoring computes once for all examples; it is
    0 if that would not save time.

    Args:
        config: The data set and the number of examples.
        tokenizer: The model's tokenizer.

    Raises:
        ValueError: The data cannot be used.
        FileNotFoundError: A file does not exist.
    """
    examples = build_calibration_set(config, tokenizer).examples
    count, prefix = len(examples), shared_prefix(examples)
    lengths = [len(example.input_ids) for example in examples]
    worthwhile = count > 1 and prefix >= WORTHWHILE_SHARE * max(lengths)
    return {
        "tokens": math.ceil(sum(lengths) / count),
        "scored": math.ceil(sum(int(example.scored.sum()) for example in examples) / count),
        "prefix": prefix if worthwhile else 0,
    }


# Studies


@dataclass(frozen=True)
class StudyHours:
    """Device hours of a study: hours times the number of devices the model needs.

    Attributes:
        hardware: The rates.
        rows: Per model, the number of `cells`, and the device hours of loading, scoring, pruning
            and evaluation.
    """

    hardware: Hardware
    rows: dict[str, dict[str, float]]

    @property
    def total(self) -> float:
        """Total device hours."""
        return sum(hours for row in self.rows.values() for hours in _hours(row))

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes and the total as plain JSON values."""
        return {**asdict(self), "total": self.total}

    def table(self) -> str:
        """Return the estimate as a table for the terminal."""
        header = ("model", "cells", *_PARTS, "device hours")
        rows = [
            (label, f"{row['cells']:.0f}", *(f"{n:.2f}" for n in [*_hours(row), sum(_hours(row))]))
            for label, row in self.rows.items()
        ]
        hardware = self.hardware
        return (
            f"hardware     {hardware.name}\nrates        {hardware.source}\n\n"
            f"{aligned([header, *rows], left=2)}\n"
            f"\ntotal        {self.total:.1f} device hours"
        )


_PARTS = ("loading", "scoring", "pruning", "evaluation")


def _hours(row: dict[str, float]) -> list[float]:
    return [row[part] for part in _PARTS]


def study_hours(
    study: Study | str | Path,
    hardware: str | Hardware = "measured",
    *,
    tokens: int = TOKENS,
    **load_options: Any,
) -> StudyHours:
    """Estimate the device hours of a study, assuming that no cell has been measured yet.

    Every cell loads, prunes and evaluates its model. Losses with masked units are measured once for
    all cells that agree in the fields the losses depend on (`DECISIVE` in
    `optimum_cap/scoring/score_file.py`). Cells that need no data are measured once for all
    calibration sets. The estimator `"adaptive"` is assumed to measure every loss.

    Args:
        study: A study or its file.
        hardware: As for `estimate`. Regardless of the count, one device is used, or as many as the
            model needs.
        tokens: Tokens per calibration example, half of them scored.
        **load_options: As for `estimate`.

    Raises:
        ValueError: As for `Study.load` and `estimate`.
        FileNotFoundError: As for `Study.load` and `estimate`.
    """
    if not isinstance(study, Study):
        study = Study.load(study)
    tasks = resolve_tasks(study.tasks)
    if unknown := [name for name in tasks if name.startswith((HARNESS_PREFIX, LOSS_PREFIX))]:
        raise ValueError(
            f"the cost of {', '.join(unknown)} cannot be estimated, as their sizes are not known: "
            "leave them out of the study that is estimated"
        )
    rows = {}
    for label, name in study.models.items():
        config = load_config(name, **load_options)
        cost_model = _cost_model(work_of(config), config, hardware, tokens)
        hardware = cost_model.hardware = replace(cost_model.hardware, count=1)  # measured once
        evaluation = cost_model.evaluation(study.limits, study.batch_size, study.num_fewshot or 0)
        pruned = _distinct(study, label)
        count = 1 + len(pruned)
        loading = cost_model.weights / hardware.loading * evaluation.devices
        rows[label] = {
            "cells": count,
            "loading": count * loading / 3600,
            "scoring": sum(_scoring(cost_model, config, pruned, tokens)) / 3600,
            "pruning": sum(_pruning(cost_model, config, each, tokens) for each in pruned) / 3600,
            "evaluation": count * _device_seconds(evaluation) / 3600,
        }
    return StudyHours(cost_model.hardware, rows)


def _distinct(study: Study, label: str) -> list[CAPConfig]:
    """Return the configs of a model's cells that the study measures separately."""
    distinct = {}
    for cell in study.cells():
        config = cell.config()
        if cell.label != label or config is None:
            continue
        key = {**config.to_dict(), "dataset": config.dataset}  # including the folders of files
        # As in the keys of a study, these fields change only rounding.
        del key["memory_budget"], key["torch_compile"]
        if not config.method.needs_data:
            del key["dataset"]
            if config.method.criterion != "random":
                del key["seed"]
        distinct[json.dumps(key, sort_keys=True, default=str)] = config
    return list(distinct.values())


def _scoring(
    cost_model: CostModel, model: PretrainedConfig, configs: list[CAPConfig], tokens: int
) -> list[float]:
    """Return the device seconds per set of losses with masked units, which cells may share."""
    measured = {
        str([getattr(config, name) for name in DECISIVE]): config
        for config in configs
        if CRITERIA[config.method.criterion].needs_scores
    }
    seconds = []
    for config in measured.values():
        if config.scored_units == "all":
            work = work_of(model, config.mlp_unit_size, "all")
            all_units = CostModel(work, cost_model.hardware, cost_model.value, cost_model.stored)
        else:
            all_units = cost_model
        shape = _workload(config.num_samples, tokens)
        cost = all_units.scoring(config.estimator, shape, config.exact_examples)
        seconds.append(_device_seconds(cost))
    return seconds


def _pruning(
    cost_model: CostModel, model: PretrainedConfig, config: CAPConfig, tokens: int
) -> float:
    """Return the device seconds of pruning, excluding scoring but including own answers."""
    shape = _workload(config.num_samples, tokens)
    name, method = config.recipe, config.method
    if config.pattern in SMALLER_PATTERNS:
        removal = _removal_costs(_parts_of(model, config), cost_model)
        costs = [removal.pruning(name, method, shape)]
    else:
        measured = config.allocation_examples
        costs = [cost_model.pruning(name, method, shape, config.sparsity, measured)]
    if config.method.needs_data and config.answers == "model":
        costs.append(cost_model.answering(shape, config.max_new_tokens))
    return sum(map(_device_seconds, costs))


def _device_seconds(cost: Cost) -> float:
    return cost.seconds * cost.devices


# Shared by both


def _cost_model(
    work: ModelWork, config: PretrainedConfig, hardware: str | Hardware, tokens: int
) -> CostModel:
    if isinstance(hardware, str):
        hardware = find_hardware(hardware, size_of(work, tokens))
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return CostModel(work, hardware, hardware.bytes_per_value or stored.itemsize, stored)


def _workload(examples: int, tokens: int, scored: int | None = None, prefix: int = 0) -> Workload:
    scored = max(1, (tokens - prefix) // 2) if scored is None else scored
    for label, value, least in (
        ("examples", examples, 1),
        ("tokens", tokens, 2),
        ("scored", scored, 1),
        ("prefix", prefix, 0),
    ):
        if value < least:
            raise ValueError(f"{label} must be at least {least}, got {value}")
    if prefix + scored >= tokens:
        raise ValueError(
            f"prefix {prefix} and {scored} scored tokens leave no token of {tokens} to predict the "
            "first scored one: lower prefix or scored"
        )
    return Workload(examples, tokens, scored, prefix)
