"""Causal scores for less: estimates of the masked losses, each with a standard error.

`exact` and `plain` (`attribution.py`) measure every masked loss. `first_order` replaces all of them
by one backward pass. `control_variate` corrects that by exact losses of some examples, and
`adaptive` goes on until the importances are known as well as was asked. See `docs/estimators.md`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.architectures import Site, Unit, all_units
from optimum_cap.attribution import (
    UnitLosses,
    check_same_inputs,
    exact_losses,
    nanvar,
    plain_losses,
    scored_units,
    settled_budget,
)
from optimum_cap.calibration import Batch, CalibrationExample, batches
from optimum_cap.compilation import check_compilable
from optimum_cap.config import CAPConfig
from optimum_cap.distributed import Team
from optimum_cap.experts import experts_of, gated, routed, routing
from optimum_cap.interventions import evaluation_mode, float32_on_cpu
from optimum_cap.losses import Targets, token_losses
from optimum_cap.memory import Room, each_in_memory
from optimum_cap.offload import is_offloaded
from optimum_cap.score_cache import ScoreCache, names
from optimum_cap.wavefront import tokens_per_chunk

logger = logging.get_logger(__name__)

_WITHIN = 1.96  # standard errors on either side of a 95 % interval
_BY_EFFECTS = 0.25  # part of the chance to be drawn that follows the effects
_ROUNDING = 1e-9  # a probability that is nearer to 1 than this is 1


def first_order_losses(
    model: PreTrainedModel,
    sites: list[Site],
    examples: list[CalibrationExample],
    memory_budget: int | str = "auto",
    units: list[tuple[Site, Unit]] | None = None,
    cache: ScoreCache | None = None,
) -> UnitLosses:
    """Estimate the masked losses to first order, with one backward pass for all units.

    Every channel of a site is multiplied by a gate of value 1. Masking a unit turns its gates to 0,
    which to first order takes the sum of their gradients from the loss (Michel et al. 2019, arXiv
    1905.10650, Eq. 2, with the sign kept; attribution patching of a zero,
    https://www.neelnanda.io/mechanistic-interpretability/attribution-patching). Examples do not
    interact, so the gates of each example get the gradients of its own loss. An expert gets its
    gradients from that in the sum over experts; its routing is as in the intact pass.

    Args:
        model: A causal language model, whole in memory; it comes back as it was.
        sites: All sites of the model (`find_sites`).
        examples: The calibration examples.
        memory_budget: Bytes for activations, text such as `"4GB"`, or `"auto"` for half of what is
            free.
        units: Which units to mask, in the order of the model; `None` masks all of the sites.
        cache: Remembers the memory budget, so that a run that goes on has the same batches.

    Returns:
        The losses, in the order of the units and of the examples; the intact ones are measured.

    Raises:
        ValueError: Weights of the model are offloaded, or experts compute in a way that is not
            known.
    """
    check_in_memory(model)
    jobs = all_units(sites) if units is None else units
    check_same_inputs(model, examples, names(jobs), memory_budget)
    intact = torch.empty(len(examples), dtype=torch.float64)
    masked = torch.empty(len(jobs), len(examples), dtype=torch.float64)
    with (
        evaluation_mode(model),
        float32_on_cpu(model),
        frozen(model),
        logging.tqdm(total=len(examples), desc="Scoring to first order") as progress,
    ):
        budget = settled_budget(model, memory_budget, examples, jobs, cache)
        parts = batches(examples, examples_per_pass(model, examples, budget))
        for batch, losses in each_in_memory(parts, lambda batch: _first_order(model, jobs, batch)):
            intact[batch.positions], masked[:, batch.positions] = losses
            progress.update(len(batch.positions))
    # Every process has done all of it; what follows has to be the same in all.
    intact, masked = Team.of_this_run().first((intact, masked))
    return UnitLosses(jobs, intact, masked)


def check_in_memory(model: PreTrainedModel) -> None:
    """Check that a backward pass has all weights that it needs.

    Raises:
        ValueError: Weights of the model are offloaded.
    """
    if is_offloaded(model):
        raise ValueError(
            "to first order the weights have to be in memory, all at once, but some of this model "
            "are offloaded: use estimator 'exact', or load it with a device_map that keeps them"
        )


def _first_order(
    model: PreTrainedModel, jobs: list[tuple[Site, Unit]], batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of a batch, `[examples]` and `[units, examples]`."""
    sites = {site.name: site for site, _ in jobs}.values()
    examples = len(batch.positions)
    with torch.enable_grad(), _gates(model, sites, examples) as gates:
        with _recorded_experts(model, sites) as experts:
            losses = _scored_losses(model, batch)
        leaves = {**gates, **{path: call.offset for path, call in experts.items()}}
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    intact = losses.detach()
    by_leaf = dict(zip(leaves, gradients, strict=True))
    effects = []
    for site, own in groupby(jobs, key=lambda job: job[0]):
        if site.expert is None:
            of_gates = by_leaf[site.name][:, 0]
        else:
            of_gates = _expert_gradients(
                model, site, experts[site.branch], by_leaf[site.branch], examples
            )
        effects.append(_sums_over_units(of_gates, [unit for _, unit in own]))
    return intact, intact - torch.cat(effects)


def _sums_over_units(of_channels: torch.Tensor, units: list[Unit]) -> torch.Tensor:
    """Sum `[examples, channels]` over the channels of each unit: float64 `[units, examples]`."""
    sums = nn.functional.pad(of_channels.double().cumsum(dim=1), (1, 0))
    starts, stops = torch.tensor([unit.channels for unit in units], device=sums.device).T
    return (sums[:, stops] - sums[:, starts]).T.cpu()


def control_variate_losses(
    model: PreTrainedModel,
    sites: list[Site],
    examples: list[CalibrationExample],
    memory_budget: int | str = "auto",
    units: list[tuple[Site, Unit]] | None = None,
    *,
    exact_examples: int = 16,
    seed: int = 0,
    cache: ScoreCache | None = None,
    torch_compile: bool = False,
) -> UnitLosses:
    """Estimate the masked losses to first order, corrected by exact ones of some examples.

    The difference estimator of double sampling (Cochran 1977, Sampling Techniques, chapter 12), per
    example: the first-order loss, plus, where an example was drawn, the exact minus the first-order
    loss over the probability that it is drawn. Over the draw, every masked loss is unbiased, and so
    is every mean of them. The coefficient of the control variate is 1: one that is fitted to the
    same sample would bias the estimate. Examples on which masking has large effects to first order
    are drawn more often (`chances_of_drawing`).

    Args:
        model: As for `first_order_losses`, and so the next four.
        sites: All sites of the model.
        examples: The calibration examples.
        memory_budget: For activations.
        units: Which units to mask.
        exact_examples: Number of examples with exact losses.
        seed: Seed of the draw.
        cache: Keeps finished chunks of the exact losses.
        torch_compile: As for `exact_losses`.

    Raises:
        ValueError: There are fewer examples than that, or it is below 2.
    """
    _check_exact_examples(exact_examples, len(examples))
    sampled = SampledLosses(first_order_losses(model, sites, examples, memory_budget, units, cache))
    chances = chances_of_drawing(sampled.first_order, exact_examples)
    drawn = draw_examples(chances, start=float(np.random.default_rng(seed).random()))
    rows = [examples[position] for position in drawn]
    exact = exact_losses(model, sites, rows, memory_budget, sampled.units, cache, torch_compile)
    sampled.record(range(len(sampled.units)), drawn, exact.masked, chances)
    return sampled.losses()


def chances_of_drawing(first_order: UnitLosses, count: int) -> torch.Tensor:
    """Probability of each example to be among `count` drawn ones, float64 `[examples]`.

    Three quarters of it are the same for all examples. A quarter is in proportion to what masking
    does to the loss of the example to first order: its share of the sizes of a unit's effects on
    all examples, averaged over the units. The error of an effect tends to be large where the effect
    is. The equal part bounds the weight 1 / chance of an example by 4/3 of that with equal chances,
    whatever the first order does not see (a defensive mixture, Hesterberg 1995, Technometrics 37).
    Where more than 1 would come out, the example is certain and the others share what is left.
    """
    effects = _finite(first_order.masked - first_order.intact).abs().nan_to_num()
    effects = effects[effects.sum(dim=1) > 0]
    sizes = effects.new_full(effects.shape[1:], 1 / effects.shape[1])
    if len(effects):
        shares = (effects / effects.sum(dim=1, keepdim=True)).mean(dim=0)
        sizes = (1 - _BY_EFFECTS) * sizes + _BY_EFFECTS * shares
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    while True:
        left = count - int(certain.sum())
        chances = (left * sizes / sizes[~certain].sum()).where(~certain, 1.0)
        too_large = (chances > 1 - _ROUNDING) & ~certain
        if not too_large.any():
            return chances
        certain |= too_large


def draw_examples(chances: torch.Tensor, start: float) -> list[int]:
    """Draw positions of examples, each with its own chance, as many as the chances add up to.

    Systematic sampling (Madow 1949, Annals of Mathematical Statistics 20): the chances are laid end
    to end, and every example is drawn on whose part one of the points `start`, `start` + 1,
    `start` + 2, ... falls. So each run of consecutive examples, like a subset of the calibration
    set, gets its share.

    Args:
        chances: Probability of each example, `[examples]`, as of `chances_of_drawing`.
        start: A random number, at least 0 and below 1.
    """
    certain, rest = (chances == 1).nonzero()[:, 0], (chances < 1).nonzero()[:, 0]
    ends = chances[rest].cumsum(dim=0)
    count = round(float(chances[rest].sum()))
    points = start + torch.arange(count, dtype=torch.float64)
    # Without the last end, rounding cannot put a point behind it.
    found = rest[torch.searchsorted(ends[:-1], points, right=True)]
    return sorted([*certain.tolist(), *found.tolist()])


def _check_exact_examples(exact_examples: int, examples: int) -> None:
    if exact_examples < 2:
        raise ValueError(
            f"exact_examples is {exact_examples}, but a standard error takes at least 2"
        )
    if exact_examples > examples:
        raise ValueError(
            f"exact_examples is {exact_examples}, but there are only {examples} calibration "
            "examples"
        )


def adaptive_losses(
    model: PreTrainedModel,
    sites: list[Site],
    examples: list[CalibrationExample],
    memory_budget: int | str = "auto",
    units: list[tuple[Site, Unit]] | None = None,
    *,
    exact_examples: int = 16,
    precision: float = 0.1,
    seed: int = 0,
    cache: ScoreCache | None = None,
    torch_compile: bool = False,
) -> UnitLosses:
    """Estimate as `control_variate_losses`, in rounds, until every importance is known well enough.

    Every round draws one more example from each block, without repetition, and measures the units
    whose interval is still wide. An interval is narrow when 1.96 standard errors of what the draw
    leaves open are at most `precision` times the range of the scores of all units, which is what an
    importance is relative to (Eq. 3). A unit that stays wide to the end is measured exactly.

    Args:
        model: As for `first_order_losses`, and so the next four.
        sites: All sites of the model.
        examples: The calibration examples.
        memory_budget: For activations.
        units: Which units to mask.
        exact_examples: Number of examples of each round.
        precision: Half the width of the 95 % interval, as a fraction of the range of the scores.
        seed: Seed of the draw.
        cache: Keeps finished chunks of the exact losses.
        torch_compile: As for `exact_losses`.

    Raises:
        ValueError: There are fewer examples than `exact_examples`, or it is below 2.
    """
    blocks = draw_blocks(len(examples), exact_examples, seed)
    sampled = SampledLosses(first_order_losses(model, sites, examples, memory_budget, units, cache))
    wide, room = list(range(len(sampled.units))), Room()
    for turn in range(max(map(len, blocks))):
        drawn = [block[turn] for block in blocks if turn < len(block)]
        rows = [examples[position] for position in drawn]
        still_wide = [sampled.units[index] for index in wide]
        exact = exact_losses(
            model, sites, rows, memory_budget, still_wide, cache, torch_compile, room
        )
        sampled.record(wide, drawn, exact.masked, chances_in_blocks(blocks, turn + 1))
        narrow = sampled.narrow(precision)
        wide = [index for index in wide if not narrow[index]]
        if not wide:
            break
    return sampled.losses()


class SampledLosses:
    """First-order losses of all examples, and exact ones of those drawn so far.

    Attributes:
        units: The units.
        first_order: The first-order losses.
        exact: The exact masked losses, `[units, examples]`, NaN where none is known.
        drawn: Where there is one.
        chances: Probability with which each example has been drawn by now, `[units, examples]`.
    """

    def __init__(self, first_order: UnitLosses) -> None:
        self.units = first_order.units
        self.first_order = first_order
        self.exact = torch.full_like(first_order.masked, torch.nan)
        self.drawn = torch.zeros_like(first_order.masked, dtype=torch.bool)
        self.chances = torch.zeros_like(first_order.masked)

    def record(
        self,
        indices: Sequence[int],
        positions: Sequence[int],
        masked: torch.Tensor,
        chances: torch.Tensor,
    ) -> None:
        """Take in exact losses.

        Args:
            indices: The units, by index.
            positions: The examples.
            masked: Their losses, `[indices, positions]`.
            chances: With which probability each of all examples is drawn by now, `[examples]`.
        """
        where = torch.tensor(indices)[:, None], torch.tensor(positions)
        self.exact[where] = masked
        self.drawn[where] = True
        self.chances[indices] = chances

    def losses(self) -> UnitLosses:
        """Return the estimate, with standard errors for the draw and the choice of the examples."""
        standard_errors = (self._variance_of_examples() + self._variance_of_draw()).sqrt()
        return UnitLosses(self.units, self.first_order.intact, self._estimates(), standard_errors)

    def narrow(self, precision: float) -> torch.Tensor:
        """Whether the draw leaves little of a unit's importance open, bool `[units]`."""
        scores = _finite(self._estimates() - self.first_order.intact).nanmean(dim=1)
        scores = scores[scores.isfinite()]
        allowed = precision * float(scores.max() - scores.min()) if len(scores) else 0.0
        return _WITHIN * self._variance_of_draw().sqrt() <= allowed

    def _estimates(self) -> torch.Tensor:
        """Masked losses, `[units, examples]`; of an example that was certain, what was measured."""
        masked = self.first_order.masked
        corrections = ((self.exact - masked) / self.chances).where(self.drawn, 0)
        return (masked + corrections).where(self.chances < 1, self.exact)

    def _variance_of_examples(self) -> torch.Tensor:
        """Variance of the mean exact effect of a unit over choices of examples, `[units]`."""
        effects = _finite(self.exact - self.first_order.intact)
        return nanvar(effects, 1 / self.chances) / effects.shape[1]

    def _variance_of_draw(self) -> torch.Tensor:
        """Variance over the draw of the mean of a unit's estimate, `[units]`.

        Hájek 1964 (Annals of Mathematical Statistics 35), with the factor of Deville 1999 (Survey
        Methodology 25): it needs the chances of single examples only. That the draw is spread
        evenly over the positions is left out of account, because the examples come in random order.
        With equal chances it is that of drawing n of N without repetition, s^2 (1/n - 1/N). It is 0
        where all that is unknown was certain to be drawn, and NaN where one example alone was not.
        """
        weighted = _finite((self.exact - self.first_order.masked) / self.chances)
        open_share = (1 - self.chances).where(~weighted.isnan(), 0)
        squares = nanvar(weighted, open_share) * open_share.sum(dim=1)
        return squares / self.chances.shape[1] ** 2


def draw_blocks(examples: int, blocks: int, seed: int) -> list[list[int]]:
    """Cut the positions of examples into consecutive blocks, and put each in a random order.

    Raises:
        ValueError: There are fewer examples than blocks, or fewer than 2 blocks.
    """
    _check_exact_examples(blocks, examples)
    random = np.random.default_rng(seed)
    parts = np.array_split(np.arange(examples), blocks)
    return [random.permutation(part).tolist() for part in parts]


def chances_in_blocks(blocks: list[list[int]], turns: int) -> torch.Tensor:
    """Probability that an example is among the first `turns` of its block, `[examples]`.

    The blocks are those of `draw_blocks`, consecutive and in order.
    """
    chances = [min(turns / len(block), 1.0) for block in blocks for _ in block]
    return torch.tensor(chances, dtype=torch.float64)


def _finite(values: torch.Tensor) -> torch.Tensor:
    return values.where(values.isfinite(), torch.nan)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient: the backward pass stays as short as it can be."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


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
            chosen, weights = routing(site.branch, args[1:])
            offset = torch.zeros_like(output, requires_grad=True)
            calls[site.branch] = _ExpertsCall(args[0].detach(), chosen, weights.detach(), offset)
            return output + offset

        return hook

    modules = {site.branch: site for site in sites if site.expert is not None}
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
    activated = gated(model.get_submodule(site.branch), site.expert, call.hidden[tokens])
    down = model.get_parameter(site.projection)[site.expert]
    of_tokens = activated * (gradient[tokens] @ down) * call.weights[tokens, slots, None]
    example = tokens // (len(call.chosen) // examples)
    # A product with ones and zeros sums in the same order every time, also on a GPU.
    return nn.functional.one_hot(example, examples).T.float() @ of_tokens.float()


def scored_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits of an ordinary forward pass, at scored positions only: `[scored, vocabulary]`."""
    targets = Targets.of(batch)

    def select(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        rows, columns = targets.rows.to(args[0].device), targets.columns.to(args[0].device)
        return (args[0][rows, columns][None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits: torch.Tensor = model(
            input_ids=batch.input_ids.to(model.device), use_cache=False
        ).logits[0]
    finally:
        handle.remove()
    return logits


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


@dataclass(frozen=True)
class Estimator:
    """How masked losses are found.

    Attributes:
        function: Takes a model, its sites, examples, a memory budget and units, and returns the
            losses.
        settings: The fields of `CAPConfig` that its losses depend on, which it takes as keywords.
        resumes: Whether it takes a cache, of finished chunks or of the memory budget alone.
        differentiates: Whether it needs all weights in memory, for a backward pass.
        compiles: Whether it takes `torch_compile`.
    """

    function: Callable[..., UnitLosses]
    settings: tuple[str, ...] = ()
    resumes: bool = True
    differentiates: bool = False
    compiles: bool = False

    def losses(
        self,
        model: PreTrainedModel,
        sites: list[Site],
        examples: list[CalibrationExample],
        config: CAPConfig,
    ) -> UnitLosses:
        """Measure or estimate the losses of the units that `config` names, as it says."""
        settings: dict[str, Any] = {name: getattr(config, name) for name in self.settings}
        # Before a cache reads all weights.
        if self.differentiates:
            check_in_memory(model)
        if self.compiles and config.torch_compile:
            check_compilable(model)
            settings["torch_compile"] = True
        if self.resumes and config.cache_dir is not None:
            settings["cache"] = ScoreCache(config.cache_dir, model)
        units = scored_units(sites, config.scored_units)
        return self.function(model, sites, examples, config.memory_budget, units, **settings)


ESTIMATORS = {
    "exact": Estimator(exact_losses, compiles=True),
    "plain": Estimator(plain_losses, resumes=False),
    "first_order": Estimator(first_order_losses, differentiates=True),
    "control_variate": Estimator(
        control_variate_losses,
        ("exact_examples", "seed"),
        differentiates=True,
        compiles=True,
    ),
    "adaptive": Estimator(
        adaptive_losses,
        ("exact_examples", "precision", "seed"),
        differentiates=True,
        compiles=True,
    ),
}
