"""The parts that can be removed from a model, and checks of the smaller model."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from inspect import signature
from math import gcd
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_cap.data import CalibrationExample
from optimum_cap.models import (
    CannotRemoveError,
    KeptParts,
    ModelView,
    Site,
    WeightSlice,
    number_of_embeddings,
    share_that_differs,
)
from optimum_cap.pruning.activations import LayerwisePass

_CHANNELS = 8  # keep the number of channels a multiple of this, for kernels, if it is one already
_TRIED_TOKENS = 16
_PERIODS = (  # config fields that determine which layers are of another kind
    "decoder_sparse_step",
    "attn_layer_period",
    "expert_layer_period",
    "moe_layer_interval",
    "interleave_moe_layer_step",
)


def with_divided_mlps(model: PreTrainedModel) -> ModelView:
    """Return a view of a model with at least two units in every MLP and expert.

    Only then can the rows of a channel be observed.
    """
    widths = [site.width for site in ModelView.of(model).sites if not site.mixes_tokens]
    return ModelView.of(model, max(1, min(widths, default=2) // 2))


def step_of_channels(width: int) -> int:
    """Return the step by which the number of removed channels can vary."""
    return gcd(width, _CHANNELS)


def mlps_by_width(sites: Iterable[Site]) -> dict[tuple[str, int], list[Site]]:
    """Return the MLPs and the experts by their kind and number of channels."""
    groups: dict[tuple[str, int], list[Site]] = {}
    for site in sites:
        if not site.mixes_tokens:
            groups.setdefault((site.kind, site.width), []).append(site)
    return groups


def groups_of_heads(view: ModelView) -> dict[Site, torch.Tensor]:
    """Return the columns of the query heads of each key/value head, int64 `[groups, columns]`.

    Raises:
        CannotRemoveError: The model has no heads, a different number in some layers, or operations
            over all heads together.
    """
    kind = type(view.model).__name__
    groups: dict[Site, torch.Tensor] = {}
    for site in view.sites:
        if site.kind == "attention":
            if not _can_lose_heads(site):
                raise CannotRemoveError(
                    f"{kind} computes something of all heads of {site.block} together, so none of "
                    "them can be removed: choose another pattern"
                )
            units = _groups_that_share(site)
            columns = [range(*site.units[unit].channels) for of in units for unit in of]
            size = sum(map(len, columns)) // len(units)
            flat = torch.tensor([column for channels in columns for column in channels])
            groups[site] = flat.view(len(units), size)
    counts = {len(of_site) for of_site in groups.values()}
    if not counts:
        raise CannotRemoveError(
            f"{kind} has no heads that CAP knows, so none can be removed: choose pattern "
            "'channels' or 'layers'"
        )
    if len(counts) > 1:
        raise CannotRemoveError(
            f"the layers of {kind} have different numbers of key/value heads "
            f"({', '.join(map(str, sorted(counts)))}), but its config has one number: choose "
            "another pattern"
        )
    return groups


def _can_lose_heads(site: Site) -> bool:
    """Whether the rows of one head affect no other head.

    They do if the queries of all heads are normalised together (OLMoE).
    """
    users = Counter(piece for unit in site.units for piece in unit.region)
    return all(
        piece in unit.separable for unit in site.units for piece in unit.region if users[piece] == 1
    )


def _groups_that_share(site: Site) -> list[list[int]]:
    """Return the units of an attention site, grouped by shared rows of keys and values.

    Rows that all units share, as with a single key/value head, stay.
    """
    users: dict[WeightSlice, list[int]] = {}
    for unit in site.units:
        for piece in unit.region[1:]:
            users.setdefault(piece, []).append(unit.index)
    groups: set[tuple[int, ...]] = {(unit.index,) for unit in site.units}
    for units in users.values():
        if 1 < len(units) < len(site.units):
            groups = {group for group in groups if not set(group) & set(units)} | {tuple(units)}
    return [list(group) for group in sorted(groups)]


def mask_of_columns(columns: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Return the mask of kept columns, bool `[in]`, given the columns of parts, `[parts, size]`."""
    mask = torch.zeros(columns.numel(), dtype=torch.bool)
    mask[columns[parts].flatten()] = True
    return mask


def kept_indices(kept: KeptParts) -> dict[str, list[int]]:
    """Return the indices of kept parts by the name of their module, for the record."""
    if kept.layers is not None:
        return {"layers": list(kept.layers)}
    if kept.experts:
        return {block: list(experts) for block, experts in kept.experts.items()}
    return {site.name: mask.nonzero()[:, 0].tolist() for site, mask in kept.channels.items()}


def check_not_shared(view: ModelView, sites: Iterable[Site]) -> None:
    """Check that layers do not share the matrices that shrink.

    Raises:
        CannotRemoveError: Several layers share one.
    """
    for site in sites:
        if site.output_proj in view.layers_of_shared:
            raise CannotRemoveError(
                f"{site.name} runs in several layers of {type(view.model).__name__}, and what it "
                "loses would have to be the same in all of them: choose another pattern"
            )


def check_layers_have_no_number(model: PreTrainedModel) -> None:
    """Check that nothing refers to layers by distance or number.

    Raises:
        CannotRemoveError: The config describes layers by their distance, or the decoder adds
            features of images to the first ones.
    """
    decoder = model.get_decoder()
    if any(name.startswith("deepstack") for name in signature(decoder.forward).parameters):
        raise CannotRemoveError(
            f"{type(model).__name__} adds features of images to its first layers, so single layers "
            "cannot be removed: choose another pattern"
        )
    config = model.config.get_text_config(decoder=True)
    for name in _PERIODS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            raise CannotRemoveError(
                f"the config of {type(model).__name__} says by {name} {value} which layers are of "
                "another kind, so single layers cannot be removed: choose another pattern"
            )


def made_up_example(model: PreTrainedModel) -> CalibrationExample:
    """Return an example of a few tokens, for checks that need no data."""
    ids = torch.arange(1, _TRIED_TOKENS + 1) % number_of_embeddings(model)
    scored = torch.arange(_TRIED_TOKENS) > 0
    return CalibrationExample(ids, scored, source="made up", index=0, digest="")


def check_agrees(
    dense: ModelView,
    smaller: PreTrainedModel,
    kept: KeptParts,
    example: CalibrationExample,
    part: str,
    without_parts: Callable[[int], AbstractContextManager[Any]],
    tolerated: float = 0.0,
) -> None:
    """Check that a smaller model computes the same as the dense model without the parts.

    Args:
        dense: The dense model; both models are in evaluation mode.
        smaller: The smaller model.
        kept: The parts it keeps.
        example: The example to run both on.
        part: Name of the removed parts, for the error message.
        without_parts: Makes a layer of the dense model compute without the removed parts.
        tolerated: Share of hidden states that may differ.

    Raises:
        CannotRemoveError: It computes something different, or does not run.
    """
    kind = type(smaller).__name__
    try:
        differing = _share_that_differs(dense, ModelView.of(smaller), kept, example, without_parts)
    except (RuntimeError, IndexError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CannotRemoveError(
            f"{kind} does not run with {part} removed ({reason}): choose another pattern"
        ) from error
    if differing > tolerated:
        raise CannotRemoveError(
            f"{kind} with {part} removed computes something else than without them "
            f"({differing:.1%} of the hidden states differ): choose another pattern"
        )


def _share_that_differs(
    dense: ModelView,
    smaller: ModelView,
    kept: KeptParts,
    example: CalibrationExample,
    without_parts: Callable[[int], AbstractContextManager[Any]],
) -> float:
    """Return the share of hidden states that differ after any layer of the smaller model.

    Each of its layers receives the outputs of the preceding layers of the dense model.

    Raises:
        CannotRemoveError: Heads are removed, and layers share keys and values.
    """
    of_dense, of_smaller = LayerwisePass(dense, [example]), LayerwisePass(smaller, [example])
    [batch], [smaller_batch] = of_dense.batches, of_smaller.batches
    if batch.shared is not None and any(site.mixes_tokens for site in kept.channels):
        raise CannotRemoveError(
            f"layers of {type(dense.model).__name__} share keys and values, so they would have to "
            "lose the same heads: choose another pattern"
        )
    share, hidden = 0.0, batch.hidden
    layers = range(len(dense.layers)) if kept.layers is None else kept.layers
    for new, old in enumerate(layers):
        with without_parts(old):
            expected = of_dense.run(old, batch, hidden)
        found = of_smaller.run(new, smaller_batch, hidden)
        share = max(share, share_that_differs(found, expected))
        hidden = expected
    return share
