"""The wavefront with a prefix that is computed once per stream equals one hooked pass per unit."""

from collections.abc import Callable

import pytest
import torch
from helpers.every_architecture import small_model
from helpers.score_runs import assert_exact
from helpers.shared_prefix import example, examples
from helpers.tiny_models import SHARED_EXPERTS, spread_out, tiny_model
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.data.batches import batches, shared_prefix
from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.sites import SiteUnit, all_units
from optimum_cap.models.view import ModelView
from optimum_cap.scoring import shared_prefix as sharing
from optimum_cap.scoring import wavefront
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.first_order import first_order_losses
from optimum_cap.scoring.plain import plain_losses


def prefix_of(model: PreTrainedModel, rows: list[CalibrationExample]) -> int:
    """The prefix that `exact_losses` computes once."""
    sites = find_sites(model)
    with torch.no_grad():
        return sharing.prefix_to_share(ModelView(model, sites), rows)


# What is shared


def test_the_prefix_ends_where_examples_differ() -> None:
    assert shared_prefix(examples(prefix=12)) == 12
    assert shared_prefix(examples(prefix=0)) == 0


def test_the_prefix_ends_before_what_predicts_a_scored_token() -> None:
    ids = torch.arange(10)
    assert shared_prefix([example(ids, 6), example(ids, 4)]) == 3
    assert shared_prefix([example(ids, 1), example(ids, 9)]) == 0


def test_a_prefix_cannot_be_longer_than_an_example() -> None:
    ids = torch.arange(10)
    assert shared_prefix([example(ids, 9), example(ids[:4], 3)]) == 2
    assert shared_prefix([example(ids[:2], 1), example(ids, 9)]) == 0


def test_a_batch_splits_into_one_row_of_prefix_and_the_suffixes() -> None:
    rows = examples(prefix=3, suffixes=(2, 4))
    prefix, suffix = batches(rows, 2, 3)[0].split
    assert prefix.input_ids.tolist() == [rows[0].input_ids[:3].tolist()]
    assert not prefix.scored.any()
    assert suffix.positions == [1, 0]
    assert suffix.input_ids[0].tolist() == rows[1].input_ids[3:].tolist()
    assert suffix.real.tolist() == [[True] * 4, [True, True, False, False]]
    assert suffix.scored.tolist() == [[False, False, True, True], [False, True, False, False]]


def test_a_long_example_leaves_the_others_together() -> None:
    rows = examples(prefix=12, suffixes=(40, 9, 8, 7, 10, 10))
    made = batches(rows, len(rows), 12, tokens=40)
    assert [batch.positions for batch in made] == [[0], [4, 5, 1, 2], [3]]
    assert [batch.positions for batch in batches(rows, 2, 12, tokens=40)] == [
        [0],
        [4, 5],
        [1, 2],
        [3],
    ]
    assert [batch.positions for batch in batches(rows, 6, 0, tokens=1)] == [
        [0],
        [4],
        [5],
        [1],
        [2],
        [3],
    ]


# Exactness


def test_a_shared_prefix_is_exact(model: PreTrainedModel) -> None:
    rows = examples()
    assert prefix_of(model, rows) == 12
    assert_exact(model, rows)


def test_no_shared_prefix_is_exact(model: PreTrainedModel) -> None:
    rows = examples(prefix=0)
    assert prefix_of(model, rows) == 0
    assert_exact(model, rows)


@pytest.mark.parametrize("prefix", [0, 12])
def test_whole_mlps_and_experts_are_exact(model: PreTrainedModel, prefix: int) -> None:
    """Also where a norm follows the MLP, which makes much of what rounding leaves of a zero."""
    assert_exact(model, examples(prefix), mlp_unit_size=None)


@pytest.mark.parametrize("mlp_unit_size", [5, None])
@pytest.mark.parametrize("prefix", [0, 12])
@pytest.mark.parametrize("name", SHARED_EXPERTS)
def test_shared_experts_are_exact(name: str, prefix: int, mlp_unit_size: int | None) -> None:
    assert_exact(tiny_model(name), examples(prefix), mlp_unit_size=mlp_unit_size)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_all_implementations_of_experts_are_exact(implementation: str) -> None:
    model = tiny_model("mixtral", experts_implementation=implementation)
    assert_exact(model, examples())


def test_some_units_alone_are_exact() -> None:
    """As adaptive scoring asks for them: the other blocks of a layer are not recorded."""
    model, rows = tiny_model("glm4_moe"), examples()
    sites = find_sites(model, mlp_unit_size=6)
    for kinds in (("expert",), ("mlp",), ("attention", "expert")):
        units = [unit for unit in all_units(sites) if unit[0].kind in kinds][::3]
        exact = exact_losses(ModelView(model, sites), rows, units=units)
        plain = plain_losses(ModelView(model, sites), rows, units=units)
        torch.testing.assert_close(exact.masked, plain.masked, rtol=1e-5, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_shared_prefix_with_both_attention_implementations(name: str, attention: str) -> None:
    assert_exact(tiny_model(name, attn_implementation=attention), examples())


@pytest.mark.parametrize("prefix", [0, 12])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_model_whose_modules_move_their_inputs(name: str, prefix: int) -> None:
    model, rows = tiny_model(name), examples(prefix, (19, 14, 18))
    sites = find_sites(model, 8)
    expected = exact_losses(ModelView(model, sites), rows)
    spread_out(model)
    assert hasattr(model.get_decoder(), "_hf_hook") or hasattr(model.lm_head, "_hf_hook")
    assert_exact(model, rows)
    assert torch.equal(exact_losses(ModelView(model, sites), rows).masked, expected.masked)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize(
    "prefix", [7, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 6, 9, 17, 30))]
)
def test_a_prefix_of_about_the_sliding_window(name: str, prefix: int) -> None:
    model, rows = tiny_model(name, sliding_window=8), examples(prefix)
    assert prefix_of(model, rows) == prefix
    assert_exact(model, rows)


def test_a_prefix_of_all_but_what_is_scored(llama: PreTrainedModel) -> None:
    rows = examples(prefix=20, suffixes=(2, 2, 2))
    assert prefix_of(llama, rows) == 20
    assert_exact(llama, rows)


def test_identical_examples(llama: PreTrainedModel) -> None:
    rows = examples(suffixes=(6,)) * 3
    assert prefix_of(llama, rows) == 12 + 2
    assert_exact(llama, rows)


def test_a_single_example_shares_nothing(llama: PreTrainedModel) -> None:
    rows = examples(suffixes=(6,))
    assert prefix_of(llama, rows) == 0
    assert_exact(llama, rows)


def test_a_short_prefix_does_not_pay(llama: PreTrainedModel) -> None:
    assert prefix_of(llama, examples(prefix=1, suffixes=(12, 12))) == 0


@pytest.mark.parametrize("budget", [1, 60_000, 200_000])
def test_a_small_budget_shares_too(llama: PreTrainedModel, budget: int) -> None:
    assert_exact(llama, examples(), budget)


def test_the_prefix_is_computed_once_per_stream(llama: PreTrainedModel) -> None:
    sites = find_sites(llama)
    seen = []
    llama.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    [batch] = batches(examples(prefix=12, suffixes=(9, 9, 5)), 3, 12)
    with torch.no_grad():
        waves = wavefront.Wavefront(ModelView(llama, sites), batch)
        waves.masked_losses([SiteUnit(sites[0], unit) for unit in sites[0].units])
    per_stream = 12 + 3 * (9 - 1)  # the last token predicts nothing
    assert sum(hidden.shape[:2].numel() for hidden in seen) == (1 + 4) * per_stream


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_stream_that_starts_in_the_mlp_computes_no_mlp_of_its_layer(name: str) -> None:
    model = tiny_model(name)
    sites = find_sites(model)
    [batch] = batches(examples(prefix=0), 5, 0)
    seen: dict[int, int] = {}

    def count(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[layer] = seen.get(layer, 0) + args[0][..., 0].numel()

        return hook

    with torch.no_grad():
        waves = wavefront.Wavefront(ModelView(model, sites), batch)
        for layer in (0, 1):
            mlp = model.model.layers[layer].mlp
            projected = mlp.experts.act_fn if name == "mixtral" else mlp.act_fn
            projected.register_forward_pre_hook(count(layer))
        [site] = [site for site in sites if site.layer == 0 and site.kind != "attention"][:1]
        waves.masked_losses([SiteUnit(site, site.units[0])])
    per_stream = batch.input_ids.numel()
    assert seen[1] == per_stream * (2 if name == "mixtral" else 1)
    # Of experts, the tokens that reach the masked one are computed without it.
    assert seen[0] <= per_stream * (2 if name == "mixtral" else 1)


def test_attention_alone_records_no_other_branch(llama: PreTrainedModel) -> None:
    sites = find_sites(llama)
    [batch] = batches(examples(prefix=0), 5, 0)
    attention = [site for site in sites if site.kind == "attention"]
    with torch.no_grad():
        waves = wavefront.Wavefront(ModelView(llama, attention), batch)
    assert not any("mlp" in name for name in waves.suffix.calls)


def test_a_model_that_needs_whole_sequences_gets_them(caplog: pytest.LogCaptureFixture) -> None:
    """Dynamic rotary scaling encodes the prefix differently when nothing follows it."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model = tiny_model("llama", max_position_embeddings=16, rope_parameters=scaling)
    rows = examples(prefix=12, suffixes=(9, 9, 9))
    sharing.logger.warning_once.cache_clear()
    assert prefix_of(model, rows) == 0
    assert_exact(model, rows)
    [record] = caplog.records
    assert "the shared prefix of 12 tokens" in record.getMessage()


# What is refused


def test_experts_with_a_norm_behind_them_are_exact() -> None:
    model = tiny_model("mixtral")
    experts = model.model.layers[2].mlp.experts
    experts.has_post_expert_norm, experts.post_expert_norm = True, nn.LayerNorm(24)
    view = ModelView.of(model)
    found, expected = (method(view, examples()) for method in (exact_losses, plain_losses))
    torch.testing.assert_close(found.masked, expected.masked, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="have no first-order estimate: use estimator 'exact'"):
        first_order_losses(view, examples())


def test_experts_with_another_routing_are_refused() -> None:
    model = tiny_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    own = experts.forward
    experts.forward = lambda hidden, routing: own(hidden, *routing)
    model.model.layers[1].mlp.forward = lambda hidden: experts(
        hidden.flatten(0, 1),
        model.model.layers[1].mlp.gate(hidden)[:0:-1],
    ).view(hidden.shape)
    for method in (exact_losses, first_order_losses):
        with pytest.raises(ValueError, match=r"gives model\.layers\.1\.mlp\.experts something"):
            method(ModelView.of(model), examples())


def test_an_mlp_that_changes_what_its_projection_returns_is_refused(
    llama: PreTrainedModel,
) -> None:
    llama.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match=r"changes what model\.layers\.1\.mlp\.down_proj returns"):
        exact_losses(ModelView.of(llama), examples())


@pytest.mark.parametrize("kind", ["qwen3_next", "mamba2", "lfm2"])
def test_a_shared_prefix_of_recurrent_layers_is_exact(kind: str) -> None:
    view = ModelView.of(small_model(kind))
    found, expected = (method(view, examples()) for method in (exact_losses, plain_losses))
    torch.testing.assert_close(found.masked, expected.masked, rtol=1e-3, atol=1e-4)
