"""The record of one pruning: everything that a reader of the checkpoint may want to know."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from optimum_cap.config import CAPConfig


@dataclass(frozen=True)
class MatrixSparsity:
    """How many weights of one matrix are zero.

    Attributes:
        name: Name of the parameter; an expert of a 3-D parameter adds its index, as in
            `model.layers.0.mlp.experts.down_proj[3]`.
        zeros: Number of weights that are exactly zero.
        total: Number of weights.
        tokens: Number of calibration tokens that its inputs were measured on, where they were.
    """

    name: str
    zeros: int
    total: int
    tokens: int | None = None

    @property
    def sparsity(self) -> float:
        return self.zeros / self.total


@dataclass(frozen=True)
class UnitScore:
    """Causal score of one unit.

    Attributes:
        site: Name of the mixing projection at whose input the unit was masked.
        unit: Index of the unit in its site: of the head, or of the group of channels.
        layer: Index of the decoder layer.
        score: Loss with the unit masked minus loss intact, in nats per token. `None` if every
            masked loss was non-finite.
        standard_error: Standard error of the mean paired difference over examples, in nats.
        importance: Importance that the recipe made of the score.
        nonfinite: Number of examples whose masked loss was not finite.
        kind: Kind of the site: `"attention"`, `"mlp"` or `"expert"`.
    """

    site: str
    unit: int
    layer: int
    score: float | None
    standard_error: float | None
    importance: float
    nonfinite: int = 0
    kind: str = "attention"

    @property
    def label(self) -> str:
        """Short name for people (`unit_label`)."""
        return unit_label(self.kind, self.layer, self.site, self.unit)


@dataclass(frozen=True)
class SiteSensitivity:
    """What pruning one site alone does to the dense model's predictions, and what the site got.

    Attributes:
        site: Name of the mixing projection.
        kind: `"attention"`, `"mlp"` or `"expert"`.
        layer: Index of the decoder layer.
        zeros: Number of weights of the site's pruned matrices that became zero.
        total: Number of weights of these matrices.
        divergence: Kullback-Leibler divergence of the predictions with this site alone pruned from
            those of the dense model, nats per scored token; measured or estimated, as
            `PruningRecord.responses_are` says. `None` if it was not finite.
        standard_error: Of the divergence, over examples. `None` if it is not known.
    """

    site: str
    kind: str
    layer: int
    zeros: int
    total: int
    divergence: float | None
    standard_error: float | None

    @property
    def sparsity(self) -> float:
        return self.zeros / self.total

    @property
    def label(self) -> str:
        """Short name for people, such as `3.attention` or `3.expert2`."""
        return f"{self.layer}.{branch_label(self.kind, self.site)}"


@dataclass(frozen=True)
class PruningRecord:
    """What was pruned, how, and from which model. Plain JSON values throughout.

    Attributes:
        config: The `CAPConfig`, as its `to_dict` gives it.
        base_model: Hub id or path of the dense model, if known.
        base_revision: Commit of the dense model on the Hub, if known.
        matrices: Zeros per prunable matrix, in the order of the model.
        scores: Causal score per unit, in the order of the model.
        calibration: Which examples were used: sources, indices, content hashes.
        versions: Version per library.
        threshold: Importance up to which weights were pruned, where one threshold decided.
        intact_loss: Loss of the dense model on the calibration set, nats per scored token.
        sensitivities: What pruning each site alone does, in the order of the model, where that
            decided the sparsities.
    """

    config: dict[str, Any]
    base_model: str | None
    base_revision: str | None
    matrices: list[MatrixSparsity]
    scores: list[UnitScore]
    calibration: dict[str, Any]
    versions: dict[str, str]
    threshold: float | None = None
    intact_loss: float | None = None
    sensitivities: list[SiteSensitivity] = field(default_factory=list)

    @property
    def responses_are(self) -> str:
        """How the sensitivities came about: `"measured"` or `"estimated"`."""
        method = CAPConfig.from_dict(self.config).method
        return "estimated" if method.allocation == "fisher" else "measured"

    @property
    def zeros(self) -> int:
        return sum(matrix.zeros for matrix in self.matrices)

    @property
    def total(self) -> int:
        return sum(matrix.total for matrix in self.matrices)

    @property
    def sparsity(self) -> float:
        """Achieved fraction of zeros among the prunable weights."""
        return self.zeros / self.total

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PruningRecord":
        """Rebuild a record from `to_dict`.

        Raises:
            ValueError: A field is missing or unknown.
        """
        try:
            return cls(
                **{
                    **values,
                    "matrices": [MatrixSparsity(**matrix) for matrix in values["matrices"]],
                    "scores": [UnitScore(**score) for score in values["scores"]],
                    "sensitivities": [
                        SiteSensitivity(**own) for own in values.get("sensitivities", [])
                    ],
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a pruning record of a known version: {error}") from error


KINDS = {"attention": "attention heads", "mlp": "MLP units", "expert": "expert units"}


def unit_label(kind: str, layer: int, site: str, unit: int) -> str:
    """Return a short name: `3.7` of a head, `3.mlp.7`, or `3.expert2.7` inside an expert."""
    branch = "" if kind == "attention" else f"{branch_label(kind, site)}."
    return f"{layer}.{branch}{unit}"


def branch_label(kind: str, site: str) -> str:
    """Return a short name of the branch of a site: `attention`, `mlp`, or `expert2`."""
    return f"expert{site.rpartition('[')[2].removesuffix(']')}" if kind == "expert" else kind


def count_units(kinds: Iterable[str]) -> str:
    """Return how many units there are of each kind, such as `32 attention heads, 8 MLP units`."""
    counts = Counter(kinds)
    return ", ".join(f"{counts[kind]:,} {name}" for kind, name in KINDS.items() if counts[kind])
