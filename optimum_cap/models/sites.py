"""The parts of a model that can be masked and pruned: sites, units, regions and matrices."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_cap.models.experts import experts_layout

Range = tuple[int, int]
"""`(start, stop)`, as in a slice."""

MIXERS = ("attention", "mixer")
"""Kinds of sites whose output at a token depends on other tokens."""


@dataclass(frozen=True)
class WeightSlice:
    """A slice of one parameter along one dimension.

    Attributes:
        parameter: Name as in `model.named_parameters()`.
        dim: Dimension of the matrix (0 or 1) along which the range runs; the leading expert
            dimension of a 3-D parameter does not count.
        start: First index.
        stop: One past the last index.
        expert: Index into the leading dimension of a 3-D parameter, otherwise `None`.
    """

    parameter: str
    dim: int
    start: int
    stop: int
    expert: int | None = None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return this slice of `parameter`, as a view."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Unit:
    """A part of a site that can be masked: a head, or a group of channels of an MLP or expert.

    Attributes:
        index: Position among the units of the site.
        channels: Range of the inputs of the site's output projection.
        region: The weights that the unit uses. Under grouped-query attention, several units share
            key and value rows; in latent attention, all projections before the last ones belong to
            all units.
        separable: The part of the region that can be zeroed without affecting another unit. It
            excludes rows that are normalised over all heads at once (OLMoE), and keys and values
            that later layers read (Gemma 3n, Gemma 4).
    """

    index: int
    channels: Range
    region: tuple[WeightSlice, ...]
    separable: tuple[WeightSlice, ...] = ()


@dataclass(frozen=True)
class Site:
    """A token mixer (attention, state space or convolution), an MLP or one expert.

    Its units write to the residual stream through one output projection.

    Attributes:
        name: Path of the output projection; for an expert, with its index, as in `...down_proj[3]`.
        kind: `"attention"` if it mixes tokens and its units are heads, `"mixer"` if it mixes
            tokens and has no heads, `"mlp"` or `"expert"`.
        layer: Index of the decoder layer.
        layer_name: Path of the decoder layer.
        block: Path of the module that contains the projection; the path of the layer if there is
            none.
        width: Number of inputs of the output projection.
        units: The units, in the order of their channels; together they cover all channels.
        expert: Index of the expert, otherwise `None`.
        output_module: Path of the module that returns the output of the projection unchanged, or
            the sum over experts.
        level: Length of the longest chain of sites in the layer whose outputs it depends on.
        looks_ahead: Whether its output at a token depends on later tokens.
        depths: For each matrix, by parameter name, the length of the longest chain of prunable
            matrices in the layer that its input depends on.
        aliases: Names in this layer of parameters that it shares with an earlier layer and that are
            known by their name there (the transformer blocks of Zamba).
    """

    name: str
    kind: str
    layer: int
    layer_name: str
    block: str
    width: int
    units: tuple[Unit, ...]
    expert: int | None = None
    output_module: str = ""
    level: int = 0
    looks_ahead: bool = False
    depths: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    aliases: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def projection(self) -> str:
        """Path of the output projection, without an expert's index."""
        return self.name if self.expert is None else self.name.removesuffix(f"[{self.expert}]")

    @property
    def output_proj(self) -> "Matrix":
        """The matrix of the output projection."""
        return Matrix(self.units[0].region[0].parameter, self.expert)

    @property
    def mixes_tokens(self) -> bool:
        """Whether its output at a token depends on other tokens."""
        return self.kind in MIXERS

    @property
    def runs_alone(self) -> bool:
        """Whether its output module contains all of its matrices."""
        names = (self.aliases.get(name, name) for name in self.depths)
        return all(name.startswith(f"{self.output_module}.") for name in names)


class SiteUnit(NamedTuple):
    """A unit and its site."""

    site: Site
    unit: Unit


@dataclass(frozen=True)
class Matrix:
    """One prunable matrix: a parameter, or one expert of a 3-D parameter."""

    parameter: str
    expert: int | None = None

    @property
    def name(self) -> str:
        """Name of the parameter, with the index of the expert, as in `...down_proj[3]`."""
        return self.parameter if self.expert is None else f"{self.parameter}[{self.expert}]"

    @property
    def module(self) -> str:
        """Path of the module that uses it."""
        return self.parameter.rpartition(".")[0]

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the matrix, a 2-D view of `parameter`."""
        return parameter if self.expert is None else parameter[self.expert]


def prunable_matrices(sites: Iterable[Site]) -> list[Matrix]:
    """Return the matrices covered by the regions of `sites`, in the order of the model."""
    slices = (piece for site in sites for unit in site.units for piece in unit.region)
    return list(dict.fromkeys(Matrix(piece.parameter, piece.expert) for piece in slices))


def heads(sites: Iterable[Site]) -> list[SiteUnit]:
    """Return the heads among the units of `sites`, each with its site, in order."""
    return all_units(site for site in sites if site.kind == "attention")


def mixer_units(sites: Iterable[Site]) -> list[SiteUnit]:
    """Return the units of sites that mix tokens: heads, and whole mixers that have no heads."""
    return all_units(site for site in sites if site.mixes_tokens)


def all_units(sites: Iterable[Site]) -> list[SiteUnit]:
    """Return all units of `sites`, each with its site, in order."""
    return [SiteUnit(site, unit) for site in sites for unit in site.units]


def matrices_by_layer(sites: Iterable[Site]) -> dict[int, list[Matrix]]:
    """Return the prunable matrices of each decoder layer; shared ones belong to the first."""
    sites = list(sites)
    layers: dict[int, list[Matrix]] = {layer: [] for layer in sorted({s.layer for s in sites})}
    seen: set[Matrix] = set()
    for layer, own in layers.items():
        of_layer = prunable_matrices(site for site in sites if site.layer == layer)
        own += [matrix for matrix in of_layer if matrix not in seen]
        seen.update(own)
    return layers


def names_in_layers(sites: Iterable[Site]) -> dict[int, dict[str, str]]:
    """Return, for each layer, its names of parameters that it shares with an earlier layer."""
    names: dict[int, dict[str, str]] = {}
    for site in sites:
        if site.aliases:
            names.setdefault(site.layer, {}).update(site.aliases)
    return names


def layers_of_shared(sites: Iterable[Site]) -> dict[Matrix, list[int]]:
    """Return the layers of each matrix that is used in several, in order."""
    layers: dict[Matrix, list[int]] = {}
    for site in sites:
        for matrix in prunable_matrices([site]):
            of_matrix = layers.setdefault(matrix, [])
            if site.layer not in of_matrix:
                of_matrix.append(site.layer)
    return {matrix: of_matrix for matrix, of_matrix in layers.items() if len(of_matrix) > 1}


def stages_by_layer(sites: Iterable[Site]) -> dict[int, list[list[Matrix]]]:
    """Return the prunable matrices of each decoder layer in the order in which they run.

    The matrices of a stage do not depend on each other. In most models the stages are: input
    projections of the attention, its output projection, input projections of MLP or experts, their
    output projections.
    """
    sites = list(sites)
    stages: dict[int, list[list[Matrix]]] = {}
    for layer, layer_matrices in matrices_by_layer(sites).items():
        depths = {
            name: depth
            for site in sites
            if site.layer == layer
            for name, depth in site.depths.items()
        }
        by_depth: dict[int, list[Matrix]] = {}
        for matrix in layer_matrices:
            by_depth.setdefault(depths[matrix.parameter], []).append(matrix)
        stages[layer] = [by_depth[depth] for depth in sorted(by_depth)]
    return stages


def oriented(model: PreTrainedModel, matrix: Matrix) -> torch.Tensor:
    """Return the weights of a matrix as a view `[out, in]`, even if they are stored transposed."""
    weight = matrix.of(model.get_parameter(matrix.parameter).data)
    return weight.T if is_transposed(model, matrix) else weight


def is_transposed(model: PreTrainedModel, matrix: Matrix) -> bool:
    """Return whether a matrix is stored as `[in, out]`."""
    module = model.get_submodule(matrix.module)
    if matrix.expert is None:
        return isinstance(module, Conv1D)
    layout = experts_layout(module)
    return layout is not None and layout.transposed
