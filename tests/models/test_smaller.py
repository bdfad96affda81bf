"""Smaller models: what is left computes what the model computes without the removed parts."""

import copy

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, tiny_model
from transformers import PreTrainedModel

from optimum_cap.models import (
    CannotRemoveError,
    KeptParts,
    ModelView,
    Router,
    Site,
    bypass_layers,
    call_model,
    replace_by_smaller,
    smaller_config,
    smaller_model,
)

# Transposed and fused weights, biases, gates in one matrix, and experts beside MLPs.
SAMPLE = ("llama", "gpt2", "phi3", "qwen3_moe")
SAMPLED = [
    name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES
]
TOKENS = torch.arange(3, 27).view(2, 12)
NO_FEWER_LAYERS = ("gemma3n", "gemma4")  # numbers of shared layers, and an embedding for each


def view_of(model: PreTrainedModel) -> ModelView:
    widths = [site.width for site in ModelView.of(model).sites if not site.mixes_tokens]
    return ModelView.of(model, min(widths) // 2)


def without(view: ModelView, kept: KeptParts) -> PreTrainedModel:
    model = view.model
    return smaller_model(model, view.sites, kept, smaller_config(model, view.sites, kept))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return call_model(model, TOKENS).logits


def thinned(view: ModelView, removed: int = 4) -> dict[Site, torch.Tensor]:
    """Return masks of other channels in each site."""
    sites = [site for site in view.sites if not site.mixes_tokens]
    sites = [site for site in sites if site.width == max(each.width for each in sites)]
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for site in sites:
        masks[site] = torch.ones(site.width, dtype=torch.bool)
        masks[site][torch.randperm(site.width, generator=generator)[:removed]] = False
    return masks


def with_zeroed_channels(view: ModelView, masks: dict[Site, torch.Tensor]) -> PreTrainedModel:
    model = copy.deepcopy(view.model)
    same = ModelView.of(model)
    for site, mask in masks.items():
        same.writable_weights(site.output_proj)[:, ~mask] = 0
    return model


# Gemma 3n keeps the largest channels, by the mean and deviation of all: see test_removal.
@pytest.mark.parametrize(
    "architecture",
    [each for each in SAMPLED if getattr(each, "values", (each,))[0] != "gemma3n"],
)
def test_channels(architecture: str) -> None:
    model = tiny_model(architecture).eval()
    view = view_of(model)
    masks = thinned(view)
    smaller = without(view, KeptParts(channels=masks))
    assert smaller.num_parameters() < model.num_parameters()
    with torch.no_grad():
        expected = logits(with_zeroed_channels(view, masks))
    torch.testing.assert_close(logits(smaller), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", SAMPLED)
def test_layers(architecture: str) -> None:
    model = tiny_model(architecture).eval()
    view = view_of(model)
    kept = KeptParts(layers=[index for index in range(len(view.layers)) if index != 1])
    if architecture in NO_FEWER_LAYERS:
        with pytest.raises(CannotRemoveError, match="no config of Gemma"):
            without(view, kept)
        return
    with bypass_layers([view.layers[1]], view.output_templates[1]):
        expected = logits(model)
    smaller = without(view, kept)
    assert len(ModelView.of(smaller).layers) == len(view.layers) - 1
    torch.testing.assert_close(logits(smaller), expected, atol=1e-5, rtol=1e-4)


def routers(model: PreTrainedModel, view: ModelView) -> list[Router]:
    blocks = dict.fromkeys(site.block for site in view.sites if site.expert is not None)
    return [Router(model, block) for block in blocks]


@pytest.mark.parametrize(
    "architecture",
    ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow), "glm4_moe"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("olmoe", "qwen2_moe")],
)
def test_experts(architecture: str) -> None:
    model = tiny_model(architecture).eval()
    view = view_of(model)
    for parameter_or_buffer in (*model.parameters(), *model.buffers()):
        if parameter_or_buffer.shape == (4,):  # biases that only the choice of experts sees
            parameter_or_buffer.data.normal_()
    of_layers = routers(model, view)
    kept = {router.block: [0, 2, 3] for router in of_layers}
    smaller = without(view, KeptParts(experts=kept))
    expected = tokens_through(model, view, {router.block: router for router in of_layers})
    torch.testing.assert_close(logits(smaller), expected, atol=1e-5, rtol=1e-4)


def tokens_through(
    model: PreTrainedModel, view: ModelView, of_blocks: dict[str, Router]
) -> torch.Tensor:
    """Return logits with expert 1 of every layer masked in the router."""
    handles = []
    for block, router in of_blocks.items():
        parent = model.get_submodule(block.rpartition(".")[0])
        original = parent.forward

        def forward(*args, original=original, router=router, **kwargs):
            with router.without(torch.tensor([1])):
                return original(*args, **kwargs)

        parent.forward = forward
        handles.append(parent)
    try:
        return logits(model)
    finally:
        for parent in handles:
            del parent.forward


def test_weights_are_copies_and_ties_stay() -> None:
    model = tiny_model("gemma3").eval()  # ties its embeddings
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    view = view_of(model)
    smaller = without(view, KeptParts(channels=thinned(view)))
    embeddings = smaller.get_input_embeddings().weight
    assert embeddings is smaller.get_output_embeddings().weight
    for parameter in smaller.parameters():
        parameter.data.zero_()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_model_becomes_the_smaller_one_in_place() -> None:
    model = tiny_model("mixtral").eval()
    view = view_of(model)
    kept = {router.block: [1, 3] for router in routers(model, view)}
    smaller = without(view, KeptParts(experts=kept))
    expected, name, generation = logits(smaller), model.name_or_path, model.generation_config
    replace_by_smaller(model, smaller)
    assert torch.equal(logits(model), expected)
    assert model.config.num_local_experts == model.num_experts == 2
    assert (model.name_or_path, model.generation_config) == (name, generation)
    assert not any(module.training for module in model.modules())
