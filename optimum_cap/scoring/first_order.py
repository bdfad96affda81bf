"""Masked losses to first order: one backward pass for all units."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.data import Batch, CalibrationExample, batches
from optimum_cap.models import (
    ModelView,
    Site,
    SiteUnit,
    Targets,
    Unit,
    check_in_memory,
    evaluation_mode,
    experts_of,
    float32_on_cpu,
    gated,
    routed,
    routing,
    scored_logits,
    token_losses,
    without_parameter_grads,
)
from optimum_cap.runtime import check_same_inputs, each_in_memory
from optimum_cap.scoring.batch_sizes import tokens_per_chunk
from optimum_cap.scoring.cache import names
from optimum_cap.scoring.exact import agreed_budget
from optimum_cap.scoring.scores import UnitLosses
from optimum_cap.scoring.settings import ScoringSettings


def first_order_losses(
    view: ModelView,
    examples: list[CalibrationExample],
    units: list[SiteUnit] | None = None,
    settings: ScoringSettings | None = None,
) -> UnitLosses:
    """Estimate the masked losses to first order, with one backward pass for all units.

    Every channel of a site is multiplied by a gate of value 1. Masking a unit turns its gates to 0,
    which to first order takes the sum of their gradients from the loss (Michel et al. 2019, arXiv
    1905.10650, Eq. 2, with the sign kept; attribution patching of a zero,
    https://www.neelnanda.io/mechanistic-interpretability/attribution-patching). Examples do not
    interact, so the gates of each example get the gradients of its own loss. An expert gets its
    gradients from that in the sum over experts; its routing is as in the intact pass.

    Args:
        view: A causal language model, whole in memory; it comes back as it was.
        examples: The calibration examples.
        units: The units to mask, in the order of the model; `None` masks all units of the sites.
        settings: Memory and processes, which all compute the same. The cache remembers the memory
            budget alone, so that a resumed run has the same batches.

    Returns:
        The losses, in the order of the units and of the examples; the intact ones are measured.

    Raises:
        ValueError: Weights of the model are offloaded, or experts compute in a way that is not
            known.
    """
    check_in_memory(view.model)
    units = view.units() if units is None else units
    settings = settings or ScoringSettings()
    check_same_inputs(
        settings.process_group, view.model, examples, names(units), settings.memory_budget
    )
    intact = torch.empty(len(examples), dtype=torch.float64)
    masked = torch.empty(len(units), len(examples), dtype=torch.float64)
    with (
        evaluation_mode(view.model),
        float32_on_cpu(view.model),
        without_parameter_grads(view.model),
        logging.tqdm(total=len(examples), desc="Scoring to first order") as progress,
    ):
        budget = agreed_budget(view, examples, units, settings)
        parts = batches(examples, examples_per_pass(view.model, examples, budget))
        for batch, losses in each_in_memory(
            parts, lambda batch: _first_order(view.model, units, batch)
        ):
            intact[batch.positions], masked[:, batch.positions] = losses
            progress.update(len(batch.positions))
    # Every process has done all of it; what follows has to be the same in all.
    intact, masked = settings.process_group.broadcast((intact, masked))
    return UnitLosses(units, intact, masked)


def _first_order(
    model: PreTrainedModel, units: list[SiteUnit], batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of a batch, `[examples]` and `[units, examples]`."""
    sites = {site.name: site for site, _ in units}.values()
    examples = len(batch.positions)
    with torch.enable_grad(), _gates(model, sites, examples) as gates:
        with _recorded_experts(model, sites) as experts:
            losses = _scored_losses(model, batch)
        leaves = {**gates, **{path: call.offset for path, call in experts.items()}}
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    intact = losses.detach()
    by_leaf = dict(zip(leaves, gradients, strict=True))
    effects = []
    for site, own in groupby(units, key=lambda job: job[0]):
        if site.expert is None:
            of_gates = by_leaf[site.name][:, 0]
        else:
            of_gates = _expert_gradients(
                model, site, experts[site.block], by_leaf[site.block], examples
            )
        effects.append(_sums_over_units(of_gates, [unit for _, unit in own]))
    return intact, intact - torch.cat(effects)


def _sums_over_units(of_channels: torch.Tensor, units: list[Unit]) -> torch.Tensor:
    """Sum `[examples, channels]` over the channels of each unit: float64 `[units, examples]`."""
    sums = nn.functional.pad(of_channels.double().cumsum(dim=1), (1, 0))
    starts, stops = torch.tensor([unit.channels for unit in units], device=sums.device).T
    return (sums[:, stops] - sums[:, starts]).T.cpu()


@contextmanager
def _gates(
    model: PreTrainedModel, sites: Iterable[Site], examples: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Multiply the input of each site by gates of value 1, `[examples, 1, channels]`, by its name.

    Experts have no such input. The dictionary that is yielded fills during the forward pass.
    """
    gates: dict[str, torch.Tensor] = {}

    def gate(site: Site) -> Callable[..., tuple[torch.Tensor, ...]]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden, *rest = args
            gates[site.name] = hidden.new_ones(examples, 1, site.width, requires_grad=True)
            # Some MLPs see all tokens of a batch as one list.
            gated = hidden.reshape(examples, -1, site.width) * gates[site.name]
            return (gated.view(hidden.shape), *rest)

        return hook

    handles = [
        model.get_submodule(site.projection).register_forward_pre_hook(gate(site))
        for site in sites
        if site.expert is None
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _ExpertsCall:
    """One call of a module of experts.

    Attributes:
        hidden: The tokens, `[tokens, hidden]`.
        chosen: Experts that each token reaches, int64 `[tokens, k]`.
        weights: Their weights, `[tokens, k]`.
        offset: Zeros that were added to the output, `[tokens, hidden]`; a leaf of the graph.
    """

    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    offset: torch.Tensor


@contextmanager
def _recorded_experts(
    model: PreTrainedModel, sites: Iterable[Site]
) -> Iterator[dict[str, _ExpertsCall]]:
    """Record the calls of the modules of experts among `sites`, by their paths.

    The dictionary that is yielded fills during the forward pass.

    Raises:
        ValueError: Experts compute in a way that is not known.
    """
    calls: dict[str, _ExpertsCall] = {}

    def record(site: Site) -> Callable[..., torch.Tensor]:
        def hook(
            module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor:
            chosen, weights = routing(site.block, args[1:])
            offset = torch.zeros_like(output, requires_grad=True)
            calls[site.block] = _ExpertsCall(args[0].detach(), chosen, weights.detach(), offset)
            return output + offset

        return hook

    modules = {site.block: site for site in sites if site.expert is not None}
    handles = [
        experts_of(model, site).register_forward_hook(record(site)) for site in modules.values()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _expert_gradients(
    model: PreTrainedModel, site: Site, call: _ExpertsCall, gradient: torch.Tensor, examples: int
) -> torch.Tensor:
    """Gradients in gates on the channels of an expert: float32 `[examples, channels]`.

    Args:
        model: The model.
        site: The site of the expert.
        call: The call of its module.
        gradient: Gradient in the output of the module, `[tokens, hidden]`.
        examples: Number of examples, which have the same number of tokens.
    """
    assert site.expert is not None
    tokens, slots = routed(call.chosen, site.expert)
    activated = gated(model.get_submodule(site.block), site.expert, call.hidden[tokens])
    down = model.get_parameter(site.projection)[site.expert]
    of_tokens = activated * (gradient[tokens] @ down) * call.weights[tokens, slots, None]
    example = tokens // (len(call.chosen) // examples)
    # A product with ones and zeros sums in the same order every time, also on a GPU.
    return nn.functional.one_hot(example, examples).T.float() @ of_tokens.float()


def _scored_losses(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Mean loss per example, float64 `[examples]`."""
    targets, logits = Targets.of(batch), scored_logits(model, batch)
    return targets.example_means(token_losses(logits, targets.ids.to(logits.device)))


def examples_per_pass(
    model: PreTrainedModel, examples: list[CalibrationExample], budget: int
) -> int:
    """Examples per batch, so that what a backward pass needs of the forward one fits the budget."""
    config = model.config.get_text_config(decoder=True)
    longest = max(len(example.input_ids) for example in examples)
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_layer = 4 * (16 * config.hidden_size + 6 * wide)
    # Attention that is not fused keeps its probabilities and a widened copy of them.
    per_layer += 8 * config.num_attention_heads * longest
    per_token = config.num_hidden_layers * per_layer + 12 * config.vocab_size
    wanted = tokens_per_chunk(model) // longest
    return max(1, min(wanted, budget // (longest * per_token), len(examples)))
