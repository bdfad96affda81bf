"""Channels that contribute exactly nothing for any input.

A channel of an MLP or an expert is dead if its column of the output projection is zero, or if the
input of this column is always zero: the weights and bias of one of its input projections (gate or
up) are zero, and the activation maps that to zero. Which input projections have this effect is
determined by trying random values for all others.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_cap.models.experts import experts_layout, gate
from optimum_cap.models.hooks import StopForwardError, call_model, first_argument, replaced_forward
from optimum_cap.models.sites import Matrix, Site, Unit, WeightSlice
from optimum_cap.models.view import ModelView, check_experts, longest_sequence

_TRIED_TOKENS = 64
_SCALE = 4.0  # of the random values; activations saturate well below it


def zero_columns(view: ModelView, matrix: Matrix) -> torch.Tensor:
    """Return which inputs of a matrix in memory are multiplied only by zeros, bool `[in]`."""
    return (view.weights(matrix) == 0).all(dim=0).cpu()


def adds_nothing(view: ModelView, site: Site) -> bool:
    """Return whether the output projection of a site, with its bias, is zero."""
    matrix = site.output_proj
    bias = _bias(view.model, matrix.parameter, matrix.expert)
    return bool(zero_columns(view, matrix).all()) and (bias is None or not bias.any())


def dead_channels(view: ModelView, sites: Iterable[Site]) -> dict[Site, torch.Tensor]:
    """Return which channels of MLPs and experts contribute exactly nothing, bool `[width]`.

    A channel counts as dead only if that is certain: some may be missed, but none is wrong.

    Args:
        view: The model in memory, in evaluation mode, with at least two units in each site.
        sites: MLPs and experts.
    """
    dead, always_zero = {}, {}
    for site in sites:
        dead[site] = zero_columns(view, site.output_proj)
        inputs = _zero_inputs(view.model, site)
        always_zero[site] = [zeros & ~dead[site] for zeros in inputs]
    with_zeros = [site for site, inputs in always_zero.items() if any(map(torch.any, inputs))]
    for place in range(max((len(always_zero[site]) for site in with_zeros), default=0)):
        chosen = [site for site in with_zeros if len(always_zero[site]) > place]
        for site, makes_zero in _makes_zero(view, chosen, place).items():
            dead[site] |= always_zero[site][place] & makes_zero
    return dead


def _zero_inputs(model: PreTrainedModel, site: Site) -> list[torch.Tensor]:
    """Return for each input projection (gate, up) in which channels it is zero, `[width]`."""
    count = min((len(unit.region) for unit in site.units), default=1) - 1
    zeros = [torch.zeros(site.width, dtype=torch.bool) for _ in range(count)]
    for place, of_place in enumerate(zeros):
        for unit in site.units:
            start, stop = unit.channels
            piece = unit.region[place + 1]
            if not _has_row_for_each(unit, piece):
                continue
            rows = piece.of(model.get_parameter(piece.parameter).data)
            of_rows = (rows == 0).all(dim=1 - piece.dim)
            bias = _bias(model, piece.parameter, piece.expert)
            if bias is not None:
                of_rows &= bias[piece.start : piece.stop] == 0
            of_place[start:stop] = of_rows.cpu()
    return zeros


def _bias(model: PreTrainedModel, parameter: str, expert: int | None) -> torch.Tensor | None:
    """Return the bias of a matrix, `[out]`; `None` if it has none."""
    path, _, name = parameter.rpartition(".")
    module = model.get_submodule(path)
    if expert is None:
        return getattr(module, "bias", None)
    bias = getattr(module, f"{name}_bias", None)
    return None if bias is None else bias[expert]


def _makes_zero(view: ModelView, sites: list[Site], place: int) -> dict[Site, torch.Tensor]:
    """Return the channels in which zero at one input gives zero, for any other inputs.

    Args:
        view: The model.
        sites: MLPs and experts.
        place: The input, as a position in the regions of the units, from 0.

    Returns:
        bool `[width]` for the sites where this was observed.
    """
    found = {}
    generator = torch.Generator().manual_seed(0)
    of_experts = [site for site in sites if site.expert is not None]
    with suppress(ValueError):  # these are not gates between two products: conclude nothing
        check_experts(view, [site.output_proj for site in of_experts])
        for site in of_experts:
            found[site] = _makes_zero_in_expert(view.model, site, place, generator)
    others = [site for site in sites if site.expert is None]
    return found | (_makes_zero_in_mlps(view, others, place, generator) if others else {})


def _makes_zero_in_expert(
    model: PreTrainedModel, site: Site, place: int, generator: torch.Generator
) -> torch.Tensor:
    module = model.get_submodule(site.block)
    layout = experts_layout(module)
    assert layout is not None
    weight = model.get_parameter(site.output_proj.parameter)
    projected = _random(torch.Size((_TRIED_TOKENS,)), layout.rows, generator).to(weight)
    for piece in _pieces(site, place):
        projected[:, piece.start : piece.stop] = 0
    zero: torch.Tensor = gate(module, projected) == 0
    return zero.all(dim=0).cpu()


def _makes_zero_in_mlps(
    view: ModelView, sites: list[Site], place: int, generator: torch.Generator
) -> dict[Site, torch.Tensor]:
    """Return the same for MLPs, from a run of the model with random input projections."""
    found: dict[Site, torch.Tensor] = {}
    zeroed: dict[str, list[WeightSlice]] = {}
    for site in sites:
        for piece in (each for unit in site.units for each in unit.region[1:]):
            zeroed.setdefault(piece.parameter, [])
        for piece in _pieces(site, place):
            zeroed[piece.parameter].append(piece)

    def projected(parameter: str, pieces: list[WeightSlice]) -> Callable[..., torch.Tensor]:
        rows = view.oriented(Matrix(parameter)).shape[0]

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            hidden = first_argument(args, kwargs)
            values = _random(hidden.shape[:-1], rows, generator).to(hidden)
            for piece in pieces:
                values[..., piece.start : piece.stop] = 0
            return values

        return forward

    def observed(site: Site) -> Callable[..., torch.Tensor]:
        rows = view.oriented(site.output_proj).shape[0]

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            hidden = first_argument(args, kwargs)
            zero = (hidden == 0).flatten(0, -2).all(dim=0).cpu()
            found[site] = found.get(site, torch.ones_like(zero)) & zero
            if len(found) == len(sites):
                raise StopForwardError
            return hidden.new_zeros(*hidden.shape[:-1], rows)

        return forward

    with ExitStack() as stack:
        for parameter, pieces in zeroed.items():
            module = view.model.get_submodule(Matrix(parameter).module)
            stack.enter_context(replaced_forward(module, projected(parameter, pieces)))
        for site in sites:
            module = view.model.get_submodule(site.projection)
            stack.enter_context(replaced_forward(module, observed(site)))
        stack.enter_context(suppress(StopForwardError))
        count = min(_TRIED_TOKENS, longest_sequence(view.model) or _TRIED_TOKENS)
        call_model(view.model, torch.ones(1, count, dtype=torch.long, device=view.device))
    return found


def _pieces(site: Site, place: int) -> list[WeightSlice]:
    """Return the rows of one input projection, where there is a row for each channel."""
    return [
        piece
        for unit in site.units
        for piece in unit.region[place + 1 : place + 2]
        if _has_row_for_each(unit, piece)
    ]


def _has_row_for_each(unit: Unit, piece: WeightSlice) -> bool:
    start, stop = unit.channels
    return piece.stop - piece.start == stop - start


def _random(shape: torch.Size, width: int, generator: torch.Generator) -> torch.Tensor:
    return _SCALE * torch.randn(*shape, width, generator=generator)
