"""The pruning record saved with a checkpoint."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimum_cap.config import CAPConfig
from optimum_cap.text import enumeration, printable

KINDS = {
    "attention": "attention heads",
    "mixer": "mixers without heads",
    "mlp": "MLP units",
    "expert": "expert units",
}
"""Kind of site -> name of its units."""
_LAYER = re.compile(r"(?:^|\.)(\d{1,9})\.")


@dataclass(frozen=True)
class MatrixSparsity:
    """Number of zeros of one matrix.

    Attributes:
        name: Name of the parameter; for an expert in a 3-D parameter, with its index, as in
            `model.layers.0.mlp.experts.down_proj[3]`.
        zeros: Number of weights that are exactly zero.
        total: Number of weights.
        tokens: Number of calibration tokens its inputs were measured on; `None` if they were not
            measured.
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
        site: Name of the output projection whose input the unit was masked in.
        unit: Index of the unit in its site: the head, or the group of channels.
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
    """Effect of pruning one site alone on the dense model's predictions, and the site's zeros.

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
    """A projection of the decoder that stayed dense, over all layers and experts that have it.

    LM head, embeddings, norms and routers, which are never pruned, are not listed.

    Attributes:
        name: Path in the decoder layer, or in the decoder, such as `mlp.shared_expert.down_proj`.
        weights: Number of its weights.
        prunable: Whether CAP can prune it, but the config leaves it dense; otherwise, CAP cannot
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
        base_model: Hub id of the dense model, or `./name` of its local folder, if known.
        base_revision: Commit of the dense model on the Hub, if known.
        matrices: Zeros per prunable matrix, in the order of the model.
        scores: Causal score per unit, in the order of the model.
        calibration: The calibration examples: sources, indices, content hashes.
        versions: Version per library.
        threshold: Importance up to which weights were pruned; `None` if there was no global
            threshold.
        intact_loss: Loss of the dense model on the calibration set in nats per scored token.
        sensitivities: Effect of pruning each site alone, in the order of the model; empty if
            sensitivities did not determine the sparsities.
        zeros_before: Number of prunable weights that were zero before pruning.
        zeros_after: Number of prunable weights that were zero right after pruning. `matrices`
            counts the zeros of the saved weights, which may have been trained since.
        dense: Linear weights of the decoder that stayed dense.
        removed: The removed parts, if any: `parts` lists, for each kind of `part` (a pattern), how
            many each layer had `before` and `after` (or how many layers there were); `kept` has the
            indices of the kept parts by the name of their module in the dense model;
            `parameters_before` and `parameters_after` are the numbers of parameters; and with
            pattern `structured`, `measured` has the divergences with some parts of one kind
            removed, and of the result.
        compacted: Parts removed later without changing results, because they contributed exactly
            nothing (`compact`): one entry like `removed` for each time. Names and indices are those
            of the model before that time; scores, sensitivities and `dense` describe the model
            before all of them.
        recovery: How the model was trained to reproduce the dense model's predictions
            (`optimum_cap.training.recover`): for each time, the arguments and the divergences
            before and after.
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
    zeros_before: int = 0
    zeros_after: int | None = None
    dense: list[DenseWeights] = field(default_factory=list)
    removed: dict[str, Any] = field(default_factory=dict)
    compacted: list[dict[str, Any]] = field(default_factory=list)
    recovery: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        config = self.config
        what = f"{self.zeros:,} of {self.total:,} prunable weights are zero ({self.sparsity:.2%})"
        if self.removed:
            what = describe_removal(self.removed)
        data = f"calibrated on {config.get('dataset')}, {config.get('num_samples')} examples"
        if not self.calibration:
            data = "without calibration data"
        lines = [
            f"PruningRecord of {self.base_model or 'an unknown model'}",
            f"  recipe {config.get('recipe')}, pattern {config.get('pattern')}: {what}",
            f"  {data}; optimum-cap {self.versions.get('optimum-cap')}",
        ]
        return "\n".join(map(printable, lines))

    @property
    def sensitivities_are(self) -> str:
        """Whether the sensitivities are `"measured"` or `"estimated"`."""
        method = CAPConfig.from_dict(self.config).method
        return "estimated" if method.allocation == "fisher" else "measured"

    @property
    def refine(self) -> int:
        """Number of passes in which the kept weights of each layer were refined; 0 if none."""
        return CAPConfig.from_dict(self.config).method.refine

    @property
    def zeros(self) -> int:
        return sum(matrix.zeros for matrix in self.matrices)

    @property
    def total(self) -> int:
        return sum(matrix.total for matrix in self.matrices)

    @property
    def sparsity(self) -> float:
        """Achieved fraction of zeros among the prunable weights."""
        return self.zeros / self.total if self.total else 0.0

    @property
    def lost_zeros(self) -> bool:
        """Whether at least 1 % of the zeros have been filled since pruning, e.g. by training."""
        return self.zeros_after is not None and self.zeros < 0.99 * self.zeros_after

    @property
    def unsupported(self) -> list[DenseWeights]:
        """Linear weights of the decoder that CAP cannot prune in this architecture."""
        return [weights for weights in self.dense if not weights.prunable]

    def share_of(self, dense: list[DenseWeights]) -> float:
        """Return the share of these dense weights among the linear weights of the decoder."""
        everything = self.total + sum(weights.weights for weights in self.dense)
        return sum(weights.weights for weights in dense) / everything if everything else 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PruningRecord":
        """Rebuild a record from `to_dict`.

        Raises:
            ValueError: A field is missing, unknown, or has a value of the wrong type.
        """
        entries = {
            name: _entries(entry_class, name, values.get(name, []))
            for name, entry_class in _ENTRIES.items()
        }
        record = _checked(cls, "", {**values, **entries})
        _check_calibration(record.calibration)
        if record.removed:
            _check_removed("removed", record.removed)
        for index, step in enumerate(record.compacted):
            _check_removed(f"compacted[{index}]", step)
        for index, step in enumerate(record.recovery):
            _check_recovery(f"recovery[{index}]", step)
        # Also adds fields that configs did not have when the record was written.
        return dataclasses.replace(record, config=CAPConfig.from_dict(record.config).to_dict())


_ENTRIES = {
    "matrices": MatrixSparsity,
    "scores": UnitScore,
    "sensitivities": SiteSensitivity,
    "dense": DenseWeights,
}


def is_count(value: Any) -> bool:
    """Whether a JSON value is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or is_count(abs(value) if isinstance(value, int) else value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_versions(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_object, value))


# Type of a field -> requirement for its value.
_CHECKS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    str: (_is_text, "text"),
    int: (is_count, "a count"),
    float: (_is_number, "a number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    str | None: (lambda value: value is None or _is_text(value), "text or null"),
    int | None: (lambda value: value is None or is_count(value), "a count or null"),
    float | None: (lambda value: value is None or _is_number(value), "a number or null"),
    dict[str, Any]: (_is_object, "an object"),
    dict[str, str]: (_is_versions, "an object of texts"),
    list[dict[str, Any]]: (_is_list_of_objects, "a list of objects"),
    **{list[entry]: (_is_list, "a list") for entry in _ENTRIES.values()},  # type: ignore[valid-type]
}


def _entries(entry_class: Any, name: str, values: Any) -> list[Any]:
    """Return the entries of a list in a record as objects of their class."""
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list, got {values!r:.80}")
    checked = []
    for index, value in enumerate(values):
        where = f"{name}[{index}]"
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, got {value!r:.80}")
        entry = _checked(entry_class, where, value)
        if getattr(entry, "kind", "attention") not in KINDS:
            raise ValueError(f"{where}.kind must be one of {', '.join(KINDS)}, got {entry.kind!r}")
        if hasattr(entry, "total") and not entry.zeros <= entry.total > 0:
            raise ValueError(f"{where} has {entry.zeros} zeros of {entry.total} weights")
        checked.append(entry)
    return checked


def _checked(record_class: Any, where: str, values: dict[str, Any]) -> Any:
    """Return an object of a dataclass, after checking its values against the field types."""
    prefix = f"{where}." if where else ""
    fields = {each.name: each for each in dataclasses.fields(record_class)}
    required = {
        name
        for name, each in fields.items()
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    }
    missing, unknown = sorted(required - set(values)), sorted(set(values) - set(fields))
    if missing or unknown:
        problems = [f"it lacks {prefix}{name}" for name in missing]
        problems += [f"{prefix}{name} is an unknown field" for name in unknown]
        raise ValueError(f"{', '.join(problems)}: upgrade optimum-cap, or save the model again")
    for name, value in values.items():
        is_valid, expected = _CHECKS[fields[name].type]
        if not is_valid(value):
            raise ValueError(f"{prefix}{name} must be {expected}, got {value!r:.80}")
    return record_class(**values)


def _check_calibration(calibration: dict[str, Any]) -> None:
    """Check the parts of the calibration record that model cards and evaluations read."""
    sources, digests = calibration.get("sources", []), calibration.get("digests", [])
    if not isinstance(sources, list) or not all(
        isinstance(source, dict)
        and _is_text(source.get("name"))
        and _is_text(source.get("hub_id", ""))
        for source in sources
    ):
        raise ValueError("calibration.sources must be a list of objects with a name")
    if not isinstance(digests, list) or not all(map(_is_text, digests)):
        raise ValueError("calibration.digests must be a list of texts")
    if (answers := calibration.get("answers")) is not None:
        _check_answers(answers)


_REMOVED_COUNTS = ("parameters_before", "parameters_after")


def _check_removed(where: str, removed: dict[str, Any]) -> None:
    """Check a record's entries about removed parts."""
    for name in _REMOVED_COUNTS:
        if not is_count(removed.get(name)):
            raise ValueError(f"{where}.{name} must be a count, got {removed.get(name)!r:.80}")
    parts = removed.get("parts")
    if not isinstance(parts, list) or not parts or not all(map(_is_removed_part, parts)):
        raise ValueError(
            f"{where}.parts must be a list of objects with the text part and the counts before and "
            f"after, got {parts!r:.80}"
        )
    kept = removed.get("kept")
    if not isinstance(kept, dict) or not all(
        isinstance(indices, list) and all(map(is_count, indices)) for indices in kept.values()
    ):
        raise ValueError(f"{where}.kept must be an object of lists of counts, got {kept!r:.80}")


def _is_removed_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and _is_text(part.get("part"))
        and is_count(part.get("before"))
        and is_count(part.get("after"))
    )


def describe_removal(removed: Mapping[str, Any]) -> str:
    """Return what was removed from a model, such as `32 of 64 experts in each layer`.

    Args:
        removed: `removed` of a record, or an entry of `compacted`.
    """
    parts = [
        f"{each['before'] - each['after']:,} of {each['before']:,} {each['part']}"
        + ("" if each["part"] == "layers" else " in each layer")
        for each in removed["parts"]
    ]
    share = removed["parameters_after"] / max(removed["parameters_before"], 1)
    return (
        f"{enumeration(parts)}; {removed['parameters_after']:,} of "
        f"{removed['parameters_before']:,} parameters are left ({share:.1%})"
    )


def _check_recovery(where: str, recovery: dict[str, Any]) -> None:
    """Check a record's entries about a recovery."""
    if not is_count(recovery.get("steps")):
        raise ValueError(f"{where}.steps must be a count, got {recovery.get('steps')!r:.80}")
    for name in ("divergence_before", "divergence_after"):
        if not _is_number(recovery.get(name)):
            raise ValueError(f"{where}.{name} must be a number, got {recovery.get(name)!r:.80}")
    calibration = recovery.get("calibration")
    if not isinstance(calibration, dict):
        raise ValueError(f"{where}.calibration must be an object, got {calibration!r:.80}")
    _check_calibration(calibration)


def describe_recovery(recovery: Mapping[str, Any]) -> str:
    """Return how a model was trained to reproduce the dense model's predictions.

    Args:
        recovery: An entry of `recovery` of a record.
    """
    sources = enumeration(
        [each["name"] for each in recovery["calibration"].get("sources", [])] or ["unknown data"]
    )
    return (
        f"{recovery['steps']:,} steps of distillation from the dense model on {sources}: "
        f"divergence {recovery['divergence_before']:.4f} before, "
        f"{recovery['divergence_after']:.4f} after"
    )


_ANSWER_COUNTS = ("used", "right", "wrong", "unchecked", "truncated", "max_new_tokens")
_ANSWER_NUMBERS = ("temperature", "top_p", "mean_tokens")


def _check_answers(answers: Any) -> None:
    """Check the numbers in the record of the model's own answers."""
    if not isinstance(answers, dict):
        raise ValueError(f"calibration.answers must be an object, got {answers!r:.80}")
    for names, is_valid, expected in (
        (_ANSWER_COUNTS, is_count, "a count"),
        (_ANSWER_NUMBERS, _is_number, "a number"),
    ):
        for name in names:
            if not is_valid(answers.get(name)):
                raise ValueError(
                    f"calibration.answers.{name} must be {expected}, got {answers.get(name)!r:.80}"
                )


def describe_answers(answers: Mapping[str, Any]) -> str:
    """Return how many answers of the dense model were used, and facts about them.

    Args:
        answers: The entry `answers` of the calibration record.
    """
    counts = [
        f"{answers[name]} {name}" for name in ("right", "wrong", "unchecked") if answers[name]
    ]
    return (
        f"{answers['used']} of the dense model's own, sampled at temperature "
        f"{answers['temperature']:g} and top-p {answers['top_p']:g}: {', '.join(counts)}; "
        f"{answers['truncated']} cut off at {answers['max_new_tokens']} tokens; "
        f"{answers['mean_tokens']:g} tokens on average"
    )


def describe_refinement(passes: int) -> str:
    """Return for how many passes the kept weights of each layer were refined."""
    return f"up to {passes} pass{'es' if passes > 1 else ''} over the calibration set"


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


def count_zeros(matrices: Iterable[MatrixSparsity]) -> dict[tuple[int, str], tuple[int, int]]:
    """Sum `(zeros, weights)` by layer and projection; a layer's experts count as one projection.

    Returns:
        Sums by layer and projection, such as `(3, "mlp.experts.down_proj")`, in model order.
    """
    sums: dict[tuple[int, str], tuple[int, int]] = {}
    for matrix in matrices:
        name = re.sub(r"\[\d+\]$", "", matrix.name).removesuffix(".weight")
        match = _LAYER.search(name)
        key = (int(match[1]), name[match.end() :]) if match else (0, name)
        zeros, total = sums.get(key, (0, 0))
        sums[key] = (zeros + matrix.zeros, total + matrix.total)
    return sums


def short_names(projections: Sequence[str]) -> list[str]:
    """Return the last part of each name if it is unambiguous, else the whole name."""
    last = [name.rpartition(".")[2] for name in projections]
    return [
        short if last.count(short) == 1 else name
        for name, short in zip(projections, last, strict=True)
    ]
