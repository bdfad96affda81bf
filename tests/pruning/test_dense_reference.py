"""What outputs miss, against two full forward passes: of a dense copy and of a pruned one."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.calibration import examples
from helpers.checkpoints import on_disk, saved
from helpers.observed_inputs import observed_inputs
from helpers.tiny_models import SHARED_EXPERTS, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.methods.statistics import InputStatistics
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.hooks import hidden_states_of, recorded_calls
from optimum_cap.models.modes import evaluation_mode
from optimum_cap.models.offload import writable_weights
from optimum_cap.models.sites import Matrix, matrices_by_layer, oriented, stages_by_layer
from optimum_cap.models.view import ModelView
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.dense_reference import DenseReferencePass


def without_small_ones(weight: torch.Tensor) -> torch.Tensor:
    return weight * (weight.abs() > weight.abs().median())


def layerwise_statistics(
    model: PreTrainedModel, rows: list[CalibrationExample], prune: bool = True, **options: Any
) -> dict[Matrix, InputStatistics]:
    """Prune all stages of a model one after the other; statistics just before each is pruned."""
    sites = find_sites(model)
    found: dict[Matrix, InputStatistics] = {}
    with evaluation_mode(model):
        layerwise = DenseReferencePass(ModelView(model, sites), rows, **options)
        for layer, stages in stages_by_layer(sites).items():
            layerwise.begin(layer)
            for stage in stages:
                found |= layerwise.statistics(layer, stage)
                for matrix in stage if prune else ():
                    weight = writable_weights(model, matrix)
                    weight.copy_(without_small_ones(weight))
            layerwise.advance(layer)
    return found


def pruned_before(dense: PreTrainedModel, stage: list[Matrix]) -> PreTrainedModel:
    """A copy of a model in which everything that runs before a stage is pruned."""
    model = copy.deepcopy(dense)
    for stages in stages_by_layer(find_sites(model)).values():
        for own in stages:
            if own == stage:
                return model
            for matrix in own:
                weight = oriented(model, matrix)
                weight.copy_(without_small_ones(weight))
    raise AssertionError("no such stage")


class Passes:
    """A full forward pass per example, without padding, with what some modules got and gave."""

    def __init__(
        self, model: PreTrainedModel, rows: list[CalibrationExample], paths: Iterable[str]
    ) -> None:
        modules = {path: model.get_submodule(path) for path in dict.fromkeys(paths)}
        self._calls = []
        for row in rows:
            with torch.no_grad(), recorded_calls(modules) as calls:
                model(input_ids=row.input_ids[None], use_cache=False)
            self._calls.append(calls)

    def given(self, path: str) -> torch.Tensor:
        """Hidden states that a module got, `[tokens, width]`."""
        return torch.cat([calls[path].hidden.flatten(0, -2) for calls in self._calls])

    def returned(self, path: str) -> torch.Tensor:
        """Hidden states that a module gave, `[tokens, width]`."""
        return torch.cat(
            [hidden_states_of(calls[path].output).flatten(0, -2) for calls in self._calls]
        )

    def argument(self, path: str, place: int) -> torch.Tensor:
        """Another argument, `[tokens, ...]`."""
        return torch.cat([calls[path].args[place] for calls in self._calls])


def routed_input(model: PreTrainedModel, matrix: Matrix, hidden: torch.Tensor) -> torch.Tensor:
    """Input of an expert's matrix, as Mixtral computes it."""
    if matrix.parameter.endswith("gate_up_proj"):
        return hidden
    gate_up = model.get_parameter(matrix.parameter.replace("down_proj", "gate_up_proj"))
    gate, up = (hidden @ gate_up[matrix.expert].T).chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def by_definition(
    dense: PreTrainedModel, stage: list[Matrix], rows: list[CalibrationExample]
) -> dict[Matrix, torch.Tensor]:
    """Sum of e_i x_j, where e is what a matrix's outputs lack, and the stream where it joins."""
    pruned = pruned_before(dense, stage)
    sites = find_sites(dense)
    output_proj = {site.output_proj: site for site in sites}
    layer = next(s for s in sites if stage[0].parameter.startswith(f"{s.layer_name}."))
    attention = next(s for s in sites if s.layer == layer.layer and s.kind == "attention")
    paths = [matrix.module for matrix in stage] + [layer.layer_name, attention.output_module]
    of_dense, of_pruned = (Passes(model, rows, paths) for model in (dense, pruned))
    found = {}
    for matrix in stage:
        weight = oriented(dense, matrix)
        wanted, x = of_dense.given(matrix.module), of_pruned.given(matrix.module)
        tokens, shares = torch.arange(len(x)), torch.ones(len(x))
        total = torch.ones(len(x))
        if matrix.expert is not None:
            chosen, routing = (of_pruned.argument(matrix.module, place) for place in (0, 1))
            tokens, slots = (chosen == matrix.expert).nonzero(as_tuple=True)
            shares, total = routing[tokens, slots], routing[tokens].sum(dim=1)
            wanted, x = (
                routed_input(model, matrix, hidden[tokens])
                for model, hidden in ((dense, wanted), (pruned, x))
            )
        errors = (wanted - x) @ weight.T
        if matrix in output_proj:
            site = output_proj[matrix]
            lost = of_dense.given(layer.layer_name) - of_pruned.given(layer.layer_name)
            if site.level > attention.level:
                lost += of_dense.returned(attention.output_module) - of_pruned.returned(
                    attention.output_module
                )
            # Sites that run side by side share what is lost before them.
            beside = {
                s.output_module for s in sites if (s.layer, s.level) == (site.layer, site.level)
            }
            errors = errors + lost[tokens] / total[:, None] / len(beside)
        found[matrix] = (errors * shares.square()[:, None]).T @ x
    return found


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "gpt2", "gpt_neox", "opt"])
def test_missing_is_what_two_full_passes_show(name: str) -> None:
    dense, rows = tiny_model(name), examples(5)
    found = layerwise_statistics(copy.deepcopy(dense), rows)
    stages = [stage for stages in stages_by_layer(find_sites(dense)).values() for stage in stages]
    with torch.no_grad():
        for stage in stages:
            for matrix, expected in by_definition(dense, stage, rows).items():
                scale = float(expected.abs().max())
                missing = found[matrix].output_error_moment
                torch.testing.assert_close(missing, expected, rtol=1e-3, atol=1e-3 * scale + 1e-4)
    # Nothing is missing before anything is pruned; later it is much more than the tolerance.
    assert all(found[matrix].output_error_moment.abs().max() < 1e-3 for matrix in stages[0])
    assert all(
        found[m].output_error_moment.abs().max() > 1 for m in stages[-1] if found[m].tokens > 4
    )


def test_nothing_is_missing_of_a_model_that_is_not_pruned(model: PreTrainedModel) -> None:
    found = layerwise_statistics(model, examples(4), prune=False)
    assert found
    for matrix, statistics in found.items():
        assert float(statistics.output_error_moment.abs().max()) < 1e-3, matrix


def test_both_models_reach_their_own_end(model: PreTrainedModel) -> None:
    """Where later layers read keys and values of earlier ones, each model reads its own."""
    dense, rows = copy.deepcopy(model), examples(5)
    with evaluation_mode(model):
        layerwise = DenseReferencePass(ModelView.of(model), rows)
        for layer, matrices in matrices_by_layer(find_sites(model)).items():
            layerwise.begin(layer)
            for matrix in matrices:
                weight = writable_weights(model, matrix)
                weight.copy_(without_small_ones(weight))
            layerwise.advance(layer)
        [batch] = layerwise.batches
        last = {"last": layerwise.layers[-1]}, {"last": ModelView.of(dense).layers[-1]}
        ends = batch.hidden, layerwise._dense_hidden[0]
        for each, modules, end in zip((model, dense), last, ends, strict=True):
            with recorded_calls(modules) as calls:
                each(input_ids=batch.batch.input_ids, use_cache=False)
            expected = hidden_states_of(calls["last"].output)
            torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*ends, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", SHARED_EXPERTS)
def test_shared_experts_run_layer_by_layer_too(name: str) -> None:
    model = tiny_model(name)
    found = layerwise_statistics(model, examples(5))
    assert found
    assert all(statistics.output_error_moment.isfinite().all() for statistics in found.values())


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_experts_tokens_weigh_by_the_square_of_their_routing(weight: float) -> None:
    model, rows = tiny_model("mixtral"), examples(5)
    found = layerwise_statistics(model, rows, prune=False, answer_weight=weight)
    factor = torch.cat([1 + weight * predicts(row) for row in rows])
    paths = [matrix.module for matrix in found if matrix.expert is not None]
    assert paths
    passes = Passes(model, rows, paths)
    for matrix, statistics in found.items():
        if matrix.expert is None:
            continue
        chosen, routing = (passes.argument(matrix.module, place) for place in (0, 1))
        tokens, slots = (chosen == matrix.expert).nonzero(as_tuple=True)
        x = routed_input(model, matrix, passes.given(matrix.module)[tokens])
        weights = routing[tokens, slots].square() * factor[tokens]
        assert statistics.tokens == len(tokens)
        torch.testing.assert_close(
            statistics.gram, (x * weights[:, None]).T @ x, rtol=1e-4, atol=1e-4
        )


def predicts(row: CalibrationExample) -> torch.Tensor:
    """1 where a token is scored or predicts one that is, else 0."""
    found = row.scored.clone()
    found[:-1] |= row.scored[1:]
    return found.float()


@pytest.mark.parametrize("kind", [LayerwisePass, DenseReferencePass])
def test_answers_weigh_more(kind: type[LayerwisePass], model: PreTrainedModel) -> None:
    rows, sites = examples(6), find_sites(model)
    expected = observed_inputs(model, rows)
    factor = torch.cat([1 + 2.5 * predicts(row) for row in rows]).double()
    with evaluation_mode(model):
        layerwise = kind(ModelView(model, sites), rows, 2.5)
        for layer, matrices in matrices_by_layer(sites).items():
            layerwise.begin(layer)
            found = layerwise.statistics(layer, matrices, gram=True)
            layerwise.advance(layer)
            for matrix, statistics in found.items():
                if matrix.expert is not None:  # experts see a part of the tokens
                    continue
                x = expected[matrix]
                gram = (x * factor[:, None]).T @ x
                assert statistics.tokens == len(x)
                atol = 1e-5 * float(gram.abs().max()) + 1e-4
                torch.testing.assert_close(statistics.gram.double(), gram, rtol=1e-4, atol=atol)
                torch.testing.assert_close(statistics.squares, statistics.gram.diagonal())


@pytest.mark.parametrize(
    ("name", "joining"),
    [
        ("llama", {"self_attn", "mlp"}),
        ("mixtral", {"self_attn", "mlp.experts"}),
        ("gpt_neox", {"attention", "mlp"}),
        ("gpt2", {"attn", "mlp"}),
        ("opt", {"self_attn", "fc2"}),
        ("gemma2", set()),
        ("gemma3", set()),
    ],
)
def test_outputs_join_the_residual_stream_directly(name: str, joining: set[str]) -> None:
    model = tiny_model(name)
    with evaluation_mode(model):
        layerwise = DenseReferencePass(ModelView.of(model), examples(4))
        layerwise.begin(0)
        prefix = f"{find_sites(model)[0].layer_name}."
        assert layerwise.joining_modules(0) == {prefix + path for path in joining}


def test_behind_a_norm_the_streams_loss_is_not_added() -> None:
    dense, rows = tiny_model("gemma2"), examples(5)
    found = layerwise_statistics(copy.deepcopy(dense), rows)
    output_proj = Matrix("model.layers.2.mlp.down_proj.weight")
    stage = next(own for own in stages_by_layer(find_sites(dense))[2] if output_proj in own)
    with torch.no_grad():
        wanted, x = (
            Passes(model, rows, [output_proj.module]).given(output_proj.module)
            for model in (dense, pruned_before(dense, stage))
        )
        expected = ((wanted - x) @ oriented(dense, output_proj).T).T @ x
    torch.testing.assert_close(
        found[output_proj].output_error_moment, expected, rtol=1e-3, atol=1e-3
    )


def test_weights_are_where_they_belong_afterwards(model: PreTrainedModel) -> None:
    """The pruned ones in the parameters that there were, the others as they were."""
    parameters = dict(model.named_parameters())
    expected = copy.deepcopy(model)
    for own in matrices_by_layer(find_sites(expected)).values():
        for matrix in own:
            weight = oriented(expected, matrix)
            weight.copy_(without_small_ones(weight))
    storage = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    layerwise_statistics(model, examples(3))
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.data_ptr() == storage[name]
        assert torch.equal(parameter, expected.get_parameter(name)), name
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_an_offloaded_model_gives_the_same(name: str, tmp_path: Path) -> None:
    folder, rows = saved(tmp_path / "model", name), examples(5)
    expected = layerwise_statistics(AutoModelForCausalLM.from_pretrained(folder), rows)
    found = layerwise_statistics(on_disk(folder, tmp_path / "offload"), rows)
    for matrix, statistics in expected.items():
        assert torch.equal(found[matrix].output_error_moment, statistics.output_error_moment), (
            matrix
        )
        assert torch.equal(found[matrix].gram, statistics.gram), matrix


def test_a_matrix_that_does_not_run_is_an_error(llama: PreTrainedModel) -> None:
    sites = find_sites(llama)
    llama.model.layers[0].mlp.forward = lambda hidden: hidden
    with evaluation_mode(llama):
        layerwise = DenseReferencePass(ModelView(llama, sites), examples(3))
        layerwise.begin(0)
        with pytest.raises(ValueError, match=r"did not run model\.layers\.0\.mlp\.down_proj, so t"):
            layerwise.statistics(0, stages_by_layer(sites)[0][-1])


def test_statistics_may_be_asked_for_again(llama: PreTrainedModel) -> None:
    sites, rows = find_sites(llama), examples(4)
    with evaluation_mode(llama):
        layerwise = DenseReferencePass(ModelView(llama, sites), rows)
        layerwise.begin(0)
        stage = stages_by_layer(sites)[0][-1]
        first, second = (layerwise.statistics(0, stage)[stage[0]] for _ in range(2))
        layerwise.advance(0)
        layerwise.begin(1)
        layerwise.statistics(1, stages_by_layer(sites)[1][0])
    assert torch.equal(first.gram, second.gram)
