"""Scores files: the losses that causal scores are made of, kept for any number of prunings.

One safetensors file: the losses as tensors, and in its metadata what they are of (model,
calibration examples, units, estimator) with a checksum over all. They serve any sparsity, number of
subsets and aggregation, and are refused for another model, data set or seed.
"""

import importlib.metadata
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from optimum_cap.config import CAPConfig
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

_LAYOUT = 1
_METADATA = "optimum_cap_scores"
DECISIVE = (
    "dataset",
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


@dataclass(frozen=True)
class SavedScores:
    """What a scores file holds.

    Attributes:
        path: The file.
        tensors: `intact`, `masked` and perhaps `standard_errors` of `UnitLosses`.
        metadata: What they are of, as plain JSON values.
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
        """Return the losses, for the model and data that they are of.

        Raises:
            ValueError: They are of another model, other calibration examples, other units or
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
            # Older files, of heads, do not say what they are of.
            given = self.settings.get(name, getattr(CAPConfig, name))
            if given != getattr(config, name):
                raise ValueError(
                    f"the scores in {self.path} are of {name} {given!r}, but the config asks for "
                    f"{getattr(config, name)!r}: use the same, or score again"
                )


def save_scores(
    path: str | os.PathLike[str],
    losses: UnitLosses,
    model: PreTrainedModel,
    examples: list[CalibrationExample],
    config: CAPConfig,
) -> None:
    """Write a scores file, all or nothing.

    Args:
        path: The file; one that is there is replaced.
        losses: What `CAPPruner.measure` returned.
        model: The model, as it was measured.
        examples: The calibration examples.
        config: What was measured with.

    Raises:
        OSError: The file cannot be written.
    """
    values = config.to_dict()
    tensors = tensors_of(losses)
    metadata = {
        "layout": _LAYOUT,
        "base_model": model.name_or_path or None,
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
    """Read a scores file and check that it is whole.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no scores file, of a newer layout, or damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"the scores file {file} does not exist: make it with `optimum-cli cap score`"
        )
    try:
        with safe_open(file, "pt") as stored:
            metadata = json.loads((stored.metadata() or {}).get(_METADATA, "null"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is no scores file, or damaged ({error}): score again") from error
    if not isinstance(metadata, dict) or "layout" not in metadata:
        raise ValueError(f"{file} is no scores file: make one with `optimum-cli cap score`")
    if metadata["layout"] != _LAYOUT:
        raise ValueError(
            f"the scores file {file} has layout {metadata['layout']}, but this optimum-cap reads "
            f"{_LAYOUT}: upgrade optimum-cap or score again"
        )
    if metadata.pop("sha256", None) != digest_of(tensors, metadata):
        raise ValueError(f"the scores file {file} is damaged (wrong checksum): score again")
    return SavedScores(file, tensors, metadata)


def tensors_of(losses: UnitLosses) -> dict[str, torch.Tensor]:
    """Return the tensors of losses by name, without those that are not there."""
    tensors = {"intact": losses.intact, "masked": losses.masked}
    if losses.standard_errors is not None:
        tensors["standard_errors"] = losses.standard_errors
    return tensors


def _names(units: list[SiteUnit]) -> list[list[str | int]]:
    return [[site.name, unit.index] for site, unit in units]
