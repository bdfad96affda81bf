"""`ModelView`: a model and its sites, used for scoring and pruning."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.models.architectures import decoder_layer_names, find_sites
from optimum_cap.models.experts import computes_experts, experts_layout
from optimum_cap.models.hooks import call_model, has_lm_head, recorded_calls
from optimum_cap.models.modes import float32_on_cpu
from optimum_cap.models.offload import device_of, onloaded, weights, writable_weights
from optimum_cap.models.sites import (
    Matrix,
    Site,
    SiteUnit,
    all_units,
    heads,
    is_transposed,
    layers_of_shared,
    matrices_by_layer,
    mixer_units,
    names_in_layers,
    oriented,
    prunable_matrices,
    stages_by_layer,
)


def number_of_embeddings(model: PreTrainedModel) -> int:
    """Return the number of tokens for which `model` has an embedding and, if any, a logit."""
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    return min(int(module.weight.shape[0]) for module in embeddings if module is not None)


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Return the maximum number of positions of `model`; `None` if its config does not say."""
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return longest if longest is not None and longest > 0 else None  # -1 in XLNet


def check_experts(view: "ModelView", matrices: Iterable[Matrix]) -> None:
    """Check that experts, with their own weights, compute what CAP assumes.

    One expert of each kind of experts module runs on a few tokens, in the module and separately.

    Args:
        view: The model.
        matrices: The matrices whose inputs are needed.

    Raises:
        ValueError: The results differ.
    """
    seen, modules = set(), {matrix.module for matrix in matrices}
    for site in view.sites:
        if site.expert != 0 or site.block not in modules:
            continue
        module = view.model.get_submodule(site.block)
        key = type(module), experts_layout(module)
        if key in seen:
            continue
        seen.add(key)
        with onloaded(module), float32_on_cpu(module):
            if not computes_experts(module):
                raise ValueError(
                    f"the experts of {type(view.model).__name__} ({type(module).__name__}) compute "
                    "something else than a gate between two products, so what reaches their "
                    f"matrices is unknown: leave them dense (modules_to_leave_dense=["
                    f"{site.block.rpartition('.')[2]!r}])"
                )


@dataclass(frozen=True, eq=False)
class ModelView:
    """A decoder-only model with its sites, units and matrices.

    Attributes:
        model: The model.
        sites: Its sites, layer by layer, in order of dependence.
    """

    model: PreTrainedModel
    sites: list[Site]

    @classmethod
    def of(cls, model: PreTrainedModel, mlp_unit_size: int | None = None) -> "ModelView":
        """Return a view of all sites of `model`.

        Args:
            model: A decoder-only model.
            mlp_unit_size: Channels per unit of a site without heads; `None` makes each one unit.

        Raises:
            ValueError: The architecture is not supported.
        """
        return cls(model, find_sites(model, mlp_unit_size))

    def with_sites(self, names: set[str]) -> "ModelView":
        """Return a view of all sites that mix tokens, and of the other sites with these names."""
        chosen = [site for site in self.sites if site.mixes_tokens or site.name in names]
        return replace(self, sites=chosen)

    @property
    def has_lm_head(self) -> bool:
        """Whether the model predicts tokens, unlike classifiers and reward models."""
        return has_lm_head(self.model)

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return [self.model.get_submodule(name) for name in decoder_layer_names(self.model)]

    @cached_property
    def output_templates(self) -> list[Any]:
        """An output of each decoder layer, which shows how hidden states are returned."""
        named = {str(index): layer for index, layer in enumerate(self.layers)}
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)  # one token is enough
        with recorded_calls(named) as calls:
            call_model(self.model, token)
        return [calls[name].output for name in named]

    @cached_property
    def matrices(self) -> list[Matrix]:
        """The prunable matrices, in the order of the model."""
        return prunable_matrices(self.sites)

    @property
    def matrices_by_layer(self) -> dict[int, list[Matrix]]:
        """The prunable matrices of each decoder layer."""
        return matrices_by_layer(self.sites)

    @cached_property
    def names_in_layers(self) -> dict[int, dict[str, str]]:
        """For each layer, its names of parameters that it shares with an earlier layer."""
        return names_in_layers(self.sites)

    @cached_property
    def layers_of_shared(self) -> dict[Matrix, list[int]]:
        """The layers of each matrix that is used in several, in order."""
        return layers_of_shared(self.sites)

    @property
    def stages_by_layer(self) -> dict[int, list[list[Matrix]]]:
        """The prunable matrices of each decoder layer, in the order in which they run."""
        return stages_by_layer(self.sites)

    @property
    def device(self) -> torch.device:
        """The device for the inputs of the model."""
        return device_of(self.model)

    def units(self, which: str = "all") -> list[SiteUnit]:
        """Return the units to score: `"all"`, or `"heads"` (and mixers without heads)."""
        return all_units(self.sites) if which == "all" else mixer_units(self.sites)

    @property
    def heads(self) -> list[SiteUnit]:
        """The heads, each with its site."""
        return heads(self.sites)

    def is_transposed(self, matrix: Matrix) -> bool:
        """Return whether a matrix is stored as `[in, out]`."""
        return is_transposed(self.model, matrix)

    def in_orientation(self, matrix: Matrix, values: torch.Tensor) -> torch.Tensor:
        """Transpose per-weight values from `[out, in]` to the matrix's storage order, or back."""
        return values.T if self.is_transposed(matrix) else values

    def oriented(self, matrix: Matrix) -> torch.Tensor:
        """Return a matrix as a view `[out, in]`; on the meta device if it is offloaded."""
        return oriented(self.model, matrix)

    def weights(self, matrix: Matrix) -> torch.Tensor:
        """Return the read-only weights of a matrix, `[out, in]`, loaded if offloaded."""
        return weights(self.model, matrix)

    def writable_weights(self, matrix: Matrix) -> torch.Tensor:
        """Return the weights of a matrix as a view `[out, in]` to change in place.

        Raises:
            OSError: There is not enough disk space for a copy of offloaded weights.
        """
        return writable_weights(self.model, matrix)
