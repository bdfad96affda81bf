"""Linear weights that a pruning leaves dense, by name and number."""

import pytest
import transformers
from helpers.tiny_image_models import IMAGE_MODELS, tiny_image_model
from helpers.tiny_models import MOE, tiny_model

from optimum_cap.models.architectures import find_sites
from optimum_cap.models.left_dense import DenseProjection, projections_left_dense
from optimum_cap.models.view import ModelView


def of_all(model: transformers.PreTrainedModel) -> list[DenseProjection]:
    view = ModelView.of(model)
    return projections_left_dense(view, view.matrices)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_moe", "glm4_moe", "qwen2_moe"])
def test_nothing_but_routers_is_left(name: str) -> None:
    assert of_all(tiny_model(name)) == []


@pytest.mark.parametrize("name", sorted(set(IMAGE_MODELS) - {"mllama"}))
def test_parts_outside_the_decoder_do_not_count(name: str) -> None:
    """The vision part, its projector, and the LM head, which Llama 4 has in its decoder."""
    assert of_all(tiny_image_model(name)) == []


def test_experts_of_another_orientation_are_pruned_too() -> None:
    settings = {**MOE, "moe_num_experts": 4, "moe_topk": 2, "intermediate_size": 12}
    assert of_all(transformers.AriaTextForCausalLM(transformers.AriaTextConfig(**settings))) == []


def test_what_several_layers_share_is_pruned_and_counted_once() -> None:
    model = tiny_model("llama")
    first, second, third = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    third.mlp.down_proj.weight = second.mlp.down_proj.weight
    assert of_all(model) == []
    left = projections_left_dense(ModelView.of(model), [])
    weights = first.mlp.up_proj.weight.numel()
    assert {each.name: each.weights // weights for each in left if "mlp" in each.name} == {
        "mlp.up_proj": 2,
        "mlp.down_proj": 2,
        "mlp.gate_proj": 3,
    }


def test_what_is_beside_the_layers_is_named_too() -> None:
    names = {projection.name for projection in of_all(tiny_model("gemma3n"))}
    assert {"altup.prediction_coefs", "altup_projections", "per_layer_model_projection"} <= names
    assert not {"laurel.linear_left", "per_layer_input_gate"} & names
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
    assert all(each.prunable for each in left)
