"""Linear weights that a pruning leaves dense, by name and number."""

import pytest
import transformers
from helpers.tiny_models import MOE, tiny_model

from optimum_cap.models.architectures import find_sites
from optimum_cap.models.left_dense import DenseProjection, projections_left_dense
from optimum_cap.models.view import ModelView


def of_all(model: transformers.PreTrainedModel) -> list[DenseProjection]:
    view = ModelView.of(model)
    return projections_left_dense(view, view.matrices)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_moe", "glm4_moe"])
def test_nothing_but_routers_is_left_where_all_projections_are_known(name: str) -> None:
    assert of_all(tiny_model(name)) == []


def test_shared_experts_are_named() -> None:
    model = tiny_model("qwen2_moe")
    layers, weights = model.config.num_hidden_layers, 12 * model.config.hidden_size
    assert of_all(model) == [
        DenseProjection(f"mlp.shared_expert.{name}", layers * weights, prunable=False)
        for name in ("gate_proj", "up_proj", "down_proj")
    ]


def test_experts_of_another_orientation_are_named() -> None:
    settings = {**MOE, "moe_num_experts": 4, "moe_topk": 2, "intermediate_size": 12}
    model = transformers.AriaTextForCausalLM(transformers.AriaTextConfig(**settings))
    experts = model.model.layers[0].mlp.experts
    assert of_all(model) == [
        DenseProjection("mlp.experts.gate_up_proj", 3 * experts.gate_up_proj.numel(), False),
        DenseProjection("mlp.experts.down_proj", 3 * experts.down_proj.numel(), False),
    ]


def test_what_is_beside_the_layers_is_named_too() -> None:
    names = {projection.name for projection in of_all(tiny_model("gemma3n"))}
    assert {"laurel.linear_left", "per_layer_input_gate", "altup_projections"} <= names
    assert {projection.name for projection in of_all(tiny_model("opt"))} == {
        "project_in",
        "project_out",
    }


def test_what_the_config_leaves_dense_is_told_apart() -> None:
    model = tiny_model("qwen2_moe")
    view = ModelView(model, find_sites(model))
    pruned = [matrix for matrix in view.matrices if "experts" not in matrix.parameter]
    left = projections_left_dense(view, pruned)
    assert [each.name for each in left if each.prunable] == [
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    ]
    experts = model.model.layers[0].mlp.experts
    assert [each.weights for each in left if each.prunable] == [
        3 * experts.gate_up_proj.numel(),
        3 * experts.down_proj.numel(),
    ]
    assert len([each for each in left if not each.prunable]) == 3
