"""Removes parts of several kinds (`pattern="structured"`), in the amounts that cost least.

Each kind is first removed alone, in a few amounts, and the change of the predictions is measured.
The amounts expected to change them the least for the requested number of parameters are then
removed, one kind after the other.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, product
from math import inf
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.config import CAPConfig, effective
from optimum_cap.data import CalibrationExample
from optimum_cap.models import (
    CannotRemoveError,
    Matrix,
    ModelView,
    evaluation_mode,
    float32_on_cpu,
    names_before,
)
from optimum_cap.pruning.cache import PruningCache
from optimum_cap.pruning.part_ranking import MEASURED_EXAMPLES
from optimum_cap.pruning.parts import with_divided_mlps
from optimum_cap.pruning.removal import PartRemoval, Removal
from optimum_cap.pruning.sensitivity import DivergenceEvaluator
from optimum_cap.pruning.smaller_refinement import SmallerModelRefinement
from optimum_cap.runtime import ProcessGroup
from optimum_cap.text import enumeration

logger = logging.get_logger(__name__)

_KINDS = ("layers", "experts", "heads", "channels")  # in the order in which they are removed
_FILLER = "channels"  # the smallest parts, used to reach the exact number of parameters
_SHARES = (1 / 3, 2 / 3, 1)  # measured shares of the amount that would suffice alone
_TOLERANCE = 0.1  # of the number of parameters to remove

Counts = dict[str, int]
"""Number of removed parts of each kind: per layer, or the number of layers."""


@dataclass
class _Kind:
    """A kind of parts.

    Attributes:
        removal: Removes the smallest possible number of them.
        gone: Number of parameters removed with the first 0, 1, 2, ... of them, in all layers.
        divergences: The measured divergence, by number of removed parts.
    """

    removal: PartRemoval
    gone: list[float]
    divergences: dict[int, float] = field(default_factory=dict)

    @property
    def most(self) -> int:
        """The maximum number of them that can be removed, in the known order."""
        step = self.removal.step
        return min(self.removal.most, (len(self.gone) - 1) // step * step)

    def count_for(self, parameters: float) -> int:
        """Return how many of them have this number of parameters, or the maximum."""
        step = self.removal.step
        enough = bisect_left(self.gone, parameters)
        return min(self.most, max(step, -(-enough // step) * step))

    def divergence(self, count: int) -> float:
        """Return the divergence with this many removed, interpolated between measured ones."""
        points = sorted({0: 0.0, **self.divergences}.items())
        for (below, low), (above, high) in pairwise(points):
            if count <= above:
                return low + (high - low) * (count - below) / (above - below)
        return inf


@dataclass
class _Smaller:
    """A model without parts of several kinds.

    Attributes:
        model: The model.
        layers: Indices of the kept layers in the dense model.
        parts: Number of parts of each kind before and after.
        kept: Indices of the kept parts, by name of their module in the dense model.
    """

    model: PreTrainedModel
    layers: list[int]
    parts: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[str, list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        gone = [f"{p['before'] - p['after']} of {p['before']} {p['part']}" for p in self.parts]
        return f"without {enumeration(gone)}"


class StructuredRemoval:
    """Removes experts, heads, channels and layers until a fraction of the parameters is removed.

    Args:
        model: The dense model; it is left unchanged.
        config: How much to remove, and how.
        process_group: The processes that share the refinement.

    Attributes:
        view: The model, with at least two units in every MLP and expert.

    Raises:
        CannotRemoveError: The model has no parts of any kind, or too few parameters in them.
    """

    def __init__(
        self, model: PreTrainedModel, config: CAPConfig, process_group: ProcessGroup
    ) -> None:
        self._model = model
        self._config = config
        self._process_group = process_group
        self._kinds: dict[str, _Kind] = {}
        self._refused: dict[str, str] = {}  # why parts of a kind cannot be removed
        self._before = model.num_parameters()
        self._target = config.sparsity * self._before
        self.view = with_divided_mlps(model)
        for name in _KINDS:
            try:
                removal = self._removal(self.view, name)
                self._kinds[name] = _Kind(removal, self._gone_with(name, removal))
            except ValueError as error:  # also from unknown routers
                self._keep(name, error)
        self._check_enough()

    def _removal(self, view: ModelView, kind: str) -> PartRemoval:
        """Return a removal of the smallest possible number of parts of a kind."""
        values = {**vars(self._config), "answer_weight": self._config.method.answer_weight}
        config = CAPConfig(**effective(values, {"pattern": kind, "criterion": None}))
        return PartRemoval(view.model, config, self._process_group, fewest=True, view=view)

    def _each(self, removal: PartRemoval) -> float:
        return (removal.view.model.num_parameters() - removal.parameters()) / removal.count

    def _gone_with(self, kind: str, removal: PartRemoval) -> list[float]:
        """Return how many parameters are removed with the first 0, 1, 2, ... parts of a kind.

        Until the order of layers is known, each counts with the median size.
        """
        if kind == "layers":
            each = float(median(map(self._size_of_layer, range(removal.before))))
        else:
            each = self._each(removal)
        return [count * each for count in range(removal.before + 1)]

    def _size_of_layer(self, layer: int) -> int:
        return sum(parameter.numel() for parameter in self.view.layers[layer].parameters())

    def _check_enough(self) -> None:
        """Check that the removable parts have enough parameters."""
        if not self._kinds:
            reasons = "; ".join(dict.fromkeys(self._refused.values()))
            raise CannotRemoveError(
                f"no parts of {type(self._model).__name__} can be removed, so pattern 'structured' "
                f"cannot make it smaller: {reasons}"
            )
        smallest = min(kind.gone[kind.removal.step] for kind in self._kinds.values())
        if self._target < smallest / 2:
            raise CannotRemoveError(
                f"sparsity {self._config.sparsity} would remove {self._target:,.0f} of "
                f"{self._before:,} parameters, but the smallest parts that can be removed have "
                f"{smallest:,.0f}: choose a higher sparsity"
            )
        if next(self._possible(), None) is None:
            most = {name: kind.most for name, kind in self._kinds.items()}
            names = ", ".join(self._kinds)
            raise CannotRemoveError(
                f"sparsity {self._config.sparsity} would remove {self._target:,.0f} of "
                f"{self._before:,} parameters, but {type(self._model).__name__} loses at most "
                f"{self._gone(most):,.0f} with all that can go ({names}): choose a lower sparsity"
            )

    def to_measure(self) -> dict[str, list[PartRemoval]]:
        """Return the removals of parts of one kind whose divergences are measured, by the kind."""
        return {
            name: [kind.removal.with_count(count) for count in self._counts_to_measure(kind)]
            for name, kind in self._kinds.items()
        }

    def check(self, examples: list[CalibrationExample]) -> None:
        """Check on one example which kinds of parts can be removed.

        Args:
            examples: The calibration examples; without any, some tokens are made up.

        Raises:
            CannotRemoveError: None can be removed, or those that can have too few parameters.
        """
        for name, kind in list(self._kinds.items()):
            try:
                kind.removal.check(examples)
            except CannotRemoveError as error:
                self._keep(name, error)
        self._check_enough()

    def _keep(self, name: str, reason: ValueError) -> None:
        """Keep all parts of a kind."""
        self._refused[name] = str(reason)
        self._kinds.pop(name, None)
        logger.info(f"All {name} are kept: {reason}")

    def run(self, examples: list[CalibrationExample]) -> Removal:
        """Remove the parts.

        Args:
            examples: The calibration examples.
        """
        config, model = self._config, self._model
        cache = None
        if config.resume_dir is not None:
            cache = PruningCache(config.resume_dir, model, examples, self._process_group)
        with evaluation_mode(model), float32_on_cpu(model) as stored_dtypes:
            evaluator = DivergenceEvaluator(
                self.view, examples[:MEASURED_EXAMPLES], config.memory_budget
            )
            chosen = self._measure(examples, evaluator, cache)
            mixture = self._without(examples, chosen, self._cheapest())
            divergence = float(evaluator.divergence_of(ModelView.of(mixture.model)).mean())
            logger.info(f"Divergence {mixture}: {divergence:.4f}")
            alone, least = self._best_alone()
            if least < divergence:
                mixture = self._without(examples, chosen, alone, fill=False)
                divergence = least
                logger.info(f"Divergence {mixture}: {least:.4f}, which is less")
            del evaluator
            self._report_parameters(mixture)
            refinement = SmallerModelRefinement(
                self.view, mixture.model, mixture.layers, config, self._process_group
            )
            store = refinement.run_(examples, mixture.kept, stored_dtypes, cache)
        measured = [
            {"part": name, "removed": count, "divergence": of_count}
            for name, kind in self._kinds.items()
            for count, of_count in sorted(kind.divergences.items())
        ]
        measured.append({"part": "structured", "divergence": divergence})
        return Removal(mixture.model, mixture.parts, mixture.kept, store, measured=measured)

    def _report_parameters(self, smaller: _Smaller) -> None:
        """Warn if the number of removed parameters differs from the requested number."""
        gone = self._before - smaller.model.num_parameters()
        if abs(gone - self._target) > _TOLERANCE * self._target:
            logger.warning(
                f"sparsity {self._config.sparsity} is {self._target:,.0f} of {self._before:,} "
                f"parameters, but the parts that go have {gone:,} ({gone / self._before:.1%})"
            )

    def _measure(
        self,
        examples: list[CalibrationExample],
        evaluator: DivergenceEvaluator,
        cache: PruningCache | None,
    ) -> dict[str, Any]:
        """Measure the divergences with some parts of one kind removed.

        Returns:
            The layers, or the experts of each layer, in order of removal.
        """
        chosen = {}
        for name, kind in list(self._kinds.items()):
            try:
                if name in ("layers", "experts"):
                    largest = kind.removal.with_count(self._counts_to_measure(kind)[-1])
                    chosen[name], _ = largest.choose(examples, {}, cache)
                    if name == "layers":
                        sizes = map(self._size_of_layer, chosen[name])
                        kind.gone = list(accumulate(sizes, initial=0.0))
                self._measure_kind(name, kind, examples, evaluator, chosen.get(name), cache)
            except CannotRemoveError as error:
                self._keep(name, error)
        self._check_enough()
        return chosen

    def _measure_kind(
        self,
        name: str,
        kind: _Kind,
        examples: list[CalibrationExample],
        evaluator: DivergenceEvaluator,
        chosen: Any,
        cache: PruningCache | None,
    ) -> None:
        """Measure the divergences with some parts of a kind removed."""
        for count in self._counts_to_measure(kind):
            removal = kind.removal.with_count(count)
            settings = {**removal.settings, "examples": MEASURED_EXAMPLES}
            first = None if chosen is None else removal.first(chosen)
            if first is not None:
                settings["kept"] = removal.description(first)
            stored = cache.divergence(settings) if cache else None
            if stored is None:
                removed, fitted = (first, {}) if first else removal.choose(examples, {}, cache)
                view = ModelView.of(removal.without(removed, fitted))
                stored = float(evaluator.divergence_of(view).mean())
                if cache:
                    cache.put_divergence(settings, stored)
            kind.divergences[count] = stored
            logger.info(f"Divergence without {count} of {kind.removal.before} {name}: {stored:.4f}")

    def _counts_to_measure(self, kind: _Kind) -> list[int]:
        """Return the numbers of parts to measure, up to the one that would suffice alone."""
        return sorted({kind.count_for(share * self._target) for share in _SHARES})

    def _cheapest(self) -> Counts:
        """Return the counts with the lowest expected divergence."""

        def cost(counts: Counts) -> tuple[float, float]:
            divergence = sum(self._kinds[name].divergence(n) for name, n in counts.items())
            return divergence, self._gone(counts)

        return min(self._possible(), key=cost)

    def _best_alone(self) -> tuple[Counts, float]:
        """Return the best counts of a single kind, and the divergence."""
        found = [
            ({name: count}, divergence)
            for name, kind in self._kinds.items()
            for count, divergence in kind.divergences.items()
            if self._gone({name: count}) >= self._target
        ]
        return min(found, key=lambda each: each[1], default=({}, inf))

    def _possible(self) -> Iterator[Counts]:
        """Yield all counts that remove the requested number of parameters."""
        others = [name for name in self._kinds if name != _FILLER]
        filler = self._kinds.get(_FILLER)
        most = {name: self._counts_to_measure(kind)[-1] for name, kind in self._kinds.items()}
        ranges = [range(0, most[name] + 1, self._kinds[name].removal.step) for name in others]
        for numbers in product(*ranges):
            counts = dict(zip(others, numbers, strict=True))
            missing = self._target - self._gone(counts)
            if missing <= 0:
                yield counts
            elif filler:
                step = filler.removal.step
                each = self._gone({**counts, _FILLER: step}) - self._gone(counts)
                count = step * max(1, round(missing / each))
                if count <= most[_FILLER]:
                    yield {**counts, _FILLER: count}

    def _gone(self, counts: Mapping[str, int]) -> float:
        """Return about how many parameters are removed with these parts.

        Parts of removed layers are removed with them, and so are channels of removed experts.
        """

        def left(name: str) -> float:
            if name not in counts:
                return 1.0
            return 1 - counts[name] / self._kinds[name].removal.before

        gone = {name: self._kinds[name].gone[count] for name, count in counts.items()}
        if "channels" in gone and self._kinds["channels"].removal.removes_from_experts:
            gone["channels"] *= left("experts")
        return sum(n * (1.0 if name == "layers" else left("layers")) for name, n in gone.items())

    def _without(
        self,
        examples: list[CalibrationExample],
        chosen: Mapping[str, Any],
        counts: Counts,
        fill: bool = True,
    ) -> _Smaller:
        """Remove parts of one kind after the other.

        Args:
            examples: The calibration examples.
            chosen: The layers, or the experts of each layer, in order of removal.
            counts: How many parts of each kind to remove.
            fill: Remove as many channels as the remaining parameters require, instead of the given
                count.
        """
        dense = self._model
        smaller = _Smaller(dense, list(range(len(self.view.layers))))
        for name in _KINDS:
            if not counts.get(name):
                continue
            removal = self._kinds[name].removal
            if smaller.model is not dense:
                removal = self._removal(with_divided_mlps(smaller.model), name)
            count = counts[name]
            if name == _FILLER and fill:
                count = self._channels_to_remove(removal, 0 if smaller.parts else removal.step)
            if not count:
                continue
            removal = removal.with_count(count)
            fitted: dict[Matrix, torch.Tensor] = {}
            if name == "layers":
                removed = removal.first(chosen[name])
            elif name == "experts":
                of_layer, layers = chosen[name], enumerate(smaller.layers)
                removed = removal.first({n: of_layer[old] for n, old in layers if old in of_layer})
            else:
                removed, fitted = removal.choose(examples, {}, None)
            model = removal.without(removed, fitted)
            if not fitted:
                removal.check_agrees(removed, model, examples)
            name_before = names_before(dense, smaller.layers)
            for path, indices in removal.description(removed).items():
                smaller.kept[name_before(path)] = indices
            if name == "layers":
                smaller.layers = removal.layers_after(removed)
            smaller.parts.append(removal.summary())
            smaller.model = model
        return smaller

    def _channels_to_remove(self, removal: PartRemoval, least: int) -> int:
        """Return how many channels to remove from a smaller model, given its parameters."""
        missing = self._target - (self._before - removal.view.model.num_parameters())
        count = removal.step * round(missing / self._each(removal) / removal.step)
        return max(least, min(count, removal.most))
