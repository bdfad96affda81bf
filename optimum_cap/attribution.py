"""Causal scores: what the loss on the calibration set gains when a unit is masked.

`exact_losses` measures every unit exactly at about half the cost of one forward pass per unit
(`wavefront.py`). `plain_losses` is the definition, one hooked forward pass per unit, kept as the
reference that tests and benchmarks compare with.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.architectures import Site, Unit, all_units, decoder_layers, heads
from optimum_cap.calibration import Batch, CalibrationExample, batches
from optimum_cap.chunks import ExactRun, chunks_of, settled
from optimum_cap.compilation import check_compilable, compiling
from optimum_cap.distributed import Team
from optimum_cap.interventions import evaluation_mode, float32_on_cpu, masked_unit
from optimum_cap.losses import Targets, token_losses
from optimum_cap.memory import Room, budget_bytes, is_out_of_memory
from optimum_cap.offload import device_of
from optimum_cap.score_cache import ScoreCache, examples_digest, names
from optimum_cap.storage import digest_of, sample_digest
from optimum_cap.wavefront import prefix_to_share, streams_per_chunk, tokens_per_batch

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class UnitLosses:
    """Losses with each unit masked, and intact.

    Attributes:
        units: The units, each with its site.
        intact: Mean loss over the scored tokens of each example, nats, float64 `[examples]`.
        masked: The same with each unit masked, float64 `[units, examples]`; measured, or estimated
            (`estimators.py`).
        standard_errors: Standard error of the mean of masked minus intact, nats, `[units]`, where
            the masked losses are estimates that do not show it by themselves.
    """

    units: list[tuple[Site, Unit]]
    intact: torch.Tensor
    masked: torch.Tensor
    standard_errors: torch.Tensor | None = None


@dataclass(frozen=True)
class CausalScores:
    """Causal score per unit, in nats per scored token; larger means the task needs the unit more.

    Attributes:
        units: The units, each with its site.
        scores: Score of each unit (Eq. 1-2), float64 `[units]`; NaN where no masked loss is finite.
        standard_errors: Standard error of the mean paired difference over examples, `[units]`.
        nonfinite: Number of examples whose masked loss is not finite, int64 `[units]`. They are
            left out of the score of the unit, with their intact losses.
        intact_loss: Mean over subsets of the intact loss.
    """

    units: list[tuple[Site, Unit]]
    scores: torch.Tensor
    standard_errors: torch.Tensor
    nonfinite: torch.Tensor
    intact_loss: float


def causal_scores(
    losses: UnitLosses, subsets: int = 3, aggregation: str = "median"
) -> CausalScores:
    """Reduce losses to scores (paper, Eq. 2).

    The examples, which come in random order, are cut into `subsets` consecutive parts. A score is
    the median (or mean) over subsets of the mean masked loss, minus the mean over subsets of the
    mean intact loss of the same examples: those whose masked loss is finite.

    Args:
        losses: Losses per unit and example.
        subsets: Number K of disjoint subsets.
        aggregation: `"median"` or `"mean"`.

    Raises:
        ValueError: An intact loss is not finite, or there are fewer examples than subsets.
    """
    if bad := int((~losses.intact.isfinite()).sum()):
        raise ValueError(
            f"the loss of the intact model is not finite on {bad} of {len(losses.intact)} "
            "calibration examples: check the weights and the dtype of the model"
        )
    if len(losses.intact) < subsets:
        raise ValueError(
            f"{len(losses.intact)} calibration examples cannot be split into {subsets} subsets"
        )
    finite = losses.masked.isfinite()
    masked = losses.masked.where(finite, torch.nan)
    parts = np.array_split(np.arange(len(losses.intact)), subsets)

    def per_part(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values[:, part].nanmean(dim=1) for part in parts], dim=1)

    per_subset = per_part(masked)
    if aggregation == "median":
        # Not torch.nanmedian, which takes the lower of two middle values.
        central = per_subset.nanquantile(0.5, dim=1)
    else:
        central = per_subset.nanmean(dim=1)
    intact = torch.stack([losses.intact[part].mean() for part in parts]).mean()
    compared = per_part(losses.intact.expand_as(masked).where(finite, torch.nan)).nanmean(dim=1)
    compared = intact.where(finite.all(dim=1), compared)

    standard_errors = losses.standard_errors
    if standard_errors is None:
        differences = masked - losses.intact
        standard_errors = (
            nanvar(differences, torch.ones_like(differences)) / finite.sum(dim=1)
        ).sqrt()
    return CausalScores(
        units=losses.units,
        scores=central - compared,
        standard_errors=standard_errors,
        nonfinite=(~finite).sum(dim=1),
        intact_loss=float(intact),
    )


def nanvar(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted variance of each row over what is no NaN: `[rows]`.

    With equal weights it is the sample variance. It is NaN if there is no value, or only one with a
    weight, and 0 if there are values, but none with a weight.
    """
    known = ~values.isnan()
    weights = weights.where(known, 0)
    total = weights.sum(dim=1)
    mean = (weights * values).nansum(dim=1) / total
    squares = (weights * (values - mean.unsqueeze(1)).square()).nansum(dim=1)
    variance = (squares / (total - weights.square().sum(dim=1) / total)).where(total > 0, 0.0)
    return variance.where(known.any(dim=1) & ((weights > 0).sum(dim=1) != 1), torch.nan)


def exact_losses(
    model: PreTrainedModel,
    sites: list[Site],
    examples: list[CalibrationExample],
    memory_budget: int | str = "auto",
    units: list[tuple[Site, Unit]] | None = None,
    cache: ScoreCache | None = None,
    torch_compile: bool = False,
    room: Room | None = None,
) -> UnitLosses:
    """Measure the loss with each unit of the sites masked.

    Args:
        model: A causal language model; it comes back as it was.
        sites: All sites of the model (`find_sites`), or at least those of attention.
        examples: The calibration examples.
        memory_budget: Bytes for activations, text such as `"4GB"`, or `"auto"` for half of what is
            free.
        units: Which units to mask, in the order of the model; `None` masks all of the sites.
        cache: Keeps finished chunks of this model, so that a run that was stopped goes on where it
            was, with the same bytes as an undisturbed one.
        torch_compile: Compile the decoder layers, which pays in long runs on a GPU
            (`docs/performance.md`). A run that goes on then agrees with an undisturbed one up to
            rounding.
        room: What runs over this model have found out about its memory so far, and this one will.

    Returns:
        The losses, in the order of the units and of the examples. Processes that were launched
        together (`accelerate launch`, `torchrun`) share the work, so that all of them have to call
        this, and each returns all losses.

    Raises:
        ValueError: Experts are to be masked that compute in a way that is not known, the layers
            cannot be compiled, the units are in another order, or processes that were launched
            together were given different things.
        MemoryError: Memory runs out with a single example and a single unit.
        ConnectionError: Another process of the launch has stopped.
    """
    if torch_compile:
        check_compilable(model)
    jobs = all_units(sites) if units is None else units
    _check_order(jobs)
    check_same_inputs(model, examples, names(jobs), memory_budget)
    layers = decoder_layers(model, sites)
    measured = {site.name for site, _ in jobs}
    sites = [site for site in sites if site.kind == "attention" or site.name in measured]
    with evaluation_mode(model), float32_on_cpu(model):
        # Of what is free when weights are widened.
        budget = settled_budget(model, memory_budget, examples, jobs, cache)
        prefix = settled(
            "prefix",
            lambda: _prefix(model, layers, sites, examples),
            examples,
            jobs,
            cache,
        )
        tokens = tokens_per_batch(model, budget, prefix, sites)
        made = batches(examples, len(examples), prefix, tokens)
        chunks = [
            chunk
            for batch in made
            for chunk in chunks_of(batch, len(jobs), streams_per_chunk(model, batch, budget))
        ]
        team = Team.of_this_run()
        run = ExactRun(model, sites, jobs, len(examples), cache, team, torch_compile, room)
        with compiling() if torch_compile else nullcontext():
            run.measure(chunks)
    return UnitLosses(jobs, run.intact, run.masked)


def check_same_inputs(
    model: PreTrainedModel, examples: list[CalibrationExample], *others: Any
) -> None:
    """Check that all processes of a launch work on the same.

    Args:
        model: The model, of which a few values are compared.
        examples: The calibration examples.
        *others: Plain values that decide what is measured.

    Raises:
        ValueError: They do not.
        ConnectionError: Another process has stopped.
    """
    Team.of_this_run().check_alike(
        lambda: digest_of(sample_digest(model), examples_digest(examples), *others),
        "model, calibration set or configuration",
    )


def _check_order(units: list[tuple[Site, Unit]]) -> None:
    """Check that units can start one after the other as streams go up the layers."""
    places = [(site.layer, site.kind != "attention") for site, _ in units]
    for place, following, (site, unit) in zip(places, places[1:], units[1:], strict=False):
        if following < place:
            raise ValueError(
                f"unit {unit.index} of {site.name} comes after a unit of a later site: give units "
                "in the order of the model, as all_units does"
            )


def plain_losses(
    model: PreTrainedModel,
    sites: list[Site],
    examples: list[CalibrationExample],
    memory_budget: int | str = "auto",
    units: list[tuple[Site, Unit]] | None = None,
) -> UnitLosses:
    """Measure the same as `exact_losses` by one hooked forward pass per unit (paper, step 2)."""
    jobs = all_units(sites) if units is None else units
    intact = torch.empty(len(examples), dtype=torch.float64)
    masked = torch.empty(len(jobs), len(examples), dtype=torch.float64)
    with (
        evaluation_mode(model),
        float32_on_cpu(model),
        logging.tqdm(total=len(examples) * (1 + len(jobs)), desc="Scoring") as progress,
    ):
        budget = budget_bytes(memory_budget, model)
        tokens = tokens_per_batch(model, budget)
        for batch in batches(examples, len(examples), tokens=tokens):
            intact[batch.positions] = _forward_losses(model, batch)
            progress.update(len(batch.positions))
            for index, (site, unit) in enumerate(jobs):
                with masked_unit(model, site, unit):
                    masked[index, batch.positions] = _forward_losses(model, batch)
                progress.update(len(batch.positions))
    return UnitLosses(jobs, intact, masked)


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


def scored_units(sites: list[Site], which: str = "heads") -> list[tuple[Site, Unit]]:
    """Return the units to score: `"heads"`, or `"all"`, with MLPs and experts."""
    return all_units(sites) if which == "all" else heads(sites)


def _forward_losses(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Mean loss per example of an ordinary forward pass, float64 `[examples]`."""
    logits = model(input_ids=batch.input_ids.to(device_of(model)), use_cache=False).logits
    targets = Targets.of(batch)
    scored = logits[targets.rows.to(logits.device), targets.columns.to(logits.device)]
    return targets.example_means(token_losses(scored, targets.ids.to(logits.device)))


def _prefix(
    model: PreTrainedModel,
    layers: list[nn.Module],
    sites: list[Site],
    examples: list[CalibrationExample],
) -> int:
    """Tokens to compute once for all examples; none where there is no memory to try it."""
    try:
        return prefix_to_share(model, layers, sites, examples)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    clear_device_cache(garbage_collection=True)
    logger.warning_once(
        "memory ran out with two examples: what all examples begin with is computed for each"
    )
    return 0


def settled_budget(
    model: PreTrainedModel,
    memory_budget: int | str,
    examples: list[CalibrationExample],
    units: list[tuple[Site, Unit]],
    cache: ScoreCache | None,
) -> int:
    """Return the bytes that activations may take, the same for all processes and later runs."""
    if memory_budget != "auto":
        return budget_bytes(memory_budget, model)
    return settled("budget", lambda: budget_bytes("auto", model), examples, units, cache)
