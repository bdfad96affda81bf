"""Masked losses as defined in the paper, with one hooked forward pass per unit.

This is the reference for tests.
"""

import torch
from transformers import PreTrainedModel

from optimum_cap.data import Batch, CalibrationExample, batches
from optimum_cap.models import (
    ModelView,
    SiteUnit,
    Targets,
    call_model,
    device_of,
    evaluation_mode,
    float32_on_cpu,
    masked_unit,
    token_losses,
)
from optimum_cap.progress import progress_bar
from optimum_cap.runtime import budget_bytes
from optimum_cap.scoring.batch_sizes import tokens_per_batch
from optimum_cap.scoring.scores import UnitLosses
from optimum_cap.scoring.settings import ScoringSettings


def plain_losses(
    view: ModelView,
    examples: list[CalibrationExample],
    units: list[SiteUnit] | None = None,
    settings: ScoringSettings | None = None,
) -> UnitLosses:
    """Measure the same losses as `exact_losses`, with one hooked forward pass per unit.

    This follows step 2 of the paper literally. Only the memory budget of the settings has an
    effect. Every process measures everything.
    """
    settings = settings or ScoringSettings()
    units = view.units() if units is None else units
    intact = torch.empty(len(examples), dtype=torch.float64)
    masked = torch.empty(len(units), len(examples), dtype=torch.float64)
    with (
        evaluation_mode(view.model),
        float32_on_cpu(view.model),
        progress_bar(total=len(examples) * (1 + len(units)), desc="Scoring") as progress,
    ):
        budget = budget_bytes(settings.memory_budget, view.model)
        tokens = tokens_per_batch(view.model, budget)
        for batch in batches(examples, len(examples), tokens=tokens):
            intact[batch.positions] = _forward_losses(view.model, batch)
            progress.update(len(batch.positions))
            for index, (site, unit) in enumerate(units):
                with masked_unit(view.model, site, unit):
                    masked[index, batch.positions] = _forward_losses(view.model, batch)
                progress.update(len(batch.positions))
    return UnitLosses(units, intact, masked)


def example_losses(
    model: PreTrainedModel,
    examples: list[CalibrationExample],
    memory_budget: int | str = "auto",
) -> torch.Tensor:
    """Return the mean loss over the scored tokens of each example, nats, float64 `[examples]`."""
    losses = torch.empty(len(examples), dtype=torch.float64)
    with evaluation_mode(model), float32_on_cpu(model):
        budget = budget_bytes(memory_budget, model)
        tokens = tokens_per_batch(model, budget)
        for batch in batches(examples, len(examples), tokens=tokens):
            losses[batch.positions] = _forward_losses(model, batch)
    return losses


def _forward_losses(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the mean loss of each example in an ordinary forward pass, float64 `[examples]`."""
    logits = call_model(model, batch.input_ids.to(device_of(model)), batch.inputs).logits
    targets = Targets.of(batch)
    scored = logits[targets.rows.to(logits.device), targets.columns.to(logits.device)]
    return targets.example_means(token_losses(scored, targets.ids.to(logits.device)))
