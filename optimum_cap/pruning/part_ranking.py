"""Chooses the experts and layers to remove (`pattern="experts"`, `pattern="layers"`).

Every function takes the dense model and returns what to remove from it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from optimum_cap.config import CAPConfig
from optimum_cap.data import CalibrationExample
from optimum_cap.models import (
    ExpertsCall,
    ModelView,
    RecordedCall,
    Router,
    bypass_layers,
    evaluation_mode,
    expert_output,
    float32_on_cpu,
    gated,
    have_own_tokens,
    kinds_of_layers,
    recorded_calls,
    routed,
)
from optimum_cap.progress import progress_bar
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.collector import LayerBatch
from optimum_cap.pruning.sensitivity import FEWEST_EXAMPLES, DivergenceEvaluator

MEASURED_EXAMPLES = 2 * FEWEST_EXAMPLES  # for measuring divergences without experts
MEASURED_EXAMPLES_FOR_LAYERS = FEWEST_EXAMPLES  # each trial runs half of the model
COMPARED_TOKENS = 4096  # for comparing errors of experts, in as many batches as needed
COMPARED_BYTES = 1 << 29  # approximate size of all experts' outputs for these tokens
CANDIDATES = 8  # experts or layers measured for each removed one
MOST_ROUNDS = 16  # maximum number of rounds in which the experts of a layer are removed


@dataclass(frozen=True)
class _RoutedTokens:
    """Some tokens of a mixture of experts, and the outputs of all experts for them.

    Attributes:
        router: The router.
        calls: The calls of the module with router and experts, one per batch.
        batches: The batches.
        outputs: Outputs of the experts, `[experts, tokens, hidden]`.
        scale: Square of the hidden state after the layer at each token, float32 `[tokens]`.
    """

    router: Router
    calls: list[RecordedCall]
    batches: list[LayerBatch]
    outputs: torch.Tensor
    scale: torch.Tensor

    def output(self, removed: list[int]) -> torch.Tensor:
        """Return the output of the mixture without some experts, `[tokens, hidden]`."""
        index = torch.tensor(removed, dtype=torch.long)
        routes = [
            _real(batch, self.router.route(call, index), self.router.block)
            for batch, call in zip(self.batches, self.calls, strict=True)
        ]
        chosen = torch.cat([route.chosen for route in routes])
        weights = torch.cat([route.weights for route in routes])
        tokens = torch.arange(len(chosen), device=chosen.device)
        output = torch.zeros_like(self.outputs[0])
        for slot in range(chosen.shape[1]):
            output += weights[:, slot, None] * self.outputs[chosen[:, slot], tokens]
        return output

    def error(self, removed: list[int], intact: torch.Tensor) -> float:
        """Return the mean squared error relative to the hidden states after the layer."""
        squares = (self.output(removed) - intact).float().square().sum(dim=1)
        return float((squares / self.scale).double().mean())


@dataclass(frozen=True)
class _Quota:
    """The number of experts to remove from a layer.

    Attributes:
        experts: Number of experts.
        count: Number of experts to remove.
        groups: Number of groups of consecutive experts; each loses the same number.
    """

    experts: int
    count: int
    groups: int

    def left(self, gone: Iterable[int]) -> list[int]:
        """Return the experts that may be removed next."""
        size, most = self.experts // self.groups, self.count // self.groups
        lost = Counter(expert // size for expert in gone)
        return [e for e in range(self.experts) if e not in gone and lost[e // size] < most]

    def take(self, ranked: Iterable[int], gone: list[int], number: int) -> list[int]:
        """Return the first `number` removable experts of a ranking."""
        taken: list[int] = []
        for expert in ranked:
            if len(taken) < number and expert in self.left([*gone, *taken]):
                taken.append(expert)
        return taken

    def at_once(self, gone: list[int]) -> int:
        """Return how many experts to remove before ranking the rest again."""
        return min(self.count - len(gone), -(-self.count // MOST_ROUNDS))


def experts_to_remove(
    view: ModelView,
    routers: Mapping[int, Router],
    examples: list[CalibrationExample],
    count: int,
    groups: int,
    config: CAPConfig,
) -> dict[int, list[int]]:
    """Choose the experts to remove from each layer that has any.

    Args:
        view: The dense model; it is left unchanged.
        routers: The router of each layer with experts.
        examples: The calibration examples, in random order.
        count: Number of experts to remove from each layer.
        groups: The router's number of groups of consecutive experts; each loses the same number of
            experts.
        config: Gives criterion, memory budget and seed.

    Returns:
        The experts to remove from each layer, least important first.

    Raises:
        ValueError: The criterion does not support these experts.
    """
    quotas = {layer: _Quota(router.count, count, groups) for layer, router in routers.items()}
    criterion = config.method.criterion
    if criterion == "random":
        generator = torch.Generator().manual_seed(config.seed)
        return {
            layer: quota.take(_permutation(quota.experts, generator), [], count)
            for layer, quota in quotas.items()
        }
    with evaluation_mode(view.model), float32_on_cpu(view.model):
        if criterion == "divergence":
            return _by_divergence(view, routers, quotas, examples, config)
        layerwise = LayerwisePass(view, examples, memory_budget=config.memory_budget)
        removed = {}
        for layer in progress_bar(range(len(view.layers)), desc="Ranking experts", unit="layer"):
            if layer in routers:
                router, quota = routers[layer], quotas[layer]
                if criterion == "routed_error":
                    removed[layer] = _by_error(_routed_tokens(layerwise, layer, router), quota)
                else:
                    scores = EXPERT_SCORES[criterion](layerwise, layer, router)
                    ranked = scores.argsort(stable=True).tolist()
                    removed[layer] = quota.take(ranked, [], count)
            layerwise.advance(layer)
        return removed


def _permutation(count: int, generator: torch.Generator) -> list[int]:
    return [int(index) for index in torch.randperm(count, generator=generator)]


def _calls(
    layerwise: LayerwisePass, layer: int, router: Router, batch: LayerBatch
) -> tuple[RecordedCall, torch.Tensor]:
    """Return the call of the module with router and experts, and the output of the layer."""
    parent = layerwise.model.get_submodule(router.parent)
    with recorded_calls({"": parent}) as calls:
        output = layerwise.run(layer, batch, batch.hidden)
    return calls[""], output


def _real(batch: LayerBatch, call: ExpertsCall, block: str) -> ExpertsCall:
    """Return a call of experts without the rows of padding."""
    hidden = call.hidden
    if hidden.ndim == 2:
        hidden = batch.real_rows(hidden, block)
    else:
        hidden = torch.stack([batch.real_rows(of_expert, block) for of_expert in hidden])
    rows = (batch.real_rows(each, block) for each in (call.chosen, call.weights))
    return ExpertsCall(hidden, *rows)


def _routed_tokens(layerwise: LayerwisePass, layer: int, router: Router) -> _RoutedTokens:
    """Return some tokens of a layer, with the outputs of every expert for them.

    Raises:
        ValueError: The router scales the inputs of experts (Llama 4).
    """
    if have_own_tokens(router.experts):
        raise ValueError(
            f"{router.block} gives each expert tokens scaled for it, so errors of experts cannot "
            "be compared: choose criterion 'divergence' or 'reap'"
        )
    generator = torch.Generator().manual_seed(layer)
    order = torch.randperm(len(layerwise.batches), generator=generator).tolist()
    calls, batches, outputs, scales, tokens = [], [], [], [], 0
    width = layerwise.batches[0].hidden.shape[-1]
    most = min(COMPARED_TOKENS, COMPARED_BYTES // (4 * width * router.count))
    for index in order:
        if tokens and tokens >= most:
            break
        batch = layerwise.batches[index]
        call, output = _calls(layerwise, layer, router, batch)
        hidden = _real(batch, router.route(call, _NONE), router.block).hidden
        outputs.append(
            torch.stack(
                [
                    expert_output(router.experts, expert, gated(router.experts, expert, hidden))
                    for expert in range(router.count)
                ]
            )
        )
        after = batch.real_rows(output.flatten(0, -4) if output.ndim > 3 else output, router.block)
        scales.append(after.float().square().sum(dim=1))
        calls.append(call)
        batches.append(batch)
        tokens += len(hidden)
    return _RoutedTokens(router, calls, batches, torch.cat(outputs, dim=1), torch.cat(scales))


_NONE = torch.zeros(0, dtype=torch.long)


def _by_error(tokens: _RoutedTokens, quota: _Quota) -> list[int]:
    """Remove experts one by one, each time the one whose removal changes the output least.

    The output is that of the mixture, where the expert's tokens are routed to others.
    """
    intact, gone = tokens.output([]), list[int]()
    while len(gone) < quota.count:
        ranked = _ranked_by_error(tokens, gone, quota.left(gone), intact)
        gone += quota.take(ranked, gone, quota.at_once(gone))
    return gone


def _ranked_by_error(
    tokens: _RoutedTokens, gone: list[int], candidates: list[int], intact: torch.Tensor
) -> list[int]:
    """Return candidates, in order of how little their removal changes the mixture's output."""
    errors = {candidate: tokens.error([*gone, candidate], intact) for candidate in candidates}
    return sorted(candidates, key=errors.__getitem__)


def _by_divergence(
    view: ModelView,
    routers: Mapping[int, Router],
    quotas: Mapping[int, _Quota],
    examples: list[CalibrationExample],
    config: CAPConfig,
) -> dict[int, list[int]]:
    """Remove experts by how their removal changes the model's predictions.

    Layers are processed in order, each after the earlier ones have lost their experts. In a layer,
    experts are removed one by one (a few at once if there are many). The candidates are those whose
    removal changes the output of the mixture the least; among them, the one whose removal changes
    the predictions the least is removed.
    """
    evaluator = DivergenceEvaluator(view, examples[:MEASURED_EXAMPLES], config.memory_budget)
    removed = {}
    total = sum(quota.count for quota in quotas.values())
    with progress_bar(total=total, desc="Removing experts", unit="expert") as progress:
        for layer in range(len(view.layers)):
            if layer not in routers:
                evaluator.advance()
                continue
            router, quota, gone = routers[layer], quotas[layer], list[int]()
            shortlist = _shortlist(evaluator.layerwise, layer, router, quota)
            while len(gone) < quota.count:
                candidates = shortlist(gone)
                contexts = (router.without(torch.tensor([*gone, each])) for each in candidates)
                divergences = {
                    candidate: float(each.mean())
                    for candidate, each in zip(
                        candidates, evaluator.divergences_in(contexts), strict=True
                    )
                }
                ranked = sorted(candidates, key=divergences.__getitem__)
                taken = quota.take(ranked, gone, quota.at_once(gone))
                gone += taken
                progress.update(len(taken))
            with router.without(torch.tensor(gone)):
                evaluator.advance()
            removed[layer] = gone
    return removed


def first_experts(ranked: list[int], experts: int, count: int, groups: int) -> list[int]:
    """Return the first `count` of the experts that `experts_to_remove` returned for a layer.

    Args:
        ranked: These experts.
        experts: Number of experts of the layer.
        count: Number of experts to remove.
        groups: As for `experts_to_remove`.
    """
    return _Quota(experts, count, groups).take(ranked, [], count)


def _shortlist(
    layerwise: LayerwisePass, layer: int, router: Router, quota: _Quota
) -> Callable[[list[int]], list[int]]:
    """Return a function from the removed experts to the candidates for the next ones."""
    if router.count <= CANDIDATES or have_own_tokens(router.experts):
        return quota.left
    tokens = _routed_tokens(layerwise, layer, router)
    intact = tokens.output([])

    def shortlist(gone: list[int]) -> list[int]:
        ranked = _ranked_by_error(tokens, gone, quota.left(gone), intact)
        return quota.take(ranked, gone, CANDIDATES + quota.at_once(gone) - 1)

    return shortlist


def _routes(layerwise: LayerwisePass, layer: int, router: Router) -> Iterator[ExpertsCall]:
    """Yield the calls of the experts of a layer on all batches, without padding."""
    for batch in layerwise.batches:
        call, _ = _calls(layerwise, layer, router, batch)
        yield _real(batch, router.route(call, _NONE), router.block)


def _frequency(layerwise: LayerwisePass, layer: int, router: Router) -> torch.Tensor:
    """Return the number of tokens each expert receives."""
    counts = torch.zeros(router.count, dtype=torch.float64)
    for call in _routes(layerwise, layer, router):
        chosen = call.chosen[call.chosen < router.count]
        counts += torch.bincount(chosen, minlength=router.count).cpu()
    return counts


def _routing_weight(layerwise: LayerwisePass, layer: int, router: Router) -> torch.Tensor:
    """Return the sum of the routing weights of each expert."""
    sums = torch.zeros(router.count + 1, dtype=torch.float64)
    for call in _routes(layerwise, layer, router):
        sums.index_add_(0, call.chosen.flatten().cpu(), call.weights.flatten().double().cpu())
    return sums[: router.count]


def _reap(layerwise: LayerwisePass, layer: int, router: Router) -> torch.Tensor:
    """Return the mean norm of each expert's contribution to the output, over its tokens.

    Router-weighted expert activation pruning (Lasby et al. 2025, ICLR 2026, arXiv 2510.13999, Eq.
    9). An expert that receives no token gets 0.
    """
    sums = torch.zeros(router.count, dtype=torch.float64)
    counts = torch.zeros(router.count, dtype=torch.float64)
    for call in _routes(layerwise, layer, router):
        for expert in range(router.count):
            tokens, slots = routed(call.chosen, expert)
            inputs = gated(router.experts, expert, call.inputs(expert, tokens))
            norms = expert_output(router.experts, expert, inputs).float().norm(dim=1)
            sums[expert] += float((norms * call.weights[tokens, slots].float()).double().sum())
            counts[expert] += len(tokens)
    return sums / counts.clamp(min=1)


EXPERT_SCORES: dict[str, Callable[[LayerwisePass, int, Router], torch.Tensor]] = {
    "reap": _reap,
    "frequency": _frequency,
    "routing_weight": _routing_weight,
}
"""Scores of the experts of a layer; those with the lowest scores are removed."""


def layers_to_remove(
    view: ModelView, examples: list[CalibrationExample], count: int, config: CAPConfig
) -> list[int]:
    """Choose `count` decoder layers.

    Args:
        view: The dense model; it is left unchanged.
        examples: The calibration examples, in random order.
        count: Number of layers to remove.
        config: Gives criterion, memory budget and seed.

    Returns:
        Their indices, least important first. One layer of each kind stays, because a hybrid model
        cannot generate without attention.
    """
    criterion, layers = config.method.criterion, len(view.layers)
    kinds = kinds_of_layers(view.model)
    if criterion == "random":
        generator = torch.Generator().manual_seed(config.seed)
        return first_layers(_permutation(layers, generator), kinds, count)
    with evaluation_mode(view.model), float32_on_cpu(view.model):
        if criterion == "divergence":
            return _layers_by_divergence(view, examples, kinds, count, config)
        layerwise = LayerwisePass(view, examples, memory_budget=config.memory_budget)
        influence = [
            _block_influence(layerwise, layer)
            for layer in progress_bar(range(layers), desc="Ranking layers", unit="layer")
        ]
    return first_layers(sorted(range(layers), key=influence.__getitem__), kinds, count)


def first_layers(ranked: Iterable[int], kinds: Sequence[tuple[str, ...]], count: int) -> list[int]:
    """Return the first removable layers of a ranking.

    Args:
        ranked: Indices of all layers.
        kinds: The kind of each layer; one layer of each kind stays.
        count: Number of layers to return, if that many may be removed.
    """
    taken: list[int] = []
    for layer in ranked:
        if len(taken) < count and layer in _removable_layers(kinds, taken):
            taken.append(layer)
    return taken


def _removable_layers(kinds: Sequence[tuple[str, ...]], gone: list[int]) -> list[int]:
    """Return the layers that may still be removed: no kind may lose its last layer."""
    left = Counter(kind for layer, kind in enumerate(kinds) if layer not in gone)
    return [layer for layer, kind in enumerate(kinds) if layer not in gone and left[kind] > 1]


def _block_influence(layerwise: LayerwisePass, layer: int) -> float:
    """Advance past a layer; return 1 minus the mean cosine similarity of its input and output.

    This is the block influence of ShortGPT (Men et al. 2024, arXiv 2403.03853, Eq. 1).
    """
    total = tokens = 0.0
    befores = [batch.hidden for batch in layerwise.batches]
    layerwise.advance(layer)
    for batch, before in zip(layerwise.batches, befores, strict=True):
        real = batch.batch.real.to(before.device)
        cosine = torch.cosine_similarity(
            before[..., real, :].float(), batch.hidden[..., real, :].float(), dim=-1
        )
        total += float((1 - cosine).double().sum())
        tokens += cosine.numel()
    return total / tokens


def _layers_by_divergence(
    view: ModelView,
    examples: list[CalibrationExample],
    kinds: Sequence[tuple[str, ...]],
    count: int,
    config: CAPConfig,
) -> list[int]:
    """Remove layers one by one, each time the one whose removal changes predictions least.

    After each removal, the layers with the smallest change at their last measurement are measured
    again.
    """
    evaluator = DivergenceEvaluator(
        view, examples[:MEASURED_EXAMPLES_FOR_LAYERS], config.memory_budget
    )
    layers, gone = view.layers, list[int]()
    divergences: dict[int, float] = {}  # the last measurement without each layer
    candidates = _removable_layers(kinds, gone)
    trials = len(layers) + sum(min(CANDIDATES, len(layers) - n) for n in range(1, count))
    with progress_bar(total=trials, desc="Measuring layers", unit="layer") as progress:
        while True:
            evaluator.restart()
            with ExitStack() as stack:
                for layer in gone:
                    template = view.output_templates[layer]
                    stack.enter_context(bypass_layers([layers[layer]], template))
                for layer in range(len(layers)):
                    if layer in candidates:
                        context = bypass_layers([layers[layer]], view.output_templates[layer])
                        [divergence] = evaluator.divergences_in([context])
                        divergences[layer] = float(divergence.mean())
                        progress.update()
                    evaluator.advance()
            gone.append(min(candidates, key=divergences.__getitem__))
            if len(gone) == count:
                return gone
            left = _removable_layers(kinds, gone)
            candidates = sorted(left, key=divergences.__getitem__)[:CANDIDATES]
