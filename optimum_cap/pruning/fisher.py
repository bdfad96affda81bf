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
    store: SensitivityStore | None = None,
    process_group: ProcessGroup = ALONE,
) -> list[Sensitivity]:
    """Estimate the sensitivities of all sites with one backward pass.

    To second order, the divergence caused by a change d in the output of a block is d F d / 2,
    where F is the Fisher information (Martens 2020, arXiv 1412.1193, section 5). d F d is the mean
    of (g d)^2, where g is the gradient of a random combination of the logits whose coefficients
    have the covariance diag(p) - p p^T of the likelihood's gradient. Labels drawn from p would give
    the same covariance, but a confident model nearly always draws the same label. The change d is
    that of the block's output when its site is pruned by Wanda, the fastest criterion that uses
    inputs.

    Args:
        view: The dense model with all weights in memory; it is left unchanged.
        layers: The matrices to prune, by decoder layer.
        examples: The calibration examples, in random order; the first ones are used.
        zeros_per_matrix: Number of zeros of each matrix.
        count: Number of examples to use; `None` takes `examples_to_estimate`.
        seed: Seed of the random combinations.
        answer_weight: As for `measure_sensitivities`.
        memory_budget: Bytes for activations, text such as `"4GB"`, or `"auto"` for half of the free
            memory. If memory runs out nevertheless, batches are halved.
        store: Stores the estimates for a resumed run: their last bits depend on the free memory.
        process_group: The processes, each of which computes everything; all of them must call this.

    Returns:
        As `measure_sensitivities`.

    Raises:
        ValueError: Weights are offloaded, or a site has no module around its projection.
        ConnectionError: Another process of the group has stopped.
    """
    check_in_memory(view.model, alternative="recipe 'causal' (allocation 'interventional')")
    check_same_inputs(process_group, view.model, examples, count, seed)
    by_layer = group_by_layer(view.sites, layers)
    groups = [group for layer_groups in by_layer.values() for group in layer_groups]
    for site, _ in groups:
        if site.block == site.layer_name:
            raise ValueError(
                f"{type(view.model).__name__} has no module around {site.name} that can run alone, "
                "so its sensitivity cannot be estimated: use allocation 'interventional'"
            )
    if count is None:
        count = examples_to_estimate(len(examples))
    chosen = examples[:count]
    divergences = store.get_estimated(len(groups), len(chosen), seed) if store else None
    if divergences is None:
        divergences = _estimate_divergences(
            view, layers, groups, chosen, zeros_per_matrix, seed, answer_weight, memory_budget
        )
        if store:
            store.put_estimated(divergences, seed)
    # Every process has computed all of them; share one set, so that all continue with the same.
    divergences = process_group.broadcast(divergences)
    return [
        sensitivity_of(view.model, *group, of_site)
        for group, of_site in zip(groups, divergences, strict=True)
    ]


def _estimate_divergences(
    view: ModelView,
    layers: Mapping[int, list[Matrix]],
    groups: list[tuple[Site, list[Matrix]]],
    chosen: list[CalibrationExample],
    zeros_per_matrix: Mapping[Matrix, int],
    seed: int,
    answer_weight: float,
    memory_budget: int | str,
) -> torch.Tensor:
    """Estimate the divergences of sites on the chosen examples, float64 `[sites, examples]`."""
    divergences = torch.empty(len(groups), len(chosen), dtype=torch.float64)
    with (
        evaluation_mode(view.model),
        float32_on_cpu(view.model),
        without_parameter_grads(view.model),
        logging.tqdm(total=len(chosen), desc="Estimating sensitivities", delay=5) as progress,
    ):
        approximation = WandaApproximation(view.model, zeros_per_matrix)
        layerwise = LayerwisePass(view, chosen, answer_weight, memory_budget)
        for layer in range(len(layerwise.layers)):
            approximation.fit(layerwise.statistics(layer, layers.get(layer, []), advance=True))
        del layerwise  # with the hidden states that it holds

        def estimate(batch: Batch) -> torch.Tensor:
            calls, gradients = _gradients_of_draw(
                view.model, [site for site, _ in groups], batch, seed
            )
            products = []
            for site, matrices in groups:
                pruned = {matrix: approximation.pruned(matrix) for matrix in matrices}
                call, gradient = calls[site.output_module], gradients[site.output_module]
                products.append(
                    _gradient_dot_change(
                        view.model, site, pruned, call, gradient, len(batch.positions)
                    )
                )
            return torch.stack(products).square() / 2

        budget = budget_bytes(memory_budget, view.model)
        parts = batches(chosen, examples_per_pass(view.model, chosen, budget))
        for batch, estimates in each_in_memory(parts, estimate):
            divergences[:, batch.positions] = estimates
            progress.update(len(batch.positions))
    return divergences


class WandaApproximation:
    """Prunes by Wanda, with one threshold and the input statistics of each matrix.

    Args:
        model: The model.
        zeros_per_matrix: Number of zeros of each matrix.
    """

    def __init__(self, model: PreTrainedModel, zeros_per_matrix: Mapping[Matrix, int]) -> None:
        self._model = model
        self._zeros = zeros_per_matrix
        self._thresholds: dict[Matrix, float] = {}
        self._inputs: dict[Matrix, InputStatistics] = {}

    def fit(self, statistics: Mapping[Matrix, InputStatistics]) -> None:
        """Compute the thresholds of dense matrices from the statistics of their inputs."""
        self._inputs.update(statistics)
        self._thresholds.update({matrix: self._threshold(matrix) for matrix in statistics})

    def _threshold(self, matrix: Matrix) -> float:
        zeros = self._zeros[matrix]
        return kth_smallest(lambda: (self._importance(matrix),), zeros).value if zeros else -inf

    def pruned(self, matrix: Matrix) -> torch.Tensor:
        """Return a pruned matrix, `[out, in]`, without all weights up to the threshold."""
        pruned = self._importance(matrix) <= self._thresholds[matrix]
        return oriented(self._model, matrix).masked_fill(pruned, 0)

    def _importance(self, matrix: Matrix) -> torch.Tensor:
        inputs = CriterionInputs(matrix.name, statistics=self._inputs[matrix])
        return wanda(oriented(self._model, matrix), inputs)


def _gradients_of_draw(
    model: PreTrainedModel, sites: list[Site], batch: Batch, seed: int
) -> tuple[dict[str, RecordedCall], dict[str, torch.Tensor]]:
    """Return the calls of the output modules of sites, and the gradients of their outputs.

    The gradient is that of a random combination of an example's logits, divided by the square root
    of its number of scored tokens, so that squares are means over these tokens.
    """
    modules = {site.output_module: model.get_submodule(site.output_module) for site in sites}
    offsets: dict[str, torch.Tensor] = {}

    def offset(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = hidden_states_of(output)
            offsets[path] = torch.zeros_like(hidden, requires_grad=True)
            shifted = hidden + offsets[path]
            return (shifted, *output[1:]) if isinstance(output, tuple) else shifted

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
    """Draw vectors with mean 0 and covariance diag(p) - p p^T, whatever the batch size is.

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
        example_seed = int(np.random.SeedSequence([seed, position]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(example_seed)
        part *= torch.randn(part.shape, generator=generator).to(part)
    return draw.addcmul_(probabilities, draw.sum(dim=1, keepdim=True), value=-1)


def _gradient_dot_change(
    model: PreTrainedModel,
    site: Site,
    pruned: Mapping[Matrix, torch.Tensor],
    call: RecordedCall,
    gradient: torch.Tensor,
    examples: int,
) -> torch.Tensor:
    """Return the dot product of gradient and change of the output, float64 `[examples]`.

    An expert runs on the tokens that are routed to it, with this expert alone.

    Args:
        model: The model.
        site: The site.
        pruned: Its pruned matrices, `[out, in]`.
        call: The call of its output module.
        gradient: Gradient of the output of this module.
        examples: Number of examples, which have the same number of tokens each.
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
    arguments = call.hidden[tokens], chosen[tokens, slots, None], weights[tokens, slots, None]
    change = -hidden_states_of(output_module(*arguments))
    with temporary_weights(model, pruned):
        change += hidden_states_of(output_module(*arguments))
    of_tokens = (gradient[tokens] * change.float()).sum(dim=1)
    example = tokens // (len(chosen) // examples)
    return torch.bincount(example.cpu(), of_tokens.double().cpu(), minlength=examples)


def examples_to_estimate(examples: int) -> int:
    """Return the number of examples for one backward pass: one in eight, at least 16."""
    return max(FEWEST_EXAMPLES, examples // 8)
