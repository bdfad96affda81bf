"""Selects the matrices to prune."""

import re

from transformers.utils import logging

from optimum_cap.config import PATTERN_PREFIX, CAPConfig
from optimum_cap.models import Matrix, ModelView, projections_left_dense
from optimum_cap.text import did_you_mean

_LM_HEAD = "lm_head"  # the name users give it, regardless of its name in the model
_SUGGESTED = 3
_NOTABLE_SHARE = 0.02  # of the linear weights of the decoder

logger = logging.get_logger(__name__)


def matrices_to_prune(view: ModelView, config: CAPConfig) -> list[Matrix]:
    """Return the prunable matrices, without those that stay dense.

    Entries of `modules_to_leave_dense` may also name modules that are never pruned.

    Raises:
        ValueError: An entry of `modules_to_leave_dense` matches no module of the model, or the
            entries leave nothing to prune.
    """
    leave_dense = config.modules_to_leave_dense
    matrices = view.matrices
    _check_entries(view, leave_dense)
    aliases = _all_names(view)
    chosen = [
        matrix
        for matrix in matrices
        if not any(
            _names(entry, name)
            for entry in leave_dense
            for name in aliases.get(matrix.parameter, [matrix.parameter])
        )
    ]
    if not chosen:
        raise ValueError(
            f"modules_to_leave_dense {leave_dense} leaves nothing to prune: leave fewer modules "
            "dense"
        )
    return chosen


def _all_names(view: ModelView) -> dict[str, list[str]]:
    """Return all names of parameters shared by several layers, by their first name."""
    names: dict[str, list[str]] = {}
    for of_layer in view.names_in_layers.values():
        for first, name in of_layer.items():
            names.setdefault(first, [first]).append(name)
    return names


def _names(entry: str, parameter: str) -> bool:
    """Return whether an entry of `modules_to_leave_dense` names the module of a parameter.

    Args:
        entry: Consecutive parts of a name; or `"re:"` and a regular expression that matches the
            beginning of the module's name, as in llm-compressor.
        parameter: Name of the parameter, or of a module.
    """
    if entry.startswith(PATTERN_PREFIX):
        module = parameter.removesuffix(".weight")
        return re.match(entry.removeprefix(PATTERN_PREFIX), module) is not None
    return f".{entry}." in f".{parameter}."


def _check_entries(view: ModelView, entries: list[str]) -> None:
    """Check that every entry names something in the model, prunable or not."""
    if not entries:
        return
    names = {_LM_HEAD, *(name for name, _ in view.model.named_modules())}
    names.update(name for name, _ in view.model.named_parameters())
    for entry in entries:
        if any(_names(entry, name) for name in names):
            continue
        problem = f"modules_to_leave_dense names {entry!r}, which matches no module of the model"
        near = _near(entry, names)
        if not near:
            near = f": use names such as {view.matrices[0].name}"
        if not entry.startswith(PATTERN_PREFIX) and re.search(r"[*^$|+?\\[(]", entry):
            near = f": regular expressions begin with {PATTERN_PREFIX!r}, as in 're:.*down_proj'"
        raise ValueError(problem + near)


def _near(entry: str, names: set[str]) -> str:
    """Return a suggestion of parts of module names similar to an entry."""
    literal = entry.removeprefix(PATTERN_PREFIX)
    if literal != entry:  # for a pattern, use the longest word
        literal = max(re.findall(r"\w+", literal), key=len, default="")
    length = literal.count(".") + 1
    parts: set[str] = set()
    for name in names:
        words = name.split(".")
        starts = range(len(words) - length + 1)
        parts.update(".".join(words[start : start + length]) for start in starts)
    return did_you_mean(literal, parts, _SUGGESTED)


def report_unsupported(view: ModelView, matrices: list[Matrix], strict: bool = False) -> None:
    """Log which linear weights of the decoder CAP cannot prune, as a warning if there are many.

    Args:
        view: The model.
        matrices: The matrices to prune.
        strict: Whether to refuse the model instead.

    Raises:
        ValueError: There are such weights, and `strict` is set.
    """
    left_dense = projections_left_dense(view, matrices)
    unsupported = [projection for projection in left_dense if not projection.prunable]
    if not unsupported:
        return
    weights = sum(projection.weights for projection in unsupported)
    total = sum(view.oriented(matrix).numel() for matrix in matrices)
    total += sum(projection.weights for projection in left_dense)
    names = ", ".join(f"{each.name} ({each.weights:,} weights)" for each in unsupported)
    if strict:
        raise ValueError(
            f"{type(view.model).__name__} has linear weights in its decoder that CAP cannot prune, "
            f"{weights / total:.1%} of all: {names}; leave out strict to prune the others"
        )
    log = logger.warning if weights / total >= _NOTABLE_SHARE else logger.info
    log(
        f"{weights / total:.1%} of the linear weights of the decoder stay dense, because CAP "
        f"cannot prune them in {type(view.model).__name__}: {names}; the sparsity is that of the "
        "other weights"
    )
