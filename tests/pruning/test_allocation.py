"""How many zeros each matrix gets."""

import pytest
import torch
from helpers.calibration import examples
from helpers.observed_inputs import observed_inputs
from helpers.tiny_models import tiny_model
from transformers import PreTrainedModel

from optimum_cap.config import CAPConfig
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.sites import matrices_by_layer, oriented
from optimum_cap.models.view import ModelView
from optimum_cap.pruning.allocation import Layers, owl, uniform


def layers_of(model: PreTrainedModel) -> Layers:
    return matrices_by_layer(find_sites(model))


def size(model: PreTrainedModel, layers: Layers, layer: int) -> int:
    return sum(oriented(model, matrix).numel() for matrix in layers[layer])


def test_uniform_gives_every_matrix_its_share(model: PreTrainedModel) -> None:
    layers = layers_of(model)
    total = sum(size(model, layers, layer) for layer in layers)
    given = uniform(ModelView.of(model), layers, 1234, [], CAPConfig(sparsity=0.3))
    assert sum(given.values()) == 1234
    for matrix, zeros in given.items():
        assert abs(zeros - 1234 * oriented(model, matrix).numel() / total) < 1


def with_outliers(architecture: str) -> PreTrainedModel:
    """A model whose middle layer has a few weights that are much larger than the others."""
    model = tiny_model(architecture)
    with torch.no_grad():
        for matrix in layers_of(model)[1]:
            oriented(model, matrix)[0, :2] *= 50
    return model


def test_owl_follows_its_definition(architecture: str) -> None:
    model, rows = with_outliers(architecture), examples(6)
    sites, layers = find_sites(model), layers_of(model)
    inputs = observed_inputs(model, rows)
    shares = []
    for matrices in layers.values():
        importances = [
            (oriented(model, m).double().abs() * inputs[m].square().mean(0).sqrt()).flatten()
            if len(inputs[m])
            else oriented(model, m).double().abs().flatten()
            for m in matrices
        ]
        every = torch.cat(importances)
        shares.append(float((every > 3 * every.mean()).double().mean()))
    sizes = [size(model, layers, layer) for layer in layers]
    density = [2 * 0.05 * (share - min(shares)) / (max(shares) - min(shares)) for share in shares]
    mean = sum(d * n for d, n in zip(density, sizes, strict=True)) / sum(sizes)
    zeros = round(0.4 * sum(sizes))

    config = CAPConfig(sparsity=0.4, recipe="owl_wanda", owl_outlier_ratio=3.0, owl_bound=0.05)
    given = owl(ModelView(model, sites), layers, zeros, rows, config)
    assert sum(given.values()) == zeros
    for matrices, n, d in zip(layers.values(), sizes, density, strict=True):
        found = sum(given[matrix] for matrix in matrices)
        assert found == pytest.approx((0.4 - (d - mean)) * n, abs=2)
        for matrix in matrices:
            expected = found * oriented(model, matrix).numel() / n
            assert abs(given[matrix] - expected) < 1


@pytest.mark.parametrize("sparsity", [0.01, 0.99])
def test_owl_stays_within_what_a_layer_has(sparsity: float) -> None:
    model = with_outliers("llama")
    layers = layers_of(model)
    total = sum(size(model, layers, layer) for layer in layers)
    zeros = round(sparsity * total)
    config = CAPConfig(sparsity=sparsity, recipe="owl_wanda", owl_bound=0.4)
    given = owl(ModelView.of(model), layers, zeros, examples(4), config)
    assert sum(given.values()) == zeros
    assert all(0 <= count <= oriented(model, matrix).numel() for matrix, count in given.items())


def test_owl_without_outliers_is_uniform(llama: PreTrainedModel) -> None:
    sites, layers, rows = find_sites(llama), layers_of(llama), examples(4)
    config = CAPConfig(sparsity=0.4, recipe="owl_wanda", owl_outlier_ratio=1e6)
    assert owl(ModelView(llama, sites), layers, 999, rows, config) == uniform(
        ModelView(llama, sites), layers, 999, rows, config
    )
