"""`CAPPruner.prune()` reads like the way of the data: open this file first."""

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from optimum_cap.architectures import Matrix, Site, find_sites, prunable_matrices
from optimum_cap.attribution import CausalScores, causal_scores, exact_losses
from optimum_cap.calibration import CalibrationSet, build_calibration_set
from optimum_cap.checkpoint import attach
from optimum_cap.config import CAPConfig
from optimum_cap.criteria import (
    UnitKey,
    head_importances,
    magnitude_times_importance,
    region_importances,
    unit_importances,
)
from optimum_cap.masking import Threshold, apply_mask_, keep_masks, kth_smallest
from optimum_cap.record import MatrixSparsity, PruningRecord, UnitScore

logger = logging.get_logger(__name__)


class CAPPruner:
    """Prunes a causal language model in memory; transformers is left as it is.

    Args:
        config: What to prune and how.

    Example:
        ```python
        pruner = CAPPruner(CAPConfig(sparsity=0.2, dataset="gsm8k"))
        model = pruner.prune(model, tokenizer)
        model.save_pretrained("pruned")  # a sparse checkpoint
        ```
    """

    def __init__(self, config: CAPConfig) -> None:
        self.config = config

    def prune(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        dataset: Any = None,
        base_revision: str | None = None,
    ) -> PreTrainedModel:
        """Score, rank and zero the weights of `model`, in place.

        Nothing is changed before everything is known: an error or an interrupt before the last step
        leaves the model as it was.

        Args:
            model: A decoder-only causal language model in any float dtype.
            tokenizer: Its tokenizer, or the name of one; `None` takes the config's, then the one
                that is saved with the model.
            dataset: Calibration data that replaces the config's.
            base_revision: Commit of the dense model on the Hub, for the record.

        Returns:
            The same model, an ordinary float model with a `pruning_record`, whose
            `save_pretrained` and `push_to_hub` write the sparse checkpoint.

        Raises:
            ValueError: The model, the data or the tokenizer cannot be used; the message says why.
        """
        config = self.config
        if dataset is not None:
            config = dataclasses.replace(config, dataset=dataset)
        sites = find_sites(model)
        matrices = _to_prune(sites, config.modules_to_leave_dense)
        _check_weights(model, matrices)
        total = sum(_weight(model, matrix).numel() for matrix in matrices)
        zeros = round(config.sparsity * total)
        if not 0 < zeros < total:
            raise ValueError(
                f"sparsity {config.sparsity} of {total} prunable weights is {zeros} zeros: ask for "
                "a sparsity that prunes some weights and keeps some"
            )
        calibration = build_calibration_set(
            config,
            _tokenizer(model, config.tokenizer if tokenizer is None else tokenizer),
            max_length=_max_length(model),
        )

        attention = [site for site in sites if site.kind == "attention"]
        losses = exact_losses(model, attention, calibration.examples, config.memory_budget)
        scores = causal_scores(losses, config.subsets, config.aggregation)
        heads = _head_importances(scores)
        multipliers = region_importances(
            sites, unit_importances(sites, heads), config.kv_combination
        )

        def importances() -> Iterator[torch.Tensor]:
            for matrix in matrices:
                yield magnitude_times_importance(_weight(model, matrix), multipliers[matrix])

        threshold = kth_smallest(importances, zeros)
        for matrix, keep in zip(matrices, keep_masks(importances(), threshold), strict=True):
            apply_mask_(_weight(model, matrix), keep)

        record = _record(model, config, matrices, scores, heads, calibration, threshold)
        attach(model, dataclasses.replace(record, base_revision=base_revision))
        return model


def _to_prune(sites: list[Site], leave_dense: list[str]) -> list[Matrix]:
    """Return the prunable matrices without those that a name in `leave_dense` covers."""
    matrices = prunable_matrices(sites)
    for name in leave_dense:
        if not any(f".{name}." in f".{matrix.parameter}." for matrix in matrices):
            raise ValueError(
                f"modules_to_leave_dense names {name!r}, which is no part of the name of a "
                f"prunable matrix (such as {matrices[0].name})"
            )
    kept = [
        matrix
        for matrix in matrices
        if not any(f".{name}." in f".{matrix.parameter}." for name in leave_dense)
    ]
    if not kept:
        raise ValueError(f"modules_to_leave_dense {leave_dense} leaves nothing to prune")
    return kept


def _weight(model: PreTrainedModel, matrix: Matrix) -> torch.Tensor:
    return matrix.of(model.get_parameter(matrix.parameter).data)


def _check_weights(model: PreTrainedModel, matrices: list[Matrix]) -> None:
    for matrix in matrices:
        weight = _weight(model, matrix)
        if weight.device.type == "meta":
            raise ValueError(
                f"{matrix.name} is not in memory (offloaded to disk, or on the meta device): load "
                "the model with a device_map that keeps all weights in memory to prune it"
            )
        if not weight.is_floating_point():
            raise ValueError(
                f"{matrix.name} has dtype {weight.dtype}; CAP prunes float weights: prune the "
                "model before it is quantized"
            )
        if not weight.isfinite().all():
            raise ValueError(
                f"{matrix.name} holds NaN or infinite weights: the model cannot be scored; check "
                "the checkpoint it was loaded from"
            )


def _tokenizer(model: PreTrainedModel, tokenizer: Any) -> Any:
    """Return a tokenizer: as given, by name, or the one saved with the model."""
    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer
    name = tokenizer or model.name_or_path
    if not name:
        raise ValueError(
            "no tokenizer: the model was not loaded from a path that could hold one; pass "
            "prune(model, tokenizer) or CAPConfig(tokenizer=...)"
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer could be loaded from {name!r}: pass prune(model, tokenizer) or "
            "CAPConfig(tokenizer=...)"
        ) from error


def _max_length(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _head_importances(scores: CausalScores) -> dict[UnitKey, float]:
    """Return the importances of the heads by site and unit; warn of heads that broke the model."""
    for (site, unit), count in zip(scores.units, scores.nonfinite.tolist(), strict=True):
        if count:
            logger.warning(
                f"masking head {unit.index} of {site.name} gave a loss that is not finite on "
                f"{count} examples; they are left out of its score"
            )
    importances = head_importances(scores.scores).tolist()
    return {
        (site.name, unit.index): importance
        for (site, unit), importance in zip(scores.units, importances, strict=True)
    }


def _record(
    model: PreTrainedModel,
    config: CAPConfig,
    matrices: list[Matrix],
    scores: CausalScores,
    heads: dict[UnitKey, float],
    calibration: CalibrationSet,
    threshold: Threshold,
) -> PruningRecord:
    zeros = [int((_weight(model, matrix) == 0).sum()) for matrix in matrices]
    return PruningRecord(
        config=config.to_dict(),
        base_model=model.name_or_path or None,
        base_revision=None,
        matrices=[
            MatrixSparsity(matrix.name, count, _weight(model, matrix).numel())
            for matrix, count in zip(matrices, zeros, strict=True)
        ],
        scores=[
            UnitScore(
                site=site.name,
                unit=unit.index,
                layer=site.layer,
                score=_finite(scores.scores[index]),
                standard_error=_finite(scores.standard_errors[index]),
                importance=heads[site.name, unit.index],
                nonfinite=int(scores.nonfinite[index]),
            )
            for index, (site, unit) in enumerate(scores.units)
        ],
        calibration=calibration.record,
        versions={name: importlib.metadata.version(name) for name in _VERSIONED},
        threshold=threshold.value,
        intact_loss=scores.intact_loss,
    )


def _finite(value: torch.Tensor) -> float | None:
    return float(value) if value.isfinite() else None


_VERSIONED = ("optimum-cap", "safetensors", "tokenizers", "torch", "transformers")
