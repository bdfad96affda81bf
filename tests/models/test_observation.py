"""What is observed in decoder layers, and what users add to it."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny_models import MOE, tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import optimum_cap
from optimum_cap.models import ModelView, check_experts, layouts
from optimum_cap.models.architectures import decoder_layer_names, find_sites
from optimum_cap.models.observation import is_projection
from optimum_cap.models.sites import Site, stages_by_layer


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_LAYOUTS", {})


def of_layer(sites: list[Site], layer: int = 0) -> dict[str, Site]:
    """The sites of a layer, by their paths in it."""
    return {
        site.name.removeprefix(f"{site.layer_name}."): site for site in sites if site.layer == layer
    }


class Blocks(nn.Module):
    """Mixers of tokens for `self_attn` of Llama; each gives what a test asks for."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.mix = nn.Linear(24, width, bias=False)
        self.steps = nn.Linear(24, heads, bias=False)
        self.out = nn.Linear(width, 24, bias=False)
        self.count = heads

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        values = self.mix(hidden_states).unflatten(-1, (self.count, -1))
        steps = self.steps(hidden_states).sigmoid().unsqueeze(-1)
        mixed = (steps * values).cumsum(dim=1)
        return self.out(mixed.flatten(-2)), None


def with_mixers(model: PreTrainedModel, width: int = 32, heads: int = 4) -> PreTrainedModel:
    for layer in model.model.layers:
        layer.self_attn = Blocks(width, heads)
    return model.eval()


def test_heads_of_a_mixer_with_names_of_its_own_are_found(llama: PreTrainedModel) -> None:
    sites = of_layer(find_sites(with_mixers(llama)))
    site = sites["self_attn.out"]
    assert (site.kind, site.width, len(site.units)) == ("attention", 32, 4)
    names = {piece.parameter: (piece.start, piece.stop) for piece in site.units[1].separable}
    assert names == {
        f"{site.block}.out.weight": (8, 16),
        f"{site.block}.mix.weight": (8, 16),
        f"{site.block}.steps.weight": (1, 2),
    }


def test_a_mixer_whose_number_of_heads_is_nowhere_is_one_unit(llama: PreTrainedModel) -> None:
    model = with_mixers(llama, width=35, heads=7)
    site = of_layer(find_sites(model))["self_attn.out"]
    assert (site.kind, len(site.units)) == ("mixer", 1)
    optimum_cap.register_layout("llama", heads={"self_attn.out": 7})
    site = of_layer(find_sites(model))["self_attn.out"]
    assert (site.kind, len(site.units)) == ("attention", 7)


def test_a_wrong_number_of_heads_is_refused(llama: PreTrainedModel) -> None:
    optimum_cap.register_layout("llama", heads={"self_attn.o_proj": 2})
    with pytest.raises(ValueError, match=r"2 heads are registered for 'self_attn\.o_proj', which"):
        find_sites(llama)


def test_a_list_of_layers_that_is_not_there_is_refused(llama: PreTrainedModel) -> None:
    optimum_cap.register_layout("llama", layers="model.layers")
    assert decoder_layer_names(llama)[1] == "model.layers.1"
    optimum_cap.register_layout("llama", layers="model.blocks")
    with pytest.raises(ValueError, match="has no list of modules of that name"):
        find_sites(llama)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": {"o_proj": 1}}, "must be a number of heads from 2, got 1"),
        ({"linear": ("Linear",)}, "must hold classes of torch modules, got 'Linear'"),
    ],
)
def test_layouts_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimum_cap.register_layout("llama", **arguments)


class Transposing(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.T + (0 if self.bias is None else self.bias)


class Ternary(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.weight.sign(), self.bias)


class Custom(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,oi->...o", hidden, self.weight)


def test_a_linear_class_counts_only_if_it_computes_a_product() -> None:
    assert is_projection(nn.Linear(3, 2))
    assert is_projection(Transposing(3, 2))
    assert not is_projection(Ternary(3, 2))
    assert not is_projection(Custom(3, 2))
    optimum_cap.register_layout("any", linear=(Custom,))
    assert is_projection(Custom(3, 2))


def test_stages_follow_what_feeds_what() -> None:
    def names(model: PreTrainedModel) -> list[list[str]]:
        stages = stages_by_layer(find_sites(model))[0]
        return [sorted({m.parameter.split(".")[-2] for m in stage}) for stage in stages]

    assert names(tiny_model("llama")) == [
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    # Attention and MLP run side by side.
    assert names(tiny_model("gpt_neox")) == [
        ["dense_h_to_4h", "query_key_value"],
        ["dense", "dense_4h_to_h"],
    ]


def latent() -> PreTrainedModel:
    config = transformers.DeepseekV3Config(
        **{
            **MOE,
            "n_routed_experts": 4,
            "moe_intermediate_size": 12,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        }
    )
    return transformers.DeepseekV3ForCausalLM(config).eval()


def test_latent_attention_has_heads_and_projections_that_belong_to_all() -> None:
    model = latent()
    site = of_layer(find_sites(model))["self_attn.o_proj"]
    assert (site.kind, len(site.units)) == ("attention", 4)
    rows = {
        piece.parameter.split(".")[-2]: (piece.start, piece.stop) for piece in site.units[1].region
    }
    assert rows["q_b_proj"] == (12, 24)
    assert rows["kv_b_proj"] == (16, 32)
    assert rows["q_a_proj"] == (0, 12)
    assert rows["kv_a_proj_with_mqa"][1] == 20
    separable = {piece.parameter.split(".")[-2] for piece in site.units[1].separable}
    assert separable == {"o_proj", "q_b_proj", "kv_b_proj"}
    stages = stages_by_layer(find_sites(model))[0]
    assert [len(stage) for stage in stages] == [2, 2, 1, 2, 1]


def test_experts_of_gpt_oss_have_interleaved_rows() -> None:
    settings = {**MOE, "num_local_experts": 4, "head_dim": 8, "intermediate_size": 12}
    config = transformers.GptOssConfig(**settings, layer_types=["full_attention"] * 3)
    model = transformers.GptOssForCausalLM(config)
    site = next(site for site in find_sites(model, mlp_unit_size=4) if site.expert == 1)
    assert [unit.channels for unit in site.units] == [(0, 4), (4, 8), (8, 12)]
    [down, gate_up] = site.units[1].region
    assert (down.dim, down.start, down.stop) == (0, 4, 8)
    assert (gate_up.dim, gate_up.start, gate_up.stop) == (1, 8, 16)


def test_observing_leaves_no_trace(llama: PreTrainedModel) -> None:
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        expected = llama(ids).logits
        find_sites(llama)
        assert torch.equal(llama(ids).logits, expected)
    assert not any("forward" in module.__dict__ for module in llama.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_weights_are_not_needed() -> None:
    model = tiny_model("llama")
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert find_sites(empty, 8) == find_sites(model, 8)
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())


def test_a_layer_that_cannot_be_observed_is_refused(llama: PreTrainedModel) -> None:
    def forward(hidden: torch.Tensor, **kwargs: Any) -> Iterator[None]:
        raise RuntimeError("only on a GPU")

    llama.model.layers[0].mlp.forward = forward
    with pytest.raises(ValueError, match=r"cannot be pruned by any recipe: .*only on a GPU"):
        find_sites(llama)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_is_being_trained_is_observed_as_it_will_run(
    llama: PreTrainedModel, reentrant: bool
) -> None:
    expected = find_sites(llama)
    llama.train()
    for layer in llama.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
    state = torch.random.get_rng_state()
    assert find_sites(llama) == expected
    assert llama.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_changes_nothing() -> None:
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    expected = find_sites(model)
    assert find_sites(model.train()) == expected


class Mixture(nn.Module):
    """Experts in a list, of which a token reaches one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(24, 16, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(24, 10), nn.GELU(), nn.Linear(10, 24)) for _ in range(16)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.flatten(0, -2)
        weights, chosen = self.gate(tokens).softmax(dim=-1).max(dim=-1)
        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            if (here := chosen == index).any():
                output[here] = expert(tokens[here]) * weights[here, None]
        return output.view_as(hidden)


def test_experts_that_no_token_reached_are_sites_like_the_others(llama: PreTrainedModel) -> None:
    for layer in llama.model.layers:
        layer.mlp = Mixture()
    sites = of_layer(find_sites(llama.eval(), mlp_unit_size=5))
    found = [sites[f"mlp.experts.{index}.2"] for index in range(16)]
    assert {site.kind for site in found} == {"mlp"}
    for site in found:
        assert [len(unit.region) for unit in site.units] == [2]
        assert site.output_module == site.block


def test_a_registered_class_that_is_no_product_is_refused(llama: PreTrainedModel) -> None:
    class Squaring(Custom):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) ** 2

    optimum_cap.register_layout("llama", linear=(Squaring,))
    llama.model.layers[0].mlp.up_proj = Squaring(24, 20)
    with pytest.raises(ValueError, match="Squaring was given to register_layout, but does not"):
        find_sites(llama)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_compute_something_else_are_refused(dtype: torch.dtype) -> None:
    view = ModelView.of(tiny_model("mixtral", dtype=dtype))
    check_experts(view, view.matrices)
    experts = view.model.model.layers[0].mlp.experts
    own = experts.forward
    experts.forward = lambda *args: 1.1 * own(*args)
    with pytest.raises(ValueError, match=r"MixtralForCausalLM \(MixtralExperts\) compute"):
        check_experts(view, view.matrices)
    check_experts(view, [m for m in view.matrices if "experts" not in m.parameter])
