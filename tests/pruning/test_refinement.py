"""Refinement of pruned layers, against a plain implementation and on every kind of model."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.calibration import examples
from helpers.checkpoints import on_disk
from helpers.pruning_runs import pruned, weights
from helpers.tiny_models import tiny_model
from transformers import PreTrainedModel

from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.hooks import hidden_states_of, recorded_calls
from optimum_cap.models.modes import evaluation_mode
from optimum_cap.models.offload import weights as weights_of
from optimum_cap.models.offload import writable_weights
from optimum_cap.models.sites import matrices_by_layer
from optimum_cap.models.view import ModelView
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.first_batch import check_first_batch
from optimum_cap.pruning.refinement import LayerRefiner, Refinement, relative_errors


def without_small_ones_(model: PreTrainedModel, layer: int) -> None:
    for matrix in matrices_by_layer(find_sites(model))[layer]:
        weight = writable_weights(model, matrix)
        weight.masked_fill_(weight.abs() <= weights_of(model, matrix).abs().median(), 0)


def refined(
    model: PreTrainedModel, rows: list[CalibrationExample], passes: int = 3, rate: float = 2e-3
) -> list[Refinement]:
    """Halve the weights of all layers by magnitude, and refine each."""
    view = ModelView.of(model)
    results = []
    with evaluation_mode(model):
        layerwise = LayerwisePass(view, rows, most_examples=1)
        refiner = LayerRefiner(view, layerwise, passes, rate, seed=0)
        for index, matrices in view.matrices_by_layer.items():
            refiner.begin(index)
            without_small_ones_(model, index)
            results.append(refiner.refine_(index, matrices))
            layerwise.advance(index)
    return results


def outputs_of_layers(
    model: PreTrainedModel, rows: list[CalibrationExample]
) -> list[list[torch.Tensor]]:
    """The hidden states after each layer for each example, from forward passes of the model."""
    view = ModelView.of(model)
    layers = {str(index): layer for index, layer in enumerate(view.layers)}
    found = []
    for row in rows:
        with torch.no_grad(), recorded_calls(layers) as calls:
            model(input_ids=row.input_ids[None], use_cache=False)
        found.append([hidden_states_of(calls[name].output) for name in layers])
    return found


def test_hidden_states_come_closer_to_the_dense_ones(model: PreTrainedModel) -> None:
    rows = examples(12)
    results = refined(model, rows)
    assert all(result.error_after <= result.error_before for result in results)
    assert any(result.error_after < result.error_before for result in results)


def test_errors_are_those_of_the_whole_model(every_architecture: str) -> None:
    model = tiny_model(every_architecture)
    dense, rows = copy.deepcopy(model), examples(9)
    results = refined(model, rows)
    expected, found = outputs_of_layers(dense, rows), outputs_of_layers(model, rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    left_out = order[4:6]  # the third batch of two
    last = [relative_errors(found[i][-1], expected[i][-1]) for i in left_out]
    assert float(torch.cat(last).mean()) == pytest.approx(results[-1].error_after, rel=1e-3)


def test_equals_a_plain_implementation(llama: PreTrainedModel) -> None:
    rows = examples(8, longest=7)  # all of 6 tokens
    model, dense = copy.deepcopy(llama), llama
    refined(model, rows, passes=2)
    start = copy.deepcopy(dense)
    without_small_ones_(start, 0)
    order = np.random.default_rng([0, 0])
    lanes = [[0, 2, 6], [1, 3, 7]]  # the third pair is left out
    rates = {}
    optimizers: list[dict[str, Any]] = [{}, {}]
    for number in range(2):
        ends = []
        for lane, state in zip(lanes, optimizers, strict=True):
            own = copy.deepcopy(start)
            parameters = {n: p for n, p in own.model.layers[0].named_parameters() if "proj" in n}
            if not rates:
                rates = {n: p[p != 0].square().mean().sqrt().item() for n, p in parameters.items()}
            optimizer = torch.optim.Adam(
                [{"params": [p], "name": n} for n, p in parameters.items()],
                betas=(0.9, 0.95),
                eps=1e-12,
            )
            if state:
                optimizer.load_state_dict(state)
            for step, row in enumerate(order.permutation(lane).tolist(), start=3 * number):
                ids = rows[row].input_ids[None]
                target = dense.model(ids, output_hidden_states=True).hidden_states[1].detach()
                found = own.model(ids, output_hidden_states=True).hidden_states[1]
                loss = ((found - target).square().sum(-1) / target.square().sum(-1)).mean()
                optimizer.zero_grad()
                loss.backward()
                for group in optimizer.param_groups:
                    group["lr"] = 2e-3 * rates[group["name"]] * (1 - step / 6)
                    [parameter] = group["params"]
                    parameter.grad *= parameter != 0
                optimizer.step()
            state.update(copy.deepcopy(optimizer.state_dict()))
            ends.append(own.state_dict())
        start.load_state_dict({name: (ends[0][name] + ends[1][name]) / 2 for name in ends[0]})
    for name, parameter in start.model.layers[0].named_parameters():
        assert torch.allclose(model.model.layers[0].get_parameter(name), parameter, atol=1e-6)


def test_zeros_and_other_parameters_stay(model: PreTrainedModel) -> None:
    dense = copy.deepcopy(model)
    before: dict[str, torch.Tensor] = {}
    view = ModelView.of(model)
    prunable = {matrix.parameter for matrix in view.matrices}
    with evaluation_mode(model):
        layerwise = LayerwisePass(view, examples(8), most_examples=1)
        refiner = LayerRefiner(view, layerwise, 2, 2e-3, seed=0)
        refiner.begin(0)
        without_small_ones_(model, 0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        result = refiner.refine_(0, view.matrices_by_layer[0])
    of_layer = {matrix.parameter for matrix in view.matrices_by_layer[0]}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        if name in of_layer:
            assert torch.equal(parameter == 0, before[name] == 0)
        else:
            assert torch.equal(parameter, before[name])
        if name not in prunable:
            assert torch.equal(parameter, dense.get_parameter(name))
    changed = any(not torch.equal(model.get_parameter(name), before[name]) for name in of_layer)
    assert changed == (result.passes > 0)


def test_rates_that_diverge_leave_the_pruned_weights(llama: PreTrainedModel) -> None:
    expected = copy.deepcopy(llama)
    for result in refined(llama, examples(8), rate=1e4):
        assert result.passes == 0
        assert result.error_after == result.error_before
    for layer in range(3):
        without_small_ones_(expected, layer)
    assert weights(llama) == weights(expected)


@pytest.mark.parametrize("fields", [{}, {"sparsity": None, "pattern": "2:4"}, {"target": "dense"}])
def test_a_pruning_is_refined(llama: PreTrainedModel, fields: dict[str, Any]) -> None:
    fields = {"criterion": "sparsegpt", "num_samples": 16, **fields}
    plain = pruned(copy.deepcopy(llama), None, **fields)
    model = pruned(llama, None, refine=2, **fields)
    for matrix in ModelView.of(model).matrices:
        weight, unrefined = weights_of(model, matrix), weights_of(plain, matrix)
        assert (weight == 0).sum() == (unrefined == 0).sum()
        assert not torch.equal(weight, unrefined)
        if "pattern" in fields:
            assert ((weight.reshape(-1, 4) != 0).sum(dim=1) == 2).all()
    assert model.pruning_record.config["refine"] == 2


def test_half_precision_weights_are_refined_in_float32(llama: PreTrainedModel) -> None:
    model = pruned(llama.to(torch.bfloat16), None, criterion="wanda", num_samples=16, refine=3)
    plain = tiny_model("llama").to(torch.bfloat16)
    plain = pruned(plain, None, criterion="wanda", num_samples=16)
    assert weights(model) != weights(plain)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    first = ModelView.of(model).matrices[0]
    assert torch.equal(weights_of(model, first) == 0, weights_of(plain, first) == 0)


def test_offloaded_weights_give_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"criterion": "sparsegpt", "num_samples": 16, "refine": 2}
    expected = pruned(tiny_model("llama"), None, **options)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    model = pruned(on_disk(tmp_path / "model", tmp_path), None, **options)
    for matrix in ModelView.of(expected).matrices:
        assert torch.equal(weights_of(model, matrix), weights_of(expected, matrix))


@pytest.mark.parametrize("fields", [{"recipe": "causal_fast"}, {"criterion": "wanda", "refine": 1}])
def test_a_layer_without_gradients_is_refused(
    llama: PreTrainedModel, fields: dict[str, Any]
) -> None:
    before = weights(llama)
    attention = llama.model.layers[1]
    attention.forward = torch.no_grad()(attention.forward)
    with pytest.raises(
        ValueError, match=r"^layer 1 of Llama.* cannot be differentiated \(.*refine 0"
    ):
        pruned(llama, None, **fields)
    assert weights(llama) == before


def test_every_architecture_can_be_differentiated(every_architecture: str) -> None:
    view = ModelView.of(tiny_model(every_architecture))
    check_first_batch(view, examples(5), layer_by_layer=True, differentiate=True)


@pytest.mark.parametrize(("rate", "warned"), [(1e4, True), (2e-3, False)])
def test_refinement_in_vain_is_said(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture, rate: float, warned: bool
) -> None:
    options = {"criterion": "sparsegpt", "num_samples": 16, "refine_learning_rate": rate}
    pruned(llama, None, refine=2, **options)
    assert ("refinement improved 0 of 3 layers" in caplog.text) == warned
