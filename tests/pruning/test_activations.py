"""Statistics of the inputs, layer by layer, against what an ordinary forward pass multiplies."""

import pytest
import torch
from helpers.calibration import examples
from helpers.observed_inputs import observed_inputs
from helpers.tiny_models import tiny_model
from transformers import PreTrainedModel

from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.methods.statistics import InputStatistics
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.sites import Matrix, matrices_by_layer
from optimum_cap.models.view import ModelView
from optimum_cap.pruning.activations import LayerwisePass


def layerwise_statistics(
    model: PreTrainedModel, rows: list[CalibrationExample], gram: bool, advance: bool = False
) -> dict[Matrix, InputStatistics]:
    sites = find_sites(model)
    found: dict[Matrix, InputStatistics] = {}
    with torch.no_grad():
        layerwise = LayerwisePass(ModelView(model, sites), rows)
        for layer, matrices in matrices_by_layer(sites).items():
            found |= layerwise.statistics(layer, matrices, gram, advance)
            if not advance:
                layerwise.advance(layer)
    return found


@pytest.mark.parametrize("advance", [False, True])
def test_statistics_are_those_of_the_inputs(model: PreTrainedModel, advance: bool) -> None:
    rows = examples(9)
    expected = observed_inputs(model, rows)
    found = layerwise_statistics(model, rows, gram=True, advance=advance)
    assert set(found) == set(expected)
    for matrix, inputs in expected.items():
        statistics = found[matrix]
        assert statistics.tokens == len(inputs), matrix
        gram, squares = inputs.T @ inputs, inputs.square().sum(0)
        # Sums of products of either sign round as the largest products do.
        options = {"rtol": 1e-4, "atol": 1e-5 * squares.max().item()}
        torch.testing.assert_close(statistics.gram.double(), gram, **options)
        torch.testing.assert_close(statistics.squares.double(), squares, **options)
    assert sum(len(inputs) for inputs in expected.values()) > 0


def test_squares_alone_are_the_same(model: PreTrainedModel) -> None:
    rows = examples(5)
    with_gram, without = (
        layerwise_statistics(model, rows, gram=True),
        layerwise_statistics(model, rows, gram=False),
    )
    assert without.keys() == with_gram.keys() != set()
    for matrix, statistics in without.items():
        assert statistics.gram is None
        torch.testing.assert_close(statistics.squares, with_gram[matrix].squares)


def test_long_examples_come_in_several_batches() -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    generator = torch.Generator().manual_seed(0)
    rows = [
        CalibrationExample(
            torch.randint(4, 60, (length,), generator=generator),
            torch.ones(length, dtype=torch.bool),
            "random",
            index,
            "",
        )
        for index, length in enumerate((900, 1100, 30))
    ]
    expected, found = observed_inputs(model, rows), layerwise_statistics(model, rows, gram=False)
    for matrix, inputs in expected.items():
        assert found[matrix].tokens == 2030
        torch.testing.assert_close(
            found[matrix].squares.double(), inputs.square().sum(0), rtol=1e-4, atol=1e-3
        )


def test_later_layers_see_what_was_changed_before(model: PreTrainedModel) -> None:
    rows, sites = examples(5), find_sites(model)
    layers = matrices_by_layer(sites)
    with torch.no_grad():
        layerwise = LayerwisePass(ModelView(model, sites), rows)
        for matrix in layers[0]:
            matrix.of(model.get_parameter(matrix.parameter)).mul_(0.5)
        layerwise.advance(0)
        found = layerwise.statistics(1, layers[1])
    expected = observed_inputs(model, rows)
    for matrix, statistics in found.items():
        torch.testing.assert_close(
            statistics.squares.double(), expected[matrix].square().sum(0), rtol=1e-4, atol=1e-4
        )


def test_the_model_comes_back_as_it_was(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layerwise_statistics(model, examples(3), gram=True)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
