"""Which experts and layers are removed, against plain computations."""

import pytest
import torch
from helpers.calibration import examples
from helpers.tiny_models import tiny_model
from transformers import PreTrainedModel

from optimum_cap import CAPConfig
from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.models import (
    CannotRemoveError,
    ModelView,
    Router,
    bypass_layers,
    call_model,
    evaluation_mode,
    expert_output,
    gated,
    recorded_calls,
)
from optimum_cap.pruning import PartRemoval, part_ranking
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.part_ranking import EXPERT_SCORES, experts_to_remove, layers_to_remove
from optimum_cap.pruning.sensitivity import DivergenceEvaluator
from optimum_cap.runtime import ALONE

ROWS = examples(6)


def routers_of(model: PreTrainedModel) -> dict[int, Router]:
    sites = ModelView.of(model).sites
    blocks = {site.layer: site.block for site in sites if site.expert is not None}
    return {layer: Router(model, block) for layer, block in blocks.items()}


def removed(
    model: PreTrainedModel, criterion: str, count: int = 1, groups: int = 1, **fields: object
) -> dict[int, list[int]]:
    config = CAPConfig(0.25, pattern="experts", criterion=criterion, **fields)
    return experts_to_remove(ModelView.of(model), routers_of(model), ROWS, count, groups, config)


def predictions(model: PreTrainedModel, row: CalibrationExample) -> torch.Tensor:
    logits = call_model(model, row.input_ids[None]).logits[0, :-1]
    return logits[row.scored[1:]].double().log_softmax(dim=-1)


def divergence(model: PreTrainedModel, dense: list[torch.Tensor]) -> float:
    of_rows = [
        float((log.exp() * (log - predictions(model, row))).sum(dim=-1).mean())
        for log, row in zip(dense, ROWS, strict=True)
    ]
    return sum(of_rows) / len(of_rows)


def test_reap_is_the_mean_weighted_norm_over_routed_tokens() -> None:
    model = tiny_model("mixtral").eval()
    block = model.model.layers[0].mlp
    sums, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(4)
    with torch.no_grad():
        for row in ROWS:
            with recorded_calls({"block": block}) as calls:
                call_model(model, row.input_ids[None])
            for token in calls["block"].hidden[0]:
                probabilities = (block.gate.weight @ token).softmax(dim=0)
                weights, chosen = probabilities.topk(2)
                for weight, expert in zip(weights / weights.sum(), chosen, strict=True):
                    inputs = gated(block.experts, int(expert), token[None])
                    output = expert_output(block.experts, int(expert), inputs)
                    sums[expert] += float(weight * output.norm())
                    counts[expert] += 1
    view, router = ModelView.of(model), routers_of(model)[0]
    with evaluation_mode(model):
        layerwise = LayerwisePass(view, ROWS)
        found = EXPERT_SCORES["reap"](layerwise, 0, router)
        frequency = EXPERT_SCORES["frequency"](layerwise, 0, router)
        weight = EXPERT_SCORES["routing_weight"](layerwise, 0, router)
    torch.testing.assert_close(found, sums / counts, atol=1e-5, rtol=1e-5)
    assert frequency.tolist() == counts.tolist()
    assert float(weight.sum()) == pytest.approx(float(counts.sum()) / 2, rel=1e-5)


def test_divergence_removes_the_expert_that_predictions_miss_least() -> None:
    model = tiny_model("mixtral").eval()
    routers = routers_of(model)
    with torch.no_grad():
        dense = [predictions(model, row) for row in ROWS]
        block = model.model.layers[0].mlp
        original, measured = block.forward, []
        for expert in range(4):

            def forward(hidden, expert=expert):
                with routers[0].without(torch.tensor([expert])):
                    return original(hidden)

            block.forward = forward
            measured.append(divergence(model, dense))
        block.forward = original
    chosen = removed(model, "divergence")
    assert chosen[0] == [min(range(4), key=measured.__getitem__)]
    assert all(len(experts) == 1 for experts in chosen.values())


@pytest.mark.parametrize("criterion", ["random", "frequency", "routed_error", "divergence"])
def test_each_group_loses_the_same_number(criterion: str) -> None:
    fields = {} if criterion == "random" else {"num_samples": 6}
    chosen = removed(tiny_model("mixtral").eval(), criterion, count=2, groups=2, **fields)
    for experts in chosen.values():
        assert len({expert // 2 for expert in experts}) == len(experts) == 2


def test_layers_go_by_the_divergence_without_them() -> None:
    model = tiny_model("llama", num_hidden_layers=4).eval()
    view = ModelView.of(model)
    config = CAPConfig(0.5, pattern="layers")
    with torch.no_grad():
        dense = [predictions(model, row) for row in ROWS]
        gone: list[int] = []
        for _ in range(2):
            measured = {}
            for layer in set(range(4)) - set(gone):
                bypassed = [view.layers[each] for each in [*gone, layer]]
                with bypass_layers(bypassed, view.output_templates[0]):
                    measured[layer] = divergence(model, dense)
            gone.append(min(measured, key=measured.__getitem__))
    assert layers_to_remove(view, ROWS, 2, config) == gone


def test_block_influence_is_one_minus_the_cosine() -> None:
    model = tiny_model("llama").eval()
    view = ModelView.of(model)
    named = {str(index): layer for index, layer in enumerate(view.layers)}
    influence, tokens = torch.zeros(3, dtype=torch.float64), 0
    with torch.no_grad():
        for row in ROWS:
            with recorded_calls(named) as calls:
                call_model(model, row.input_ids[None])
            for index, call in enumerate(calls.values()):
                output = call.output[0] if isinstance(call.output, tuple) else call.output
                cosine = torch.cosine_similarity(call.hidden, output, dim=-1)
                influence[index] += float((1 - cosine).sum())
            tokens += len(row.input_ids)
    config = CAPConfig(0.3, pattern="layers", criterion="block_influence")
    assert layers_to_remove(view, ROWS, 1, config) == [int(influence.argmin())]


def test_layers_measured_again_are_those_that_were_missed_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(part_ranking, "CANDIDATES", 2)
    model = tiny_model("llama", num_hidden_layers=5).eval()
    view = ModelView.of(model)
    trials: list[list[int]] = []
    restart, divergences_in = DivergenceEvaluator.restart, DivergenceEvaluator.divergences_in

    def restarted(self: DivergenceEvaluator) -> None:
        trials.append([])
        restart(self)

    def recorded(self: DivergenceEvaluator, contexts):
        trials[-1].append(self.next_layer)
        return divergences_in(self, contexts)

    monkeypatch.setattr(DivergenceEvaluator, "restart", restarted)
    monkeypatch.setattr(DivergenceEvaluator, "divergences_in", recorded)
    gone = layers_to_remove(view, ROWS, 3, CAPConfig(0.5, pattern="layers"))
    assert trials[0] == [0, 1, 2, 3, 4]
    assert [len(measured) for measured in trials[1:]] == [2, 2]
    for removed_before, measured in zip([gone[:1], gone[:2]], trials[1:], strict=True):
        assert not set(removed_before) & set(measured)
    assert gone[1] in trials[1]
    assert gone[2] in trials[2]


HYBRID = {"layer_types": ["full_attention", *["sliding_attention"] * 3], "num_hidden_layers": 4}


@pytest.mark.parametrize("criterion", ["random", "block_influence", "divergence"])
def test_one_layer_of_each_kind_stays(criterion: str) -> None:
    model = tiny_model("gemma3", **HYBRID).eval()
    config = CAPConfig(0.5, pattern="layers", criterion=criterion)
    gone = layers_to_remove(ModelView.of(model), ROWS, 2, config)
    assert len(set(gone)) == 2
    assert 0 not in gone


def test_more_layers_than_can_go_are_refused() -> None:
    model = tiny_model("gemma3", **HYBRID)
    with pytest.raises(CannotRemoveError, match=r"has 2 kinds of layers, and one of each is kept"):
        PartRemoval(model, CAPConfig(0.75, pattern="layers", recipe="random"), ALONE)
