"""First-order estimates of masked losses: one backward pass for all units."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.data import Batch, CalibrationExample, batches
from optimum_cap.models import (
    ExpertsCall,
    ModelView,
    Site,
    SiteUnit,
    Targets,
    Unit,
    check_in_memory,
    device_of,
    evaluation_mode,
    experts_call,
    float32_on_cpu,
    gated,
    layer_input_width,
    mlp_width,
    routed,
    scored_logits,
    token_losses,
    without_parameter_grads,
)
from optimum_cap.progress import progress_bar
from optimum_cap.runtime import check_same_inputs, each_in_memory
from optimum_cap.scoring.cache import unit_names
from optimum_cap.scoring.exact import agreed_budget
from optimum_cap.scoring.scores import UnitLosses
from optimum_cap.scoring.settings import ScoringSettings

# Backward passes with more tokens take more memory, but are not faster.
_TOKENS_PER_BACKWARD = {"cpu": 512, "cuda": 8192}


def first_order_losses(
    view: ModelView,
    examples: list[CalibrationExample],
    units: list[SiteUnit] | None = None,
    settings: ScoringSettings | None = None,
) -> UnitLosses:
    """Estimate the masked losses to first order, with one backward pass for all units.

    Every channel of a site is multiplied by a gate of value 1. Masking a unit sets its gates to 0,
    which, to first order, subtracts the sum of their gradients from the loss (Michel et al. 2019,
    arXiv 1905.10650, Eq. 2, with the sign kept; attribution patching with zeros,
    https://www.neelnanda.io/mechanistic-interpretability/attribution-patching). Examples do not
    interact, so the gates of each example get the gradients of its own loss. The gradients of an
    expert follow from the gradient of the sum over experts; routing is as in the intact pass.

    Args:
        view: A causal language model with all weights in memory; it is not changed.
        examples: The calibration examples.
        units: The units to mask, in the order of the model; `None` masks all units of the sites.
        settings: Memory, and processes, which all compute everything. The cache stores only the
            memory budget, so that a resumed run uses the same batches.

    Returns:
        The losses, in the order of the units and of the examples; intact losses are measured.

    Raises:
        ValueError: Weights of the model are offloaded, or the units include experts whose
            computation is not supported.
    """
    check_in_memory(view.model, alternative="estimator 'exact'")
    units = view.units() if units is None else units
    settings = settings or ScoringSettings()
    check_same_inputs(
        settings.process_group, view.model, examples, unit_names(units), settings.memory_budget
    )
    intact = torch.empty(len(examples), dtype=torch.float64)
    masked = torch.empty(len(units), len(examples), dtype=torch.float64)
    with (
        evaluation_mode(view.model),
        float32_on_cpu(view.model),
        without_parameter_grads(view.model),
        progress_bar(total=len(examples), desc="Scoring to first order") as progress,
    ):
        budget = agreed_budget(view, examples, units, settings)
        parts = batches(examples, examples_per_pass(view.model, examples, budget))
        for batch, losses in each_in_memory(parts, lambda batch: _first_order(view, units, batch)):
            intact[batch.positions], masked[:, batch.positions] = losses
            progress.update(len(batch.positions))
    # Every process has computed all losses; share one set, so that all continue with the same one.
    intact, masked = settings.process_group.broadcast((intact, masked))
    return UnitLosses(units, intact, masked)


def _first_order(
    view: ModelView, units: list[SiteUnit], batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the intact and masked losses of a batch, `[examples]` and `[units, examples]`."""
    model, sites = view.model, {site.name: site for site, _ in units}.values()
    examples = len(batch.positions)
    with torch.enable_grad(), _gates(model, sites, examples) as gates:
        with _recorded_experts(model, sites) as experts:
            losses = _scored_losses(model, batch)
        leaves = {**gates, **{path: call.offset for path, call in experts.items()}}
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    intact = losses.detach()
    by_leaf = dict(zip(leaves, gradients, strict=True))
    effects = []
    for site, group in groupby(units, key=lambda unit: unit.site):
        if site.expert is None:
            of_channels = by_leaf[site.name][:, 0]
        else:
            of_channels = _expert_gradients(
                view, site, experts[site.block].call, by_leaf[site.block], examples
            )
        effects.append(_sums_over_units(of_channels, [unit for _, unit in group]))
    return intact, intact - torch.cat(effects)


def _sums_over_units(of_channels: torch.Tensor, units: list[Unit]) -> torch.Tensor:
    """Sum `[examples, channels]` over the channels of each unit, float64 `[units, examples]`."""
    sums = nn.functional.pad(of_channels.double().cumsum(dim=1), (1, 0))
    starts, stops = torch.tensor([unit.channels for unit in units], device=sums.device).T
    return (sums[:, stops] - sums[:, starts]).T.cpu()


@contextmanager
def _gates(
    model: PreTrainedModel, sites: Iterable[Site], examples: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Multiply the input of each site by gates of value 1; expert sites get none.

    Yields:
        The gates, `[examples, 1, channels]`, by the name of the site. The forward pass fills this
        dictionary.
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
class _RecordedExperts:
    """One call of an experts module.

    Attributes:
        call: Its arguments.
        offset: Zeros that are added to the output, `[tokens, hidden]`; a leaf of the graph.
    """

    call: ExpertsCall
    offset: torch.Tensor


@contextmanager
def _recorded_experts(
    model: PreTrainedModel, sites: Iterable[Site]
) -> Iterator[dict[str, _RecordedExperts]]:
    """Record the calls of the experts modules among `sites`.

    Yields:
        The calls, by the path of the module. The forward pass fills this dictionary.

    Raises:
        ValueError: The model calls its experts differently, or normalises the output of each.
    """
    calls: dict[str, _RecordedExperts] = {}

    def record(site: Site) -> Callable[..., torch.Tensor]:
        def hook(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: torch.Tensor,
        ) -> torch.Tensor:
            call = experts_call(module, site.block, args, kwargs)
            offset = torch.zeros_like(output, requires_grad=True)
            calls[site.block] = _RecordedExperts(call, offset)
            return output + offset

        return hook

    modules = {site.block: site for site in sites if site.expert is not None}
    if any(getattr(model.get_submodule(path), "has_post_expert_norm", False) for path in modules):
        raise ValueError(
            f"{type(model).__name__} normalises what each expert returns, so its experts have no "
            "first-order estimate: use estimator 'exact', or score heads only "
            "(scored_units='heads')"
        )
    handles = [
        model.get_submodule(path).register_forward_hook(record(site), with_kwargs=True)
        for path, site in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _expert_gradients(
    view: ModelView, site: Site, call: ExpertsCall, gradient: torch.Tensor, examples: int
) -> torch.Tensor:
    """Return the gradients of gates on the channels of an expert, float32 `[examples, channels]`.

    Args:
        view: The model.
        site: The site of the expert.
        call: The call of its module.
        gradient: Gradient of the output of the module, `[tokens, hidden]`, or
            `[experts * tokens, hidden]` if each expert has its own tokens.
        examples: Number of examples, all with the same number of tokens.
    """
    assert site.expert is not None
    tokens, slots = routed(call.chosen, site.expert)
    inputs = call.inputs(site.expert, tokens).detach()
    activated = gated(view.model.get_submodule(site.block), site.expert, inputs)
    gradient = gradient.reshape(-1, len(call.chosen), gradient.shape[-1])
    at_tokens = gradient[site.expert if len(gradient) > 1 else 0, tokens]
    weights = call.weights.detach()[tokens, slots, None]
    of_tokens = activated * (at_tokens @ view.oriented(site.output_proj)) * weights
    example = tokens // (len(call.chosen) // examples)
    # A product with ones and zeros sums in a deterministic order, even on a GPU.
    return nn.functional.one_hot(example, examples).T.float() @ of_tokens.float()


def _scored_losses(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the mean loss of each example, float64 `[examples]`."""
    targets, logits = Targets.of(batch), scored_logits(model, batch)
    return targets.example_means(token_losses(logits, targets.ids.to(logits.device)))


def examples_per_pass(
    model: PreTrainedModel, examples: list[CalibrationExample], budget: int
) -> int:
    """Return the number of examples per batch for which saved activations fit the budget."""
    config = model.config.get_text_config(decoder=True)
    longest = max(len(example.input_ids) for example in examples)
    widths = 15 * config.hidden_size + layer_input_width(model) + 6 * mlp_width(model)
    per_layer = 4 * widths
    # Unfused attention keeps its probabilities and a float32 copy of them.
    per_layer += 8 * (getattr(config, "num_attention_heads", None) or 0) * longest
    per_token = config.num_hidden_layers * per_layer + 12 * config.vocab_size
    most = _TOKENS_PER_BACKWARD.get(device_of(model).type, 512) // longest
    return max(1, min(most, budget // (longest * per_token), len(examples)))
