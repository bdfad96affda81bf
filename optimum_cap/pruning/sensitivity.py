"""What pruning does to the predictions: each site is pruned alone, and the change measured.

This is the intervention of causal attribution with the thing itself in the place of a mask: not
what the model loses without a unit, but what it loses when the unit is pruned.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from math import nan, sqrt

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.data import CalibrationExample
from optimum_cap.methods import InputStatistics
from optimum_cap.models import (
    Matrix,
    ModelView,
    Site,
    Targets,
    evaluation_mode,
    float32_on_cpu,
    is_offloaded,
    logits_of,
    onloaded,
    oriented,
    positions_per_chunk,
    prunable_matrices,
)
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.cache import SensitivityStore
from optimum_cap.runtime import ALONE, ProcessGroup, check_same_inputs, resume_hint_on_stop

_PASSES = 1.0  # over the calibration set, that measuring may cost
FEWEST_EXAMPLES = 16
_SETS_AT_A_TIME = 8  # of pruned matrices, where each layer has to be brought in for them

logger = logging.get_logger(__name__)

Prune = Callable[[Matrix, InputStatistics], torch.Tensor]
"""Returns what a matrix `[out, in]` becomes, and leaves it as it is."""


@dataclass(frozen=True)
class Sensitivity:
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


def measure_sensitivities(
    view: ModelView,
    layers: Mapping[int, list[Matrix]],
    examples: list[CalibrationExample],
    prune: Prune,
    count: int | None = None,
    gram: bool = True,
    answer_weight: float = 0.0,
    kept: SensitivityStore | None = None,
    memory_budget: int | str = "auto",
    process_group: ProcessGroup = ALONE,
) -> list[Sensitivity]:
    """Prune each site alone and measure what that does to the predictions of scored tokens.

    The divergence from the dense model's predictions is what the loss would gain on answers drawn
    from the dense model. Unlike the gain on the answers of the data it is never negative, and a few
    examples show it.

    Args:
        view: The model, dense; it comes back as it was.
        layers: The matrices to prune, by decoder layer.
        examples: The calibration examples, in random order: all are used for the statistics of the
            inputs, the first ones to measure.
        prune: Prunes a matrix.
        count: How many examples to measure on; `None`: as `examples_to_measure`.
        gram: Whether `prune` needs x_i x_j of the inputs.
        answer_weight: As for `LayerwisePass`, in these statistics.
        kept: What was measured in the same way, by a run that was stopped.
        memory_budget: As for `LayerwisePass`.
        process_group: The processes that share the sites; all of them have to call this.

    Returns:
        One sensitivity for each site with matrices to prune, in the order of the model.

    Raises:
        ValueError: The processes of the group were given different inputs.
        ConnectionError: Another process of the group has stopped.
    """
    groups = group_by_layer(view.sites, layers)
    if count is None:
        count = examples_to_measure([len(groups[layer]) for layer in sorted(groups)], len(examples))
    count = min(count, len(examples))
    every = [group for own in groups.values() for group in own]
    known = {}
    if kept:
        found = {site: kept.measured(site, count) for site, _ in every}
        known = {site: own for site, own in found.items() if own is not None}
    check_same_inputs(process_group, view.model, examples, count)
    left = {
        # Shifted by layer: an attention takes less than the MLP beside it.
        layer: [
            group
            for group in own[
                (process_group.rank + layer) % process_group.size :: process_group.size
            ]
            if group[0] not in known
        ]
        for layer, own in groups.items()
    }

    def doing() -> str:
        return f"trying sites was stopped after {len(known)} of {len(every)}"

    with resume_hint_on_stop(doing, kept):
        # Closed at once whatever happens, so that the model is as it was.
        with closing(
            _measured(view, left, examples, prune, count, gram, answer_weight, memory_budget)
        ) as measured:
            for site, divergences in measured:
                known[site] = divergences
                if kept:
                    kept.keep_measured(site, divergences)
        for others in process_group.all_gather(known):
            known |= others
    return [sensitivity_of(view.model, site, matrices, known[site]) for site, matrices in every]


def _measured(
    view: ModelView,
    groups: dict[int, list[tuple[Site, list[Matrix]]]],
    examples: list[CalibrationExample],
    prune: Prune,
    count: int,
    gram: bool,
    answer_weight: float,
    memory_budget: int | str,
) -> Generator[tuple[Site, torch.Tensor], None, None]:
    """Yield the divergences of sites, given by layer with their matrices, on the first examples."""
    if not any(groups.values()):
        return
    with (
        evaluation_mode(view.model),
        float32_on_cpu(view.model),
        logging.tqdm(
            total=sum(map(len, groups.values())), desc="Measuring sites", unit="site"
        ) as progress,
    ):
        walk = LayerwisePass(view, examples, answer_weight, memory_budget)
        trial = DivergenceEvaluator(view, examples[:count], memory_budget)
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


def group_by_layer(
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


def sensitivity_of(
    model: PreTrainedModel, site: Site, matrices: list[Matrix], divergences: torch.Tensor
) -> Sensitivity:
    """Return the sensitivity of a site from its divergences on the examples, nats, `[examples]`."""
    count = len(divergences)
    if not divergences.isfinite().all():
        logger.warning(
            f"pruning {site.name} alone gives predictions that are not finite; it gets as few "
            "zeros as any site"
        )
    error = float(divergences.std()) / sqrt(count) if count > 1 else nan
    sizes = tuple(oriented(model, matrix).numel() for matrix in matrices)
    return Sensitivity(site, tuple(matrices), sizes, float(divergences.mean()), error)


def examples_to_measure(sites_per_layer: list[int], examples: int) -> int:
    """Number of examples on which measuring all sites costs about one pass over all examples.

    A site of layer l costs the passes through the layers from l on.
    """
    layers = len(sites_per_layer)
    passed = sum(count * (layers - layer) for layer, count in enumerate(sites_per_layer))
    affordable = int(_PASSES * examples * layers / max(1, passed))
    return min(examples, max(FEWEST_EXAMPLES, affordable))


class DivergenceEvaluator:
    """The dense model's predictions on some examples, and how pruned layers change them."""

    def __init__(
        self,
        view: ModelView,
        examples: list[CalibrationExample],
        memory_budget: int | str,
    ) -> None:
        self.model = view.model
        self.walk = LayerwisePass(view, examples, memory_budget=memory_budget)
        self.targets = [Targets.of(batch.batch) for batch in self.walk.batches]
        self.passed = 0
        self.together = _SETS_AT_A_TIME if is_offloaded(view.model) else 1
        hidden = [batch.hidden for batch in self.walk.batches]
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
            with onloaded(self.model, besides=besides):
                found = [self._divergence(final) for final in finals]
            yield from found

    def _entered(
        self, layer: int, pruned: Iterable[dict[Matrix, torch.Tensor]]
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the outputs of a layer, per batch, with each set of matrices exchanged."""
        for weights in pruned:
            with onloaded(self.walk.layers[layer]), temporary_weights(self.model, weights):
                outputs = [self.walk.run(layer, each, each.hidden) for each in self.walk.batches]
            yield outputs

    def _to_the_end(
        self, layer: int, carried: list[list[torch.Tensor]]
    ) -> list[list[torch.Tensor]]:
        """Final hidden states at scored positions, `[scored, 1, hidden]`, per set and batch."""
        for index in range(layer, len(self.walk.layers)):
            with onloaded(self.walk.layers[index]):
                for hidden in carried:
                    for place, batch in enumerate(self.walk.batches):
                        hidden[place] = self.walk.run(index, batch, hidden[place])
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
        output_template = self.walk.output_templates[-1]
        found = []
        for dense, changed, targets in zip(self.final, final, self.targets, strict=True):
            parts = []
            step = positions_per_chunk(self.model, dense.device)
            for start in range(0, len(dense), step):
                part = slice(start, start + step)
                expected, given = (
                    logits_of(self.model, self.walk.layers, output_template, hidden[part])
                    .float()
                    .log_softmax(dim=-1)
                    for hidden in (dense, changed)
                )
                parts.append((expected.exp() * (expected - given)).sum(dim=-1))
            found.append(targets.example_means(torch.cat(parts)))
        return torch.cat(found)


@contextmanager
def temporary_weights(
    model: PreTrainedModel, pruned: Mapping[Matrix, torch.Tensor]
) -> Iterator[None]:
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
