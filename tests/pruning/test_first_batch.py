"""Before anything is pruned: what the model computes is finite, and its layers can run alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.calibration import examples
from helpers.pruning_runs import FIELDS, pruned, weights
from helpers.tiny_models import tiny_model, tiny_tokenizer
from torch import nn
from transformers import PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.data import batches
from optimum_cap.models import ModelView
from optimum_cap.models.agreement import rows_not_finite, share_that_differs
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.first_batch import check_first_batch

RECIPES = ["causal", "causal_fast", "wanda", "owl_wanda", "sparsegpt", "paper"]
WALKING = [recipe for recipe in RECIPES if recipe != "paper"]


def count_calls(model: PreTrainedModel) -> list[int]:
    """Make the second layer depend on how often it has run: no recorded arguments say that."""
    calls: list[int] = []

    def shift(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append(1)
        return output + 0.1 * len(calls)

    model.model.layers[1].mlp.register_forward_hook(shift)
    return calls


def test_every_architecture_runs_one_layer_at_a_time(model: PreTrainedModel) -> None:
    check_first_batch(ModelView.of(model), examples(9), layer_by_layer=True)
    check_first_batch(ModelView.of(model), examples(9), layer_by_layer=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma4"])
def test_half_precision_agrees(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype=dtype)
    check_first_batch(ModelView.of(model), examples(9), layer_by_layer=True)


@pytest.mark.parametrize("recipe", WALKING)
def test_a_layer_that_depends_on_more_than_its_arguments_is_refused(
    recipe: str, llama: PreTrainedModel
) -> None:
    before = weights(llama)
    count_calls(llama)
    with pytest.raises(ValueError, match=r"differ, from layer 1 on\), .*'plain'"):
        pruned(llama, None, recipe=recipe)
    assert weights(llama) == before


def test_recorded_arguments_of_fewer_tokens_are_refused(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a model drops tokens whose logits nobody asked for."""
    run = LayerwisePass.run

    def of_one_token(self: LayerwisePass, index: int, batch: Any, *rest: Any) -> torch.Tensor:
        args, kwargs = batch.arguments[index]
        one = {"position_embeddings": tuple(each[:, -1:] for each in kwargs["position_embeddings"])}
        batch.arguments[index] = args, {**kwargs, **one}
        return run(self, index, batch, *rest)

    monkeypatch.setattr(LayerwisePass, "run", of_one_token)
    with pytest.raises(ValueError, match=r"of the tokens differ, from layer 0 on"):
        pruned(llama, None, recipe="wanda")


def spoil_embedding(model: PreTrainedModel) -> None:
    token = tiny_tokenizer()("=")["input_ids"][0]

    def hook(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((args[0] == token).unsqueeze(-1), torch.nan)

    model.get_input_embeddings().register_forward_hook(hook)


def spoil(name: str, index: int = 0, value: float = torch.nan) -> Callable[..., None]:
    """Make a module return a value that is not finite, though all its weights are."""

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        channels = torch.arange(output.shape[-1])
        return output.masked_fill(channels == index, value)

    def in_place(model: PreTrainedModel) -> None:
        model.get_submodule(name).register_forward_hook(hook)

    return in_place


SPOILED: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "embedding": (spoil_embedding, r"the embedding of the model|layer 0"),
    "layer": (spoil("model.layers.1.post_attention_layernorm"), "layer 1"),
    "norm": (spoil("model.norm"), "the last norm"),
    "infinite norm": (spoil("model.norm", 3, torch.inf), "the last norm"),
    "head": (spoil("lm_head", 5), "the LM head of LlamaForCausalLM"),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("where", SPOILED)
def test_what_is_not_finite_is_refused_before_anything_changes(
    where: str, recipe: str, llama: PreTrainedModel
) -> None:
    spoil_it, named = SPOILED[where]
    spoil_it(llama)
    before = weights(llama)
    with pytest.raises(ValueError, match=rf"({named}) .*NaN or infinite"):
        pruned(llama, None, recipe=recipe)
    assert weights(llama) == before


def test_measuring_checks_too(llama: PreTrainedModel) -> None:
    spoil("model.norm")(llama)
    with pytest.raises(ValueError, match="the last norm returns NaN or infinite"):
        CAPPruner(CAPConfig(**FIELDS, recipe="paper")).measure(llama, tiny_tokenizer())


def test_the_example_is_named(llama: PreTrainedModel) -> None:
    rows = examples(5)
    rows[3].input_ids[2] = 63  # a token that no other example has
    llama.get_input_embeddings().weight.data[63] = torch.nan
    with pytest.raises(ValueError, match=r"on row 3 of 'random' \(1 of 5 examples"):
        LayerwisePass(ModelView.of(llama), rows)


def test_padding_may_be_anything(llama: PreTrainedModel) -> None:
    """Unless attention mixes it in, nothing depends on it."""
    [batch] = batches(examples(5), 5)
    hidden = torch.zeros(*batch.real.shape, 3)
    hidden[~batch.real] = torch.nan
    assert rows_not_finite(hidden, batch.real) == []
    several = hidden.expand(4, *hidden.shape).clone()
    several[2, 1, 0, 1] = torch.inf
    assert rows_not_finite(several, batch.real) == [1]


def test_inputs_that_are_not_finite_name_their_matrix(llama: PreTrainedModel) -> None:
    """In a later batch than the first: the layer returns finite values, the matrix gets others."""
    layerwise = LayerwisePass(ModelView.of(llama), examples(5))
    view = ModelView.of(llama)
    llama.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: (args[0] / 0,))
    llama.model.layers[0].mlp.register_forward_hook(lambda m, args, output: torch.ones_like(output))
    with torch.no_grad(), pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight rec"):
        layerwise.statistics(0, view.matrices_by_layer[0])


def test_each_token_is_compared_on_its_own() -> None:
    expected = torch.randn(10, 8)
    expected[0] *= 1e6  # hides the error of the other tokens in a norm over all of them
    values = expected.clone()
    assert share_that_differs(values, expected) == 0
    values[3:5] += 0.01
    assert share_that_differs(values, expected) == pytest.approx(0.2)
    values[5] = torch.nan
    assert share_that_differs(values, expected) == pytest.approx(0.3)


def test_the_model_is_left_as_it_was(llama: PreTrainedModel) -> None:
    before = copy.deepcopy(llama.state_dict())
    check_first_batch(ModelView.of(llama), examples(5), layer_by_layer=True)
    assert all(torch.equal(before[name], each) for name, each in llama.state_dict().items())
    for module in llama.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
