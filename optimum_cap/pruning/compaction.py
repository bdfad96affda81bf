"""Compaction: removes parts that contribute exactly nothing because an earlier run zeroed them.

Channels of MLPs and experts, key/value heads with their query heads, and decoder layers are removed
in this order; each step builds a smaller model from the previous one and compares the two. Experts
stay, because one that returns zeros still takes tokens and routing weights from the others.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_cap.checkpoint import MatrixSparsity, PruningRecord, attach
from optimum_cap.models import (
    CannotRemoveError,
    KeptParts,
    ModelView,
    Site,
    adds_nothing,
    call_model,
    check_configs_can_be_saved,
    dead_channels,
    evaluation_mode,
    float32_on_cpu,
    has_lm_head,
    is_offloaded,
    kinds_of_layers,
    names_before,
    plain_model,
    smaller_config,
    smaller_model,
    zero_columns,
)
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.part_ranking import first_layers
from optimum_cap.pruning.parts import (
    check_agrees,
    check_layers_have_no_number,
    check_not_shared,
    groups_of_heads,
    kept_indices,
    made_up_example,
    mask_of_columns,
    mlps_by_width,
    step_of_channels,
    with_divided_mlps,
)

_LARGEST_DIFFERENCE = 1e-3  # of a token's logits; rounding errors add up over the layers
_SCALES = (1.0, 30.0)  # of random hidden states
_MLPS = {"expert": "experts", "mlp": "MLPs"}
"""Kind of site -> name of its channels."""


@dataclass(frozen=True)
class CompactedParts:
    """The parts of one kind that were found and removed.

    Attributes:
        part: `"channels"`, `"heads"` or `"layers"`.
        of: The modules they belong to, such as `"experts"`; empty for layers.
        before: Number of parts of each layer, or of layers.
        dead: The smallest and the largest number of parts in a layer that contribute nothing; for
            layers, their number twice.
        removed: Number of parts removed from each layer, or number of layers removed.
        reason: Why no more were removed, if some or all of those that contribute nothing stay.
        kept: Indices of the kept parts, by name of their module; empty if nothing was removed.
        parameters_before: Number of parameters of the model before this step.
        parameters_after: Number of parameters after it.
    """

    part: str
    of: str
    before: int
    dead: tuple[int, int]
    removed: int
    reason: str
    kept: dict[str, list[int]]
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class Compaction:
    """The result of `compact`.

    Attributes:
        model: The smaller model.
        parts: The parts found and removed, in the order of the steps.
        silent_experts: Number of experts that return zeros but stay.
        difference: Largest difference of a token's logits on a few made-up tokens, relative to
            their norm.
    """

    model: PreTrainedModel
    parts: list[CompactedParts]
    silent_experts: int
    difference: float


@dataclass(frozen=True)
class _Found:
    """Parts of one kind that contribute nothing.

    Attributes:
        before: Number of parts of each layer, or of layers.
        dead: Smallest and largest number of them in a layer.
        removed: How many are removed.
        kept: What is kept; `None` if nothing is removed.
        reason: Why no more of them are removed, if some stay; empty if none stays.
    """

    before: int
    dead: tuple[int, int]
    removed: int = 0
    kept: KeptParts | None = None
    reason: str = ""


def compact(model: PreTrainedModel) -> Compaction:
    """Remove parts that contribute exactly nothing because their weights are zero.

    These are channels of MLPs and experts that are multiplied by zeros, key/value heads whose query
    heads are, and decoder layers that add nothing to the hidden states. A config has one number for
    all layers, so every layer loses the same number of channels and heads.

    Args:
        model: A decoder-only model in memory, pruned by any tool; it is not changed.

    Returns:
        The smaller model, an ordinary one of the same class, and the removed parts. If `model` has
        a `pruning_record`, the smaller one has it too, with the removed parts in `compacted`, and
        is saved dense.

    Raises:
        CannotRemoveError: Nothing can be removed, or the smaller model computes something
            different; the message says why.
        ValueError: The model is offloaded, quantized, has adapters, or is not decoder-only.
        TypeError: `model` is not a transformers model.

    Example:
        ```python
        smaller = optimum_cap.compact(model).model
        smaller.save_pretrained("smaller")  # loads with any transformers
        ```
    """
    plain = plain_model(model, "compact")
    check_configs_can_be_saved(plain)
    kind = type(plain).__name__
    if is_offloaded(plain) or plain.device.type == "meta":
        raise ValueError(
            f"a smaller {kind} is built in memory, but weights of this one are offloaded: load it "
            "without offloading"
        )
    with evaluation_mode(plain):
        view = with_divided_mlps(plain)
        last, parts = _without_channels(view)
        for part, of, find in (("heads", "attention", _find_heads), ("layers", "", _find_layers)):
            last, found = _step(last, part, of, find)
            parts.append(found)
        smaller = last.model
        if smaller is plain:
            reasons = "; ".join(each.reason for each in parts)
            raise CannotRemoveError(
                f"nothing can be removed from this {kind} without changing what it computes "
                f"({reasons}): remove parts by their importance, with a pattern of CAPConfig"
            )
        difference = _difference_of_logits(plain, smaller)
    smaller.name_or_path = plain.name_or_path
    if hasattr(plain, "generation_config"):
        smaller.generation_config = copy.deepcopy(plain.generation_config)
    smaller.train(plain.training)
    if (record := getattr(plain, "pruning_record", None)) is not None:
        attach(smaller, _record_of_compacted(record, view, smaller, parts))
    silent = sum(site.expert is not None and adds_nothing(view, site) for site in view.sites)
    return Compaction(smaller, parts, silent, difference)


def _without_channels(view: ModelView) -> tuple[ModelView, list[CompactedParts]]:
    """Return a model without dead channels, and the findings for each kind of MLP.

    MLPs with the most channels come first. If experts and the MLPs next to them share one number in
    the config, they lose channels together.
    """
    last, parts = view, []
    groups = mlps_by_width(view.sites)
    for kind, width in sorted(groups, key=lambda key: key[1] * len(groups[key]), reverse=True):
        find = functools.partial(_find_channels, (kind,), width)
        last, found = _step(last, "channels", _MLPS[kind], find)
        parts.append(found)
    for width in (width for kind, width in groups if kind == "expert" and ("mlp", width) in groups):
        alone = [each for each in parts if each.before == width]
        if not any(each.removed for each in alone):
            find = functools.partial(_find_channels, tuple(_MLPS), width)
            last, found = _step(last, "channels", " and ".join(_MLPS.values()), find)
            if found.removed:
                parts = [*(each for each in parts if each not in alone), found]
    return last, parts


def _step(
    view: ModelView, part: str, of: str, find: Callable[[ModelView], _Found]
) -> tuple[ModelView, CompactedParts]:
    """Return a model without the parts of one kind that contribute nothing, if there are any."""
    model = view.model
    found, smaller, reason = _Found(0, (0, 0)), model, ""
    try:
        with float32_on_cpu(model):
            found = find(view)
        if found.kept is not None:
            config = smaller_config(model, view.sites, found.kept)
            smaller = smaller_model(model, view.sites, found.kept, config)
            with float32_on_cpu(model), float32_on_cpu(smaller):
                example = made_up_example(model)
                check_agrees(view, smaller, found.kept, example, part, lambda _: nullcontext())
    except CannotRemoveError as error:
        smaller, reason = model, error.reason
    is_smaller = smaller is not model and found.kept is not None
    return with_divided_mlps(smaller) if is_smaller else view, CompactedParts(
        part=part,
        of=of,
        before=found.before,
        dead=found.dead,
        removed=found.removed if is_smaller else 0,
        reason=reason or found.reason,
        kept=kept_indices(found.kept) if is_smaller and found.kept else {},
        parameters_before=model.num_parameters(),
        parameters_after=smaller.num_parameters(),
    )


def _find_channels(kinds: Sequence[str], width: int, view: ModelView) -> _Found:
    groups = mlps_by_width(view.sites)
    sites = [site for kind in kinds for site in groups[kind, width]]
    check_not_shared(view, sites)
    columns = torch.arange(width).unsqueeze(1)
    dead = dead_channels(view, sites)
    return _equal_numbers("channel", dead, dict.fromkeys(sites, columns), step_of_channels(width))


def _find_heads(view: ModelView) -> _Found:
    groups = groups_of_heads(view)
    check_not_shared(view, groups)
    dead = {
        site: zero_columns(view, site.output_proj)[columns].all(dim=1)
        for site, columns in groups.items()
    }
    return _equal_numbers("key/value head", dead, groups, 1)


def _equal_numbers(
    name: str,
    dead: Mapping[Site, torch.Tensor],
    columns: Mapping[Site, torch.Tensor],
    step: int,
) -> _Found:
    """Choose the first dead parts of each site, the same number in each; others stay.

    Args:
        name: Name of a part.
        dead: Mask of dead parts, bool `[parts]`.
        columns: The columns of each part, `[parts, size]`.
        step: The number of removed parts is a multiple of this.
    """
    counts = {site: int(of_site.sum()) for site, of_site in dead.items()}
    fewest = min(counts, key=lambda site: counts[site])
    least, most, before = counts[fewest], max(counts.values()), len(dead[fewest])
    removed = min(least, before - step) // step * step
    where = f"layer {fewest.layer}"
    if fewest.expert is not None:
        where = f"expert {fewest.expert} of {where}"
    number = f"{least:,} of {before:,} that are" if least else f"no {name} of {before:,} that is"
    reason = ""
    if least == before:
        reason = f"{step} of {before:,} {name}s have to stay"
    elif removed < max(most, 1):
        multiple = f", a multiple of {step}" if step > 1 else ""
        reason = (
            f"every layer must lose the same number of {name}s{multiple}, and {where} has {number} "
            "all zeros"
        )
    masks = {}
    for site, of_site in dead.items():
        parts = torch.ones(before, dtype=torch.bool)
        parts[of_site.nonzero()[:removed, 0]] = False
        masks[site] = mask_of_columns(columns[site], parts)
    kept = KeptParts(channels=masks) if removed else None
    return _Found(before, (least, most), removed, kept, reason)


def _find_layers(view: ModelView) -> _Found:
    before = len(view.layers)
    silent = _silent_layers(view)
    kinds = kinds_of_layers(view.model)
    removed = first_layers(silent, kinds, before)
    reason = ""
    if not silent:
        reason = f"none of the {before} layers adds nothing to the hidden states"
    elif len(removed) < len(silent):
        reason = f"one of the {before} layers has to stay"
        if len(set(kinds)) > 1:
            reason = f"one layer of each of the {len(set(kinds))} kinds has to stay"
    if not removed:
        return _Found(before, (len(silent),) * 2, reason=reason)
    check_layers_have_no_number(view.model)
    kept = KeptParts(layers=[layer for layer in range(before) if layer not in removed])
    return _Found(before, (len(silent),) * 2, len(removed), kept, reason)


def _silent_layers(view: ModelView) -> list[int]:
    """Return the layers that return their input hidden states unchanged.

    All of their output projections are zero, with their biases, and they add nothing else: on the
    model's hidden states and on random ones, their output is bit-identical to their input.
    """
    candidates = []
    for layer in range(len(view.layers)):
        sites = [site for site in view.sites if site.layer == layer]
        if sites and all(adds_nothing(view, site) for site in sites):
            candidates.append(layer)
    if not candidates:
        return []
    layerwise = LayerwisePass(view, [made_up_example(view.model)])
    [batch] = layerwise.batches
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch.hidden.shape, generator=generator).to(batch.hidden)
    tried = [batch.hidden, *(scale * noise for scale in _SCALES)]
    return [
        layer
        for layer in candidates
        if all(torch.equal(layerwise.run(layer, batch, hidden), hidden) for hidden in tried)
    ]


def _difference_of_logits(model: PreTrainedModel, smaller: PreTrainedModel) -> float:
    """Return the largest relative difference of a made-up token's logits, or hidden states.

    Raises:
        CannotRemoveError: It is more than rounding.
    """
    ids = made_up_example(model).input_ids[None]
    values = []
    for each in (model, smaller):
        with float32_on_cpu(each):
            output = call_model(each, ids.to(each.device))
            values.append(output.logits if has_lm_head(each) else output.last_hidden_state)
    expected, found = values
    scale = expected.norm(dim=-1).clamp_min(torch.finfo(expected.dtype).tiny)
    difference = float(((found - expected).norm(dim=-1) / scale).max())
    if not difference <= _LARGEST_DIFFERENCE:  # negated, so that NaN is refused
        raise CannotRemoveError(
            f"the {type(model).__name__} without what is zero would compute something else (a "
            f"relative difference of the logits of {difference:.2g}): use it as it is"
        )
    return difference


def _record_of_compacted(
    record: PruningRecord,
    dense: ModelView,
    smaller: PreTrainedModel,
    parts: list[CompactedParts],
) -> PruningRecord:
    """Return the record of the model before, with the removed parts and the remaining zeros.

    Args:
        record: The record.
        dense: The model before.
        smaller: The smaller model.
        parts: The removed parts.
    """
    layers = next((each.kept["layers"] for each in parts if "layers" in each.kept), None)
    name_before = names_before(dense.model, layers)
    before = {entry.name: entry for entry in record.matrices}
    zeros = sum(
        int((dense.weights(matrix) == 0).sum())
        for matrix in dense.matrices
        if matrix.name in before
    )
    view = ModelView.of(smaller)
    matrices = []
    for matrix in view.matrices:
        entry = before.get(name_before(matrix.name))
        if entry is not None:
            weight = view.weights(matrix)
            matrices.append(
                MatrixSparsity(matrix.name, int((weight == 0).sum()), weight.numel(), entry.tokens)
            )
    gone = zeros - sum(matrix.zeros for matrix in matrices)
    return dataclasses.replace(
        record,
        config={**record.config, "checkpoint_format": "dense"},
        matrices=matrices,
        zeros_after=None if record.zeros_after is None else max(0, record.zeros_after - gone),
        compacted=[*record.compacted, _recorded(parts)],
    )


def _recorded(parts: list[CompactedParts]) -> dict[str, Any]:
    """Return a record's entry about removed parts.

    No two steps remove parts of the same module, and layer indices change only in the last step, so
    all names and indices are those of the model before.
    """
    return {
        "parts": [
            {"part": each.part, "before": each.before, "after": each.before - each.removed}
            for each in parts
            if each.removed
        ],
        "kept": {name: indices for each in parts for name, indices in each.kept.items()},
        "parameters_before": parts[0].parameters_before,
        "parameters_after": parts[-1].parameters_after,
    }
