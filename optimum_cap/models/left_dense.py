"""Finds the linear weights of a decoder that pruning leaves dense."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_cap.models.architectures import decoder_of
from optimum_cap.models.layouts import registered_linear
from optimum_cap.models.sites import Matrix
from optimum_cap.models.view import ModelView

# Routers choose which experts run; they are small, and left dense on purpose.
_ROUTERS = re.compile(r"(^|\.)(gate|router|modality_router|shared_expert_gate)(\.|$)")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class DenseProjection:
    """A projection that stays dense, in all layers and experts that have it.

    Attributes:
        name: Path in the decoder layer, or in the decoder, without the indices of experts.
        weights: Number of its weights.
        prunable: Whether CAP can prune it, but the config leaves it dense.
    """

    name: str
    weights: int
    prunable: bool


def projections_left_dense(view: ModelView, pruned: Iterable[Matrix]) -> list[DenseProjection]:
    """Return the linear weights of the decoder that are not pruned, summed per projection.

    LM head, embeddings, norms, convolutions and routers stay dense on purpose and do not count.

    Args:
        view: The model.
        pruned: The matrices that are pruned.
    """
    prunable = {matrix.parameter for matrix in view.matrices}
    chosen = {matrix.parameter for matrix in pruned}
    layer_names = {site.layer_name for site in view.sites}
    decoder_name, decoder = decoder_of(view.model)
    head = view.model.get_output_embeddings()
    weights: dict[tuple[str, bool], int] = {}
    linear = (nn.Linear, Conv1D, *registered_linear())
    # Some models have a parameter in several layers; the first one gives it its name.
    names = {id(parameter): name for name, parameter in view.model.named_parameters()}
    counted: set[int] = set()
    for path, module in decoder.named_modules():
        if module is head:  # part of the decoder in Llama 4 with images
            continue
        full_path = ".".join(filter(None, (decoder_name, path)))
        for name, parameter in module.named_parameters(recurse=False):
            full_name = names.get(id(parameter), f"{full_path}.{name}")
            is_linear = isinstance(module, linear) and parameter.ndim == 2
            of_experts = parameter.ndim == 3 and not isinstance(module, _CONVOLUTIONS)
            if not (is_linear or of_experts) or full_name in chosen or _ROUTERS.search(path):
                continue
            if id(parameter) in counted:
                continue
            counted.add(id(parameter))
            key = _projection(full_name, layer_names, decoder_name), full_name in prunable
            weights[key] = weights.get(key, 0) + parameter.numel()
    return [
        DenseProjection(name, count, can_be_pruned)
        for (name, can_be_pruned), count in weights.items()
    ]


def _projection(parameter: str, layer_names: set[str], decoder_name: str) -> str:
    """Return the path of a projection in its layer, or in the decoder, without other indices."""
    name = parameter.removesuffix(".weight")
    parts = name.split(".")
    layers = (".".join(parts[:count]) for count in range(len(parts)))
    inside = next((layer for layer in layers if layer in layer_names), decoder_name)
    return re.sub(r"\.\d+(?=\.|$)", "", name.removeprefix(f"{inside}."))
