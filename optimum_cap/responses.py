"""What pruning does to the predictions: each site is pruned alone, and the change measured.

This is the intervention of causal attribution with the thing itself in the place of a mask: not
what the model loses without a unit, but what it loses when the unit is pruned.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from math import inf, nan, sqrt
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.activations import InputStatistics, LayerWalk
from optimum_cap.architectures import Matrix, Site, oriented, prunable_matrices
from optimum_cap.attribution import check_same_inputs
from optimum_cap.calibration import Batch, CalibrationExample, batches
from optimum_cap.criteria import Evidence, wanda
from optimum_cap.distributed import Team
from optimum_cap.estimators import check_in_memory, examples_per_pass, frozen, scored_logits
from optimum_cap.experts import routed, routing
from optimum_cap.interventions import (
    RecordedCall,
    evaluation_mode,
    float32_on_cpu,
    hidden_of,
    recorded_calls,
)
from optimum_cap.losses import Targets, logits_of, positions_per_chunk
from optimum_cap.masking import kth_smallest
from optimum_cap.memory import budget_bytes, each_in_memory
from optimum_cap.offload import brought_in, is_offloaded
from optimum_cap.pruning_cache import KeptResponses
from optimum_cap.score_cache import stoppable

_PASSES = 1.0  # over the calibration set, that measuring may cost
_FEWEST_EXAMPLES = 16
_SETS_AT_A_TIME = 8  # of pruned matrices, where each layer has to be brought in for them

logger = logging.get_logger(__name__)

Prune = Callable[[Matrix, InputStatistics], torch.Tensor]
"""Returns what a matrix `[out, in]` becomes, and leaves it as it is."""


@dataclass(frozen=True)
class Response:
    """What pruning one site alone does.

    Attributes:
        site: The site.
        matrices: Its matrices that are to be pruned.
        sizes: Number of weights of each.
        divergence: Kullback-Leibler divergence of the predictions with the site pruned from those
            of the dense model: nats per scored token, mean over examples. Not finite if the
            pruned site breaks the model.
        standard_error: Of that mean; NaN of a single example.
    """

    site: Site
    matrices: tuple[Matrix, ...]
    sizes: tuple[int, ...]
    divergence: float
    standard_error: float

    @property
    def weights(self) -> int:
        return sum(self.sizes)


def responses(
    model: PreTrainedModel,
    sites: list[Site],
    layers: Mapping[int, list[Matrix]],
    examples: list[CalibrationExample],
    prune: Prune,
    count: int | None = None,
    gram: bool = True,
    answer_weight: float = 0.0,
    kept: KeptResponses | None = None,
) -> list[Response]:
    """Prune each site alone and measure what that does to the predictions of scored tokens.

    The divergence from the dense model's predictions is what the loss would gain on answers drawn
    from the dense model. Unlike the gain on the answers of the data it is never negative, and a few
    examples show it.

    Args:
        model: The model, dense; it comes back as it was.
        sites: All its sites.
        layers: The matrices to prune, by decoder layer.
        examples: The calibration examples, in random order: all are used for the statistics of the
            inputs, the first ones to measure.
        prune: Prunes a matrix.
        count: How many examples to measure on; `None`: as `examples_to_measure`.
        gram: Whether `prune` needs x_i x_j of the inputs.
        answer_weight: As for `LayerWalk`, in these statistics.
        kept: What was measured in the same way, by a run that was stopped.

    Returns:
        One response for each site with matrices to prune, in the order of the model. Processes that
        were launched together share the sites, so that all of them have to call this.

    Raises:
        ValueError: Processes that were launched together were given different things.
        ConnectionError: Another process of the launch has stopped.
    """
    groups = _groups(sites, layers)
    if count is None:
        count = examples_to_measure([len(groups[layer]) for layer in sorted(groups)], len(examples))
    count = min(count, len(examples))
    every = [group for own in groups.values() for group in own]
    known = {}
    if kept:
        found = {site: kept.measured(site, count) for site, _ in every}
        known = {site: own for site, own in found.items() if own is not None}
    team = Team.of_this_run()
    check_same_inputs(model, examples, count)
    left = {
        # Shifted by layer: an attention takes less than the MLP beside it.
        layer: [
            group
            for group in own[(team.rank + layer) % team.size :: team.size]
            if group[0] not in known
        ]
        for layer, own in groups.items()
    }

    def doing() -> str:
        return f"trying sites was stopped after {len(known)} of {len(every)}"

    with stoppable(doing, kept):
        # Closed at once whatever happens, so that the model is as it was.
        with closing(
            _measured(model, sites, left, examples, prune, count, gram, answer_weight)
        ) as measured:
            for site, divergences in measured:
                known[site] = divergences
                if kept:
                    kept.keep_measured(site, divergences)
        for others in team.gather(known):
            known |= others
    return [_response(model, site, matrices, known[site]) for site, matrices in every]


def _measured(
    model: PreTrainedModel,
    sites: list[Site],
    groups: dict[int, list[tuple[Site, list[Matrix]]]],
    examples: list[CalibrationExample],
    prune: Prune,
    count: int,
    gram: bool,
    answer_weight: float,
) -> Generator[tuple[Site, torch.Tensor], None, None]:
    """Yield the divergences of sites, given by layer with their matrices, on the first examples."""
    if not any(groups.values()):
        return
    with (
        evaluation_mode(model),
        float32_on_cpu(model),
        logging.tqdm(
            total=sum(map(len, groups.values())), desc="Measuring sites", unit="site"
        ) as progress,
    ):
        walk = LayerWalk(model, sites, examples, answer_weight)
        trial = _Trial(model, sites, examples[:count])
        for layer, own in groups.items():
            if not own:
                walk.advance(layer)
                continue
            chosen = [matrix for _, matrices in own for matrix in matrices]
            statistics = walk.statistics(layer, chosen, gram, advance=True)
            pruned = (
                {matrix: prune(matrix, statistics[matrix]) for matrix in matrices}
                for _, matrices in own
            )
            for (site, _), values in zip(own, trial.divergences(layer, pruned), strict=True):
                yield site, values
                progress.update()


def estimated_responses(
    model: PreTrainedModel,
    sites: list[Site],
    layers: Mapping[int, list[Matrix]],
    examples: list[CalibrationExample],
    shares: Mapping[Matrix, int],
    count: int | None = None,
    seed: int = 0,
    answer_weight: float = 0.0,
    memory_budget: int | str = "auto",
    kept: KeptResponses | None = None,
) -> list[Response]:
    """Estimate the same with one backward pass for all sites.

    To second order the divergence of a change d in the output of a branch is d F d / 2, where F is
    the Fisher information (Martens 2020, arXiv 1412.1193, section 5). It is the mean of (g d)^2,
    where g is the gradient of a random combination of the logits whose second moments are those of
    the likelihood's gradient, diag(p) - p p^T. Labels drawn from p have them too, but a confident
    model nearly always draws the same. The change is what the branch shows when its site is pruned
    by Wanda, the quickest criterion that looks at inputs.

    Args:
        model: The model, dense and whole in memory; it comes back as it was.
        sites: All its sites.
        layers: The matrices to prune, by decoder layer.
        examples: The calibration examples, in random order; the first ones are used.
        shares: Number of zeros of each matrix.
        count: How many examples to use; `None`: as `examples_to_estimate`.
        seed: Seed of the random combinations.
        answer_weight: As for `responses`.
        memory_budget: Bytes for activations, text such as `"4GB"`, or `"auto"` for half of what is
            free. Where memory runs out all the same, batches are halved.
        kept: What was estimated in the same way: the last bits depend on the memory that is free.

    Returns:
        As `responses`. Processes that were launched together have to call this together.

    Raises:
        ValueError: Weights are offloaded, or a site's matrices are not all in one branch.
        ConnectionError: Another process of the launch has stopped.
    """
    check_in_memory(model)
    check_same_inputs(model, examples, count, seed)
    groups = [group for own in _groups(sites, layers).values() for group in own]
    for site, _ in groups:
        if site.branch == site.layer_name:
            raise ValueError(
                f"{type(model).__name__} has no module around {site.name} that could be run alone, "
                "so its response cannot be estimated: use estimator 'exact'"
            )
    if count is None:
        count = examples_to_estimate(len(examples))
    chosen = examples[:count]
    divergences = kept.estimated(len(chosen), seed) if kept else None
    if divergences is None:
        divergences = _estimated(
            model, sites, layers, groups, chosen, shares, seed, answer_weight, memory_budget
        )
        if kept:
            kept.keep_estimated(divergences, seed)
    # Every process has done all of it; what follows has to be the same in all.
    divergences = Team.of_this_run().first(divergences)
    return [_response(model, *group, own) for group, own in zip(groups, divergences, strict=True)]


def _estimated(
    model: PreTrainedModel,
    sites: list[Site],
    layers: Mapping[int, list[Matrix]],
    groups: list[tuple[Site, list[Matrix]]],
    chosen: list[CalibrationExample],
    shares: Mapping[Matrix, int],
    seed: int,
    answer_weight: float,
    memory_budget: int | str,
) -> torch.Tensor:
    """Estimates for sites with their matrices on the chosen examples: `[sites, examples]`."""
    divergences = torch.empty(len(groups), len(chosen), dtype=torch.float64)
    with (
        evaluation_mode(model),
        float32_on_cpu(model),
        frozen(model),
        logging.tqdm(total=len(chosen), desc="Estimating responses", delay=5) as progress,
    ):
        rough = _RoughPruning(model, shares)
        walk = LayerWalk(model, sites, chosen, answer_weight)
        for layer in range(len(walk.layers)):
            rough.look_at(walk.statistics(layer, layers.get(layer, []), advance=True))
        del walk

        def estimate(batch: Batch) -> torch.Tensor:
            calls, gradients = _gradients_of_draw(model, [site for site, _ in groups], batch, seed)
            along = []
            for site, matrices in groups:
                pruned = {matrix: rough.pruned(matrix) for matrix in matrices}
                call, gradient = calls[site.outlet], gradients[site.outlet]
                along.append(_along(model, site, pruned, call, gradient, len(batch.positions)))
            return torch.stack(along).square() / 2

        budget = budget_bytes(memory_budget, model)
        parts = batches(chosen, examples_per_pass(model, chosen, budget))
        for batch, found in each_in_memory(parts, estimate):
            divergences[:, batch.positions] = found
            progress.update(len(batch.positions))
    return divergences


class _RoughPruning:
    """Prunes by Wanda; of what it has seen it keeps a threshold and the size of the inputs."""

    def __init__(self, model: PreTrainedModel, shares: Mapping[Matrix, int]) -> None:
        self._model = model
        self._shares = shares
        self._thresholds: dict[Matrix, float] = {}
        self._inputs: dict[Matrix, InputStatistics] = {}

    def look_at(self, statistics: Mapping[Matrix, InputStatistics]) -> None:
        """Find the thresholds of dense matrices."""
        self._inputs.update(statistics)
        self._thresholds.update({matrix: self._threshold(matrix) for matrix in statistics})

    def _threshold(self, matrix: Matrix) -> float:
        zeros = self._shares[matrix]
        return kth_smallest(lambda: (self._importance(matrix),), zeros).value if zeros else -inf

    def pruned(self, matrix: Matrix) -> torch.Tensor:
        """Return what a matrix becomes, `[out, in]`; all weights at the threshold go."""
        pruned = self._importance(matrix) <= self._thresholds[matrix]
        return oriented(self._model, matrix).masked_fill(pruned, 0)

    def _importance(self, matrix: Matrix) -> torch.Tensor:
        evidence = Evidence(matrix.name, inputs=self._inputs[matrix])
        return wanda(oriented(self._model, matrix), evidence)


def _gradients_of_draw(
    model: PreTrainedModel, sites: list[Site], batch: Batch, seed: int
) -> tuple[dict[str, RecordedCall], dict[str, torch.Tensor]]:
    """Calls of the outlets of sites, and the gradients in their outputs for one random draw.

    The gradient is that of an example's combination of logits over the root of its scored tokens:
    then its square is a mean over these.
    """
    modules = {site.outlet: model.get_submodule(site.outlet) for site in sites}
    offsets: dict[str, torch.Tensor] = {}

    def offset(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = hidden_of(output)
            offsets[path] = torch.zeros_like(hidden, requires_grad=True)
            moved = hidden + offsets[path]
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    targets = Targets.of(batch)
    counts = torch.bincount(targets.rows, minlength=targets.examples)
    with ExitStack() as stack:
        calls = stack.enter_context(recorded_calls(modules))
        for path, module in modules.items():
            stack.callback(module.register_forward_hook(offset(path)).remove)
        stack.enter_context(torch.enable_grad())
        logits = scored_logits(model, batch)
        draw = _fisher_draw(logits.detach().float().softmax(dim=-1), batch, counts, seed)
        draw *= counts[targets.rows].to(draw).rsqrt().unsqueeze(1)
        gradients = torch.autograd.grad(logits, list(offsets.values()), draw.to(logits.dtype))
    return calls, {
        path: gradient.float() for path, gradient in zip(offsets, gradients, strict=True)
    }


def _fisher_draw(
    probabilities: torch.Tensor, batch: Batch, counts: torch.Tensor, seed: int
) -> torch.Tensor:
    """Draw vectors with mean 0 and covariance diag(p) - p p^T, the same in a batch of any size.

    Args:
        probabilities: p of each scored token, `[scored, vocabulary]`.
        batch: The batch.
        counts: Number of scored tokens of each example.
        seed: Seed of the draw.

    Returns:
        `[scored, vocabulary]`.
    """
    draw = probabilities.sqrt()
    parts = draw.split(counts.tolist())
    for position, part in zip(batch.positions, parts, strict=True):
        own = int(np.random.SeedSequence([seed, position]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(own)
        part *= torch.randn(part.shape, generator=generator).to(part)
    return draw.addcmul_(probabilities, draw.sum(dim=1, keepdim=True), value=-1)


def _along(
    model: PreTrainedModel,
    site: Site,
    pruned: Mapping[Matrix, torch.Tensor],
    call: RecordedCall,
    gradient: torch.Tensor,
    examples: int,
) -> torch.Tensor:
    """Product of the gradient and the change of the output, per example, float64 `[examples]`.

    An expert is run on the tokens that reach it, as the only one chosen.

    Args:
        model: The model.
        site: The site.
        pruned: What its matrices become, `[out, in]`.
        call: The call of its outlet.
        gradient: In the output of the outlet.
        examples: Number of examples, which have the same number of tokens.
    """
    outlet = model.get_submodule(site.outlet)
    if site.expert is None:
        with _exchanged(model, pruned):
            changed = hidden_of(outlet(call.hidden, *call.args, **call.kwargs))
        change = changed - hidden_of(call.output)
        return (gradient * change.float()).reshape(examples, -1).sum(dim=1).double().cpu()
    chosen, weights = routing(site.branch, call.args)
    tokens, slots = routed(chosen, site.expert)
    if not len(tokens):
        return torch.zeros(examples, dtype=torch.float64)
    own = call.hidden[tokens], chosen[tokens, slots, None], weights[tokens, slots, None]
    change = -hidden_of(outlet(*own))
    with _exchanged(model, pruned):
        change += hidden_of(outlet(*own))
    of_tokens = (gradient[tokens] * change.float()).sum(dim=1)
    example = tokens // (len(chosen) // examples)
    return torch.bincount(example.cpu(), of_tokens.double().cpu(), minlength=examples)


def _groups(
    sites: list[Site], layers: Mapping[int, list[Matrix]]
) -> dict[int, list[tuple[Site, list[Matrix]]]]:
    """The sites of each layer that have matrices to prune, with these."""
    return {
        layer: [
            (site, chosen)
            for site in sites
            if site.layer == layer
            and (chosen := [matrix for matrix in prunable_matrices([site]) if matrix in own])
        ]
        for layer, own in layers.items()
    }


def _response(
    model: PreTrainedModel, site: Site, matrices: list[Matrix], divergences: torch.Tensor
) -> Response:
    count = len(divergences)
    if not divergences.isfinite().all():
        logger.warning(
            f"pruning {site.name} alone gives predictions that are not finite; it gets as few "
            "zeros as any site"
        )
    error = float(divergences.std()) / sqrt(count) if count > 1 else nan
    sizes = tuple(oriented(model, matrix).numel() for matrix in matrices)
    return Response(site, tuple(matrices), sizes, float(divergences.mean()), error)


def examples_to_measure(sites_per_layer: list[int], examples: int) -> int:
    """Number of examples on which measuring all sites costs about one pass over all examples.

    A site of layer l costs the passes through the layers from l on.
    """
    layers = len(sites_per_layer)
    passed = sum(count * (layers - layer) for layer, count in enumerate(sites_per_layer))
    affordable = int(_PASSES * examples * layers / max(1, passed))
    return min(examples, max(_FEWEST_EXAMPLES, affordable))


def examples_to_estimate(examples: int) -> int:
    """Number of examples for one backward pass: one in eight, at least 16."""
    return max(_FEWEST_EXAMPLES, examples // 8)


class _Trial:
    """The dense model's predictions on some examples, and how pruned layers change them."""

    def __init__(
        self, model: PreTrainedModel, sites: list[Site], examples: list[CalibrationExample]
    ) -> None:
        self.model = model
        self.walk = LayerWalk(model, sites, examples)
        self.targets = [Targets.of(stream.batch) for stream in self.walk.streams]
        self.passed = 0
        self.together = _SETS_AT_A_TIME if is_offloaded(model) else 1
        hidden = [stream.hidden for stream in self.walk.streams]
        self.final = self._to_the_end(0, [hidden])[0]

    def divergences(
        self, layer: int, pruned: Iterable[dict[Matrix, torch.Tensor]]
    ) -> Iterator[torch.Tensor]:
        """Divergence per example, `[examples]`, with each set of matrices of a layer exchanged."""
        while self.passed < layer:
            self.walk.advance(self.passed)
            self.passed += 1
        besides = [*self.walk.layers, self.model.get_input_embeddings()]
        left = iter(pruned)
        while some := list(self._entered(layer, islice(left, self.together))):
            finals = self._to_the_end(layer + 1, some)
            with brought_in(self.model, besides=besides):
                found = [self._divergence(final) for final in finals]
            yield from found

    def _entered(
        self, layer: int, pruned: Iterable[dict[Matrix, torch.Tensor]]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the outputs of a layer, per batch, with each set of matrices exchanged."""
        for weights in pruned:
            with brought_in(self.walk.layers[layer]), _exchanged(self.model, weights):
                outputs = [self.walk.run(layer, each, each.hidden) for each in self.walk.streams]
            yield outputs

    def _to_the_end(
        self, layer: int, carried: list[list[torch.Tensor]]
    ) -> list[list[torch.Tensor]]:
        """Final hidden states at scored positions, `[scored, 1, hidden]`, per set and batch."""
        for index in range(layer, len(self.walk.layers)):
            with brought_in(self.walk.layers[index]):
                for hidden in carried:
                    for place, stream in enumerate(self.walk.streams):
                        hidden[place] = self.walk.run(index, stream, hidden[place])
        return [
            [
                hidden[targets.rows.to(hidden.device), targets.columns.to(hidden.device)].unsqueeze(
                    1
                )
                for hidden, targets in zip(each, self.targets, strict=True)
            ]
            for each in carried
        ]

    def _divergence(self, final: list[torch.Tensor]) -> torch.Tensor:
        form = self.walk.forms[-1]
        found = []
        for dense, changed, targets in zip(self.final, final, self.targets, strict=True):
            parts = []
            step = positions_per_chunk(self.model, dense.device)
            for start in range(0, len(dense), step):
                part = slice(start, start + step)
                expected, given = (
                    logits_of(self.model, self.walk.layers, form, hidden[part])
                    .float()
                    .log_softmax(dim=-1)
                    for hidden in (dense, changed)
                )
                parts.append((expected.exp() * (expected - given)).sum(dim=-1))
            found.append(targets.example_means(torch.cat(parts)))
        return torch.cat(found)


@contextmanager
def _exchanged(model: PreTrainedModel, pruned: Mapping[Matrix, torch.Tensor]) -> Iterator[None]:
    """Give matrices that are in memory other weights `[out, in]`."""
    views = {matrix: oriented(model, matrix) for matrix in pruned}
    own = {matrix: view.clone() for matrix, view in views.items()}
    try:
        for matrix, view in views.items():
            view.copy_(pruned[matrix])
        yield
    finally:
        for matrix, view in views.items():
            view.copy_(own[matrix])
