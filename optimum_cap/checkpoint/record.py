"""The pruning record, which is saved with a checkpoint."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from optimum_cap.config import CAPConfig


@dataclass(frozen=True)
class MatrixSparsity:
    """Number of zeros of one matrix.

    Attributes:
        name: Name of the parameter; an expert in a 3-D parameter adds its index, as in
            `model.layers.0.mlp.experts.down_proj[3]`.
        zeros: Number of weights that are exactly zero.
        total: Number of weights.
        tokens: Number of calibration tokens that its inputs were measured on; `None` if they were
            not measured.
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
        site: Name of the output projection at whose input the unit was masked.
        unit: Index of the unit in its site: of the head, or of the group of channels.
        layer: Index of the decoder layer.
        score: Loss with the unit masked minus intact loss, in nats per token. `None` if no masked
            loss was finite.
        standard_error: Standard error of the mean paired difference over examples, in nats.
        importance: Importance that the recipe computed from the score.
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
        """Short name for tables (`unit_label`)."""
        return unit_label(self.kind, self.layer, self.site, self.unit)


@dataclass(frozen=True)
class SiteSensitivity:
    """Effect of pruning one site alone on the dense model's predictions, and the site's sparsity.

    Attributes:
        site: Name of the output projection.
        kind: `"attention"`, `"mlp"` or `"expert"`.
        layer: Index of the decoder layer.
        zeros: Number of weights of the site's pruned matrices that became zero.
        total: Number of weights of these matrices.
        divergence: Kullback-Leibler divergence between the predictions of the dense model and those
            with only this site pruned, in nats per scored token; measured or estimated
            (`PruningRecord.sensitivities_are`). `None` if it was not finite.
        standard_error: Standard error of the divergence over examples; `None` if not available.
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
        """Short name for tables, such as `3.attention` or `3.expert2`."""
        return f"{self.layer}.{block_label(self.kind, self.site)}"


@dataclass(frozen=True)
class DenseWeights:
    """A projection of the decoder that stayed dense, in all layers and experts that have it.

    LM head, embeddings, norms and routers, which are never pruned, are not listed.

    Attributes:
        name: Path in the decoder layer, or in the decoder, such as `mlp.shared_expert.down_proj`.
        weights: Number of its weights.
        prunable: Whether it could be pruned, but the config leaves it dense; otherwise, CAP cannot
            prune it in this architecture.
    """

    name: str
    weights: int
    prunable: bool


@dataclass(frozen=True)
class PruningRecord:
    """What was pruned, how, and from which model. All values are plain JSON.

    Attributes:
        config: The `CAPConfig`, as returned by `to_dict`.
        base_model: Hub id or path of the dense model, if known.
        base_revision: Commit of the dense model on the Hub, if known.
        matrices: Zeros per prunable matrix, in the order of the model.
        scores: Causal score per unit, in the order of the model.
        calibration: The calibration examples: sources, indices, content hashes.
        versions: Version per library.
        threshold: Importance up to which weights were pruned; `None` without a global threshold.
        intact_loss: Loss of the dense model on the calibration set in nats per scored token.
        sensitivities: Effect of pruning each site alone, in the order of the model; empty if it did
            not determine the sparsities.
        dense: Linear weights of the decoder that stayed dense.
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
    dense: list[DenseWeights] = field(default_factory=list)

    @property
    def sensitivities_are(self) -> str:
        """Whether the sensitivities are `"measured"` or `"estimated"`."""
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

    @property
    def unsupported(self) -> list[DenseWeights]:
        """Linear weights of the decoder that CAP cannot prune in this architecture."""
        return [weights for weights in self.dense if not weights.prunable]

    def share_of(self, dense: list[DenseWeights]) -> float:
        """Return the share of dense weights in the linear weights of the decoder."""
        everything = self.total + sum(weights.weights for weights in self.dense)
        return sum(weights.weights for weights in dense) / everything

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
                        SiteSensitivity(**site) for site in values.get("sensitivities", [])
                    ],
                    "dense": [DenseWeights(**weights) for weights in values.get("dense", [])],
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the pruning record has missing or unknown fields ({error}): upgrade optimum-cap, "
                "or save the model again"
            ) from error


KINDS = {"attention": "attention heads", "mlp": "MLP units", "expert": "expert units"}


def unit_label(kind: str, layer: int, site: str, unit: int) -> str:
    """Return a short name: `3.7` for a head, `3.mlp.7`, or `3.expert2.7` for part of an expert."""
    block = "" if kind == "attention" else f"{block_label(kind, site)}."
    return f"{layer}.{block}{unit}"


def block_label(kind: str, site: str) -> str:
    """Return a short name for the block of a site: `attention`, `mlp`, or `expert2`."""
    return f"expert{site.rpartition('[')[2].removesuffix(']')}" if kind == "expert" else kind


def count_units(kinds: Iterable[str]) -> str:
    """Return the number of units of each kind, such as `32 attention heads, 8 MLP units`."""
    counts = Counter(kinds)
    return ", ".join(f"{counts[kind]:,} {name}" for kind, name in KINDS.items() if counts[kind])
