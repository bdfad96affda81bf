"""The cost of `pattern="structured"`, which measures parts of each kind before it removes any.

What it removes depends on what it measures. So the last steps are estimated for the kind of which
the finest parts are removed, and the size of the smaller model is about the requested one.
"""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from optimum_cap.config import CAPConfig, Method
from optimum_cap.estimation.costs import Cost, CostModel, Part
from optimum_cap.estimation.parts import (
    CHOICES,
    COPY_PASSES,
    RemovalCosts,
    RemovedParts,
    Smaller,
    methods_of,
    model_on_meta,
)
from optimum_cap.estimation.work import Workload
from optimum_cap.pruning import MEASURED_EXAMPLES, StructuredRemoval
from optimum_cap.runtime import ALONE

PATTERN = "structured"
_ONCE = ("layers", "experts")  # chosen once, for the largest number of them


@dataclass(frozen=True)
class MeasuredParts:
    """The parts of several kinds whose removal is measured.

    Attributes:
        kinds: By kind, what the model loses with each number of parts that is removed alone, in
            increasing order.
        sparsity: Fraction of the parameters that are to go.
    """

    kinds: dict[str, list[RemovedParts]]
    sparsity: float

    @classmethod
    def of(cls, model_config: PretrainedConfig, config: CAPConfig) -> "MeasuredParts":
        """Return what a run measures.

        Some kinds may turn out to be refused when the run compares models.

        Args:
            model_config: The config of the dense model, which is built on the meta device.
            config: Pattern and sparsity.

        Raises:
            CannotRemoveError: The model has no such parts, or not as many parameters in them.
        """
        removal = StructuredRemoval(model_on_meta(model_config), config, ALONE)
        kinds = {
            name: [RemovedParts.by(each, name) for each in removals]
            for name, removals in removal.to_measure().items()
        }
        return cls(kinds, config.sparsity)

    @property
    def finest(self) -> RemovedParts:
        """The parts that would be enough alone, of the last kind, which has the finest ones."""
        return list(self.kinds.values())[-1][-1]


class StructuredCosts:
    """Computes the cost of removing parts of several kinds.

    Args:
        parts: What is measured.
        dense: The cost model of the dense model.
    """

    def __init__(self, parts: MeasuredParts, dense: CostModel) -> None:
        self.parts = parts
        self.dense = dense
        self._last = RemovalCosts(parts.finest, dense)

    @property
    def left(self) -> Smaller:
        """About the size of what is left."""
        parts, share = self.parts.finest, 1 - self.parts.sparsity
        return Smaller(
            pattern=PATTERN,
            before=None,
            after=None,
            parameters=round(share * parts.dense.parameters),
            disk=round(share * parts.dense_bytes),
            weights_left=None,
            alike=False,
        )

    def all(self, shape: Workload) -> list[Cost]:
        """Return the cost of measuring each kind, and of the recipes `causal` and `causal_fast`."""
        methods = methods_of(PATTERN)
        steps = [
            self.dense.cost("measure", name, [part], self._models, 0.0)
            for name, part in self._kinds("causal", shape).items()
        ]
        steps += [self._last.refining(m.refine, shape) for m in methods.values() if m.refine]
        return steps + [self.pruning(name, method, shape) for name, method in methods.items()]

    def pruning(self, name: str, method: Method, shape: Workload) -> Cost:
        """Return the cost of the whole run, without loading.

        Args:
            name: Name of the cost.
            method: The pruning method.
            shape: The calibration set.
        """
        kinds = self._kinds(name, shape)
        # Channels and heads are chosen again in a model without the other parts.
        again = [
            self._choosing(self.parts.kinds[kind][-1:], name, shape)
            for kind in kinds
            if kind not in _ONCE
        ]
        steps = [*kinds.values(), *again, self._last.checks(method, shape)]
        memory = max(step.memory for step in steps)
        if method.refine:
            steps.append(self._last.refinement(method.refine, shape))
            memory = max(memory, steps[-1].memory)
        return self.dense.cost(
            "prune",
            name,
            [replace(step, memory=0.0) for step in steps],
            self._models + memory,
            self.left.disk + self._last.resumable(method.refine),
        )

    @property
    def _models(self) -> float:
        """Bytes of the dense model and of the two smaller ones that are built at a time."""
        return self.dense.weights * (1 + 2 * (1 - self.parts.sparsity))

    def _kinds(self, recipe: str, shape: Workload) -> dict[str, Part]:
        """Return the cost of choosing and measuring parts, by their kind."""
        return {
            name: _sum([self._choosing(counts, recipe, shape), *self._comparing(counts, shape)])
            for name, counts in self.parts.kinds.items()
        }

    def _choosing(self, counts: list[RemovedParts], recipe: str, shape: Workload) -> Part:
        chosen = counts[-1:] if counts[-1].pattern in _ONCE else counts
        return _sum(
            [
                CHOICES[parts.methods[recipe].criterion](RemovalCosts(parts, self.dense), shape)
                for parts in chosen
                if recipe in parts.methods
            ]
        )

    def _comparing(self, counts: list[RemovedParts], shape: Workload) -> list[Part]:
        """Return the cost of building smaller models, and of comparing their predictions."""
        few = replace(shape, examples=min(MEASURED_EXAMPLES, shape.examples))
        found = []
        for parts in counts:
            work = parts.smaller
            counted = work.layer_passes(few) + work.divergence(few)
            seconds = self._last.seconds(counted, few)
            seconds += self.dense.through_memory(COPY_PASSES * work.parameters)
            found.append(Part(counted.operations, seconds, self.dense.layer_activations(few)))
        return found


def _sum(parts: list[Part]) -> Part:
    """Return the cost of steps one after the other."""
    return Part(
        sum(part.operations for part in parts),
        sum(part.seconds for part in parts),
        max((part.memory for part in parts), default=0.0),
        sum(part.shared for part in parts),
        sum(part.in_lanes for part in parts),
    )
