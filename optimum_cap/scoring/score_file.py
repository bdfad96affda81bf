"""Scores files: losses for computing causal scores, reusable at any sparsity.

A scores file is a safetensors file. It contains the losses as tensors; its metadata describes what
was measured (model, calibration examples, units, estimator) and has a checksum of the whole. The
losses can be used with any sparsity, number of subsets and aggregation, but not with another model,
data set or seed.
"""

import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from optimum_cap.config import (
    ANSWER_FIELDS,
    ANSWER_SELECTIONS,
    ANSWERS,
    SCORED_TOKENS,
    SCORED_UNITS,
    CAPConfig,
)
from optimum_cap.data import CalibrationExample
from optimum_cap.models import ModelView, SiteUnit
from optimum_cap.runtime import (
    VERSIONED,
    digest_of,
    examples_digest,
    model_digest,
    write_atomically,
)
from optimum_cap.scoring.estimators import ESTIMATORS
from optimum_cap.scoring.scores import UnitLosses
from optimum_cap.text import printable, public_name

_LAYOUT = 1
_METADATA = "optimum_cap_scores"
DECISIVE = (
    "dataset",
    "answers",
    *ANSWER_FIELDS,
    "num_samples",
    "seed",
    "scored_tokens",
    "scored_units",
    "mlp_unit_size",
    "max_length",
    "estimator",
    "exact_examples",
    "precision",
)
"""The fields of `CAPConfig` that losses depend on."""
_UNITS = ("scored_units", "mlp_unit_size")
_TOO_DEEP = "its metadata is nested too deeply"


@dataclass(frozen=True)
class SavedScores:
    """The content of a scores file.

    Attributes:
        path: The file.
        tensors: `intact`, `masked` and, for some estimators, `standard_errors` of `UnitLosses`.
        metadata: Description of the measurement, as plain JSON values.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `CAPConfig` that the losses were measured with (`DECISIVE`)."""
        settings: dict[str, Any] = self.metadata["settings"]
        return settings

    def losses(
        self,
        view: ModelView,
        examples: list[CalibrationExample],
        config: CAPConfig,
    ) -> UnitLosses:
        """Return the losses, after checking that they match the model, the examples and the config.

        Raises:
            ValueError: The losses are for another model, other calibration examples, other units or
                another estimator.
        """
        settings = self.settings
        self._check_settings(_UNITS, config)
        units = view.units(config.scored_units)
        if self.metadata["units"] != _names(units) or self.metadata["model"] != model_digest(
            view.model
        ):
            raise ValueError(
                f"the scores in {self.path} are of another model "
                f"({self.metadata['base_model'] or 'unnamed'}) than "
                f"{view.model.name_or_path or 'this one'}, or of other weights: score this model "
                "with `optimum-cli cap score`"
            )
        if self.metadata["examples"] != examples_digest(examples):
            raise ValueError(
                f"the scores in {self.path} are of other calibration examples (dataset "
                f"{settings['dataset']}, num_samples {settings['num_samples']}, seed "
                f"{settings['seed']}) than this config takes (dataset "
                f"{config.to_dict()['dataset']}, num_samples {config.num_samples}, seed "
                f"{config.seed}): use the same, or score again"
            )
        self._check_settings(("estimator", *ESTIMATORS[config.estimator].fields), config)
        return UnitLosses(units, **self.tensors)

    def _check_settings(self, names: Iterable[str], config: CAPConfig) -> None:
        for name in names:
            # Older files, which only have scores of heads, do not store every field.
            stored = self.settings.get(name, getattr(CAPConfig, name))
            if stored != getattr(config, name):
                raise ValueError(
                    f"the scores in {self.path} are of {name} {stored!r}, but the config asks for "
                    f"{getattr(config, name)!r}: use the same, or score again"
                )


def save_scores(
    path: str | os.PathLike[str],
    losses: UnitLosses,
    model: PreTrainedModel,
    examples: list[CalibrationExample],
    config: CAPConfig,
) -> None:
    """Write a scores file atomically.

    Args:
        path: The file; an existing file is replaced.
        losses: The losses, as returned by `CAPPruner.measure`.
        model: The model, as it was measured.
        examples: The calibration examples.
        config: The config of the measurement.

    Raises:
        OSError: The file cannot be written.
    """
    values = config.to_dict()
    tensors = tensors_of(losses)
    metadata = {
        "layout": _LAYOUT,
        "base_model": public_name(model.name_or_path),
        "model": model_digest(model),
        "examples": examples_digest(examples),
        "rows": [example.digest for example in examples],
        "units": _names(losses.units),
        "settings": {name: values[name] for name in DECISIVE},
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
    }
    metadata["sha256"] = digest_of(tensors, metadata)
    data = safetensors.torch.save(tensors, {_METADATA: json.dumps(metadata, sort_keys=True)})
    write_atomically(Path(path), data)


def read_scores(path: str | os.PathLike[str]) -> SavedScores:
    """Read a scores file and verify its checksum.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a scores file, has a different layout, or is damaged; the message
            names the file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"the scores file {file} does not exist: create it with `optimum-cli cap score`"
        )
    try:
        with safe_open(file, "pt") as stored:
            metadata = json.loads((stored.metadata() or {}).get(_METADATA, "null"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except RecursionError:
        raise _damaged(file, _TOO_DEEP) from None
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{file} is not a scores file, or is damaged ({printable(str(error))}): score again"
        ) from error
    if not isinstance(metadata, dict) or "layout" not in metadata:
        raise ValueError(f"{file} is not a scores file: create one with `optimum-cli cap score`")
    if metadata["layout"] != _LAYOUT:
        raise ValueError(
            f"the scores file {file} has layout {metadata['layout']!r}, but this optimum-cap reads "
            f"{_LAYOUT}: upgrade optimum-cap or score again"
        )
    if problem := _problem_of_names(tensors):
        raise _damaged(file, problem)
    try:
        if metadata.pop("sha256", None) != digest_of(tensors, metadata):
            raise _damaged(file, "wrong checksum")
    except RecursionError:
        raise _damaged(file, _TOO_DEEP) from None
    if problem := _problem_of_metadata(metadata) or _problem_of_values(tensors, metadata):
        raise _damaged(file, problem)
    return SavedScores(file, tensors, metadata)


def _damaged(file: Path, problem: str) -> ValueError:
    return ValueError(f"the scores file {file} is damaged ({problem}): score again")


def _problem_of_names(tensors: dict[str, torch.Tensor]) -> str | None:
    """Return what is wrong with the names or dtypes of a file's tensors, if anything."""
    if not {"intact", "masked"} <= tensors.keys() <= {"intact", "masked", "standard_errors"}:
        return f"it holds the tensors {sorted(tensors)}, not 'intact' and 'masked'"
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float64:
            return f"its tensor {name!r} is {tensor.dtype}, not torch.float64"
    return None


def _problem_of_metadata(metadata: dict[str, Any]) -> str | None:
    """Return what is wrong with the metadata of a file, if anything."""

    def are_digests(values: Any) -> bool:
        return isinstance(values, list) and all(isinstance(value, str) for value in values)

    def are_units(values: Any) -> bool:
        return isinstance(values, list) and all(
            isinstance(value, list)
            and [type(part) for part in value] == [str, int]
            and value[1] >= 0
            for value in values
        )

    valid = {
        "base_model": lambda value: value is None or isinstance(value, str),
        "model": lambda value: isinstance(value, str),
        "examples": lambda value: isinstance(value, str),
        "rows": are_digests,
        "units": are_units,
        "settings": lambda value: isinstance(value, dict),
    }
    for name, is_valid in valid.items():
        if name not in metadata:
            return f"its metadata has no {name!r}"
        if not is_valid(metadata[name]):
            return f"{name!r} in its metadata has another type than expected"
    settings = metadata["settings"]
    if unknown := sorted(settings.keys() - _VALID_SETTINGS.keys()):
        return f"its settings have an unknown field {unknown[0]!r}"
    for name, is_valid in _VALID_SETTINGS.items():
        if name in settings and not is_valid(settings[name]):
            return f"the value of {name!r} in its settings cannot be right"
        if name not in settings and name in _ALWAYS_SET:
            return f"its settings have no {name!r}"
    return None


def _problem_of_values(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> str | None:
    """Return what is wrong with the shapes or values of a file's tensors, if anything."""
    units, examples = len(metadata["units"]), len(metadata["rows"])
    shapes = {"intact": [examples], "masked": [units, examples], "standard_errors": [units]}
    for name, tensor in tensors.items():
        if list(tensor.shape) != shapes[name]:
            return (
                f"its tensor {name!r} has shape {list(tensor.shape)}, but {shapes[name]} fits its "
                f"{units} units and {examples} examples"
            )
    if bad := int((~tensors["intact"].isfinite()).sum()):
        return f"the loss of the intact model is not finite on {bad} of {examples} examples"
    if "standard_errors" in tensors and bool((tensors["standard_errors"] < 0).any()):
        return "it has negative standard errors"
    return None


def _is_integer(value: Any, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


_VALID_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "dataset": lambda value: isinstance(value, str | list | dict) and bool(value),
    "answers": lambda value: isinstance(value, str) and value in ANSWERS,
    "temperature": lambda value: _is_positive(value),
    "top_p": lambda value: _is_positive(value) and value <= 1,
    "max_new_tokens": lambda value: _is_integer(value, 1),
    "answer_attempts": lambda value: _is_integer(value, 1),
    "answer_selection": lambda value: isinstance(value, str) and value in ANSWER_SELECTIONS,
    "answer_candidates": lambda value: value is None or _is_integer(value, 1),
    "num_samples": lambda value: _is_integer(value, 1),
    "seed": lambda value: _is_integer(value, 0),
    "scored_tokens": lambda value: isinstance(value, str) and value in SCORED_TOKENS,
    "scored_units": lambda value: isinstance(value, str) and value in SCORED_UNITS,
    "mlp_unit_size": lambda value: value is None or _is_integer(value, 1),
    "max_length": lambda value: value is None or _is_integer(value, 2),
    "estimator": lambda value: isinstance(value, str) and value in ESTIMATORS,
    "exact_examples": lambda value: _is_integer(value, 2),
    "precision": lambda value: _is_positive(value),
}
_ALWAYS_SET = ("dataset", "num_samples", "seed", "scored_tokens", "estimator")


def tensors_of(losses: UnitLosses) -> dict[str, torch.Tensor]:
    """Return the tensors of losses by name, with standard errors if there are any."""
    tensors = {"intact": losses.intact, "masked": losses.masked}
    if losses.standard_errors is not None:
        tensors["standard_errors"] = losses.standard_errors
    return tensors


def _names(units: list[SiteUnit]) -> list[list[str | int]]:
    return [[site.name, unit.index] for site, unit in units]
