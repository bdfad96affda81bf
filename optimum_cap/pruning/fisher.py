"""Estimates of sensitivities with one backward pass for all sites."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from math import inf
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.data import Batch, CalibrationExample, batches
from optimum_cap.methods import CriterionInputs, InputStatistics, kth_smallest, wanda
from optimum_cap.models import (
    Matrix,
    ModelView,
    RecordedCall,
    Site,
    Targets,
    check_in_memory,
    evaluation_mode,
    float32_on_cpu,
    hidden_states_of,
    oriented,
    recorded_calls,
    routed,
    routing,
    scored_logits,
    without_parameter_grads,
)
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.cache import SensitivityStore
from optimum_cap.pruning.sensitivity import (
    FEWEST_EXAMPLES,
    Sensitivity,
    group_by_layer,
    sensitivity_of,
    temporary_weights,
)
from optimum_cap.runtime import ALONE, ProcessGroup, budget_bytes, check_same_inputs, each_in_memory
from optimum_cap.scoring import examples_per_pass


def estimate_sensitivities(
    view: ModelView,
    layers: Mapping[int, list[Matrix]],
    examples: list[CalibrationExample],
    zeros_per_matrix: Mapping[Matrix, int],
    count: int | None = None,
    seed: int = 0,
    answer_weight: float = 0.0,
    memory_budget: int | str = "auto",
    kept: SensitivityStore | None = None,
    process_group: ProcessGroup = ALONE,
) -> list[Sensitivity]:
    """Estimate the same with one backward pass for all sites.

    To second order the divergence of a change d in the output of a block is d F d / 2, where F is
    the Fisher information (Martens 2020, arXiv 1412.1193, section 5). It is the mean of (g d)^2,
    where g is the gradient of a random combination of the logits whose second moments are those of
    the likelihood's gradient, diag(p) - p p^T. Labels drawn from p have them too, but a confident
    model nearly always draws the same. The change is what the block shows when its site is pruned
    by Wanda, the quickest criterion that looks at inputs.

    Args:
        view: The model, dense and whole in memory; it comes back as it was.
        layers: The matrices to prune, by decoder layer.
        examples: The calibration examples, in random order; the first ones are used.
        zeros_per_matrix: Number of zeros of each matrix.
        count: How many examples to use; `None`: as `examples_to_estimate`.
        seed: Seed of the random combinations.
        answer_weight: As for `measure_sensitivities`.
        memory_budget: Bytes for activations, text such as `"4GB"`, or `"auto"` for half of what is
            free. Where memory runs out all the same, batches are halved.
        kept: What was estimated in the same way: the last bits depend on the memory that is free.
        process_group: The processes, which all compute the same; all of them have to call this.

    Returns:
        As `measure_sensitivities`.

    Raises:
        ValueError: Weights are offloaded, or a site's matrices are not all in one block.
        ConnectionError: Another process of the group has stopped.
    """
    check_in_memory(view.model)
    check_same_inputs(process_group, view.model, examples, count, seed)
    groups = [group for own in group_by_layer(view.sites, layers).values() for group in own]
    for site, _ in groups:
        if site.block == site.layer_name:
            raise ValueError(
                f"{type(view.model).__name__} has no module around {site.name} that could be run "
                "alone, so its sensitivity cannot be estimated: use allocation 'interventional'"
            )
    if count is None:
        count = examples_to_estimate(len(examples))
    chosen = examples[:count]
    divergences = kept.estimated(len(chosen), seed) if kept else None
    if divergences is None:
        divergences = _estimated(
            view, layers, groups, chosen, zeros_per_matrix, seed, answer_weight, memory_budget
        )
        if kept:
            kept.keep_estimated(divergences, seed)
    # Every process has done all of it; what follows has to be the same in all.
    divergences = process_group.broadcast(divergences)
    return [
        sensitivity_of(view.model, *group, own)
        for group, own in zip(groups, divergences, strict=True)
    ]


def _estimated(
    view: ModelView,
    layers: Mapping[int, list[Matrix]],
    groups: list[tuple[Site, list[Matrix]]],
    chosen: list[CalibrationExample],
    zeros_per_matrix: Mapping[Matrix, int],
    seed: int,
    answer_weight: float,
    memory_budget: int | str,
) -> torch.Tensor:
    """Estimates for sites with their matrices on the chosen examples: `[sites, examples]`."""
    divergences = torch.empty(len(groups), len(chosen), dtype=torch.float64)
    with (
        evaluation_mode(view.model),
        float32_on_cpu(view.model),
        without_parameter_grads(view.model),
        logging.tqdm(total=len(chosen), desc="Estimating sensitivities", delay=5) as progress,
    ):
        rough = WandaApproximation(view.model, zeros_per_matrix)
        walk = LayerwisePass(view, chosen, answer_weight, memory_budget)
        for layer in range(len(walk.layers)):
            rough.look_at(walk.statistics(layer, layers.get(layer, []), advance=True))
        del walk

        def estimate(batch: Batch) -> torch.Tensor:
            calls, gradients = _gradients_of_draw(
                view.model, [site for site, _ in groups], batch, seed
            )
            along = []
            for site, matrices in groups:
                pruned = {matrix: rough.pruned(matrix) for matrix in matrices}
                call, gradient = calls[site.output_module], gradients[site.output_module]
                along.append(_along(view.model, site, pruned, call, gradient, len(batch.positions)))
            return torch.stack(along).square() / 2

        budget = budget_bytes(memory_budget, view.model)
        parts = batches(chosen, examples_per_pass(view.model, chosen, budget))
        for batch, found in each_in_memory(parts, estimate):
            divergences[:, batch.positions] = found
            progress.update(len(batch.positions))
    return divergences


class WandaApproximation:
    """Prunes by Wanda; of what it has seen it keeps a threshold and the size of the inputs."""

    def __init__(self, model: PreTrainedModel, zeros_per_matrix: Mapping[Matrix, int]) -> None:
        self._model = model
        self._zeros = zeros_per_matrix
        self._thresholds: dict[Matrix, float] = {}
        self._inputs: dict[Matrix, InputStatistics] = {}

    def look_at(self, statistics: Mapping[Matrix, InputStatistics]) -> None:
        """Find the thresholds of dense matrices."""
        self._inputs.update(statistics)
        self._thresholds.update({matrix: self._threshold(matrix) for matrix in statistics})

    def _threshold(self, matrix: Matrix) -> float:
        zeros = self._zeros[matrix]
        return kth_smallest(lambda: (self._importance(matrix),), zeros).value if zeros else -inf

    def pruned(self, matrix: Matrix) -> torch.Tensor:
        """Return what a matrix becomes, `[out, in]`; all weights at the threshold go."""
        pruned = self._importance(matrix) <= self._thresholds[matrix]
        return oriented(self._model, matrix).masked_fill(pruned, 0)

    def _importance(self, matrix: Matrix) -> torch.Tensor:
        inputs = CriterionInputs(matrix.name, statistics=self._inputs[matrix])
        return wanda(oriented(self._model, matrix), inputs)


def _gradients_of_draw(
    model: PreTrainedModel, sites: list[Site], batch: Batch, seed: int
) -> tuple[dict[str, RecordedCall], dict[str, torch.Tensor]]:
    """Calls of the outlets of sites, and the gradients in their outputs for one random draw.

    The gradient is that of an example's combination of logits over the root of its scored tokens:
    then its square is a mean over these.
    """
    modules = {site.output_module: model.get_submodule(site.output_module) for site in sites}
    offsets: dict[str, torch.Tensor] = {}

    def offset(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = hidden_states_of(output)
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
        call: The call of its output_module.
        gradient: In the output of the output_module.
        examples: Number of examples, which have the same number of tokens.
    """
    output_module = model.get_submodule(site.output_module)
    if site.expert is None:
        with temporary_weights(model, pruned):
            changed = hidden_states_of(output_module(call.hidden, *call.args, **call.kwargs))
        change = changed - hidden_states_of(call.output)
        return (gradient * change.float()).reshape(examples, -1).sum(dim=1).double().cpu()
    chosen, weights = routing(site.block, call.args)
    tokens, slots = routed(chosen, site.expert)
    if not len(tokens):
        return torch.zeros(examples, dtype=torch.float64)
    own = call.hidden[tokens], chosen[tokens, slots, None], weights[tokens, slots, None]
    change = -hidden_states_of(output_module(*own))
    with temporary_weights(model, pruned):
        change += hidden_states_of(output_module(*own))
    of_tokens = (gradient[tokens] * change.float()).sum(dim=1)
    example = tokens // (len(chosen) // examples)
    return torch.bincount(example.cpu(), of_tokens.double().cpu(), minlength=examples)


def examples_to_estimate(examples: int) -> int:
    """Number of examples for one backward pass: one in eight, at least 16."""
    return max(FEWEST_EXAMPLES, examples // 8)
