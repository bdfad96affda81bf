"""Causal scores: the wavefront equals one hooked pass per unit; the arithmetic of Eq. 1-2."""

import math

import pytest
import torch
from helpers.calibration import examples
from helpers.out_of_memory import OUT_OF_MEMORY, limit_memory
from helpers.tiny_models import tiny_model
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.data.batches import batches
from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.hooks import replaced_forward
from optimum_cap.models.sites import SiteUnit
from optimum_cap.models.view import ModelView
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.plain import plain_losses
from optimum_cap.scoring.scores import UnitLosses, causal_scores
from optimum_cap.scoring.settings import ScoringSettings
from optimum_cap.scoring.wavefront import Wavefront


def hand_losses(model: PreTrainedModel, row: CalibrationExample) -> float:
    """The loss of one example, from the logits, one token at a time."""
    with torch.no_grad():
        logprobs = model(row.input_ids[None]).logits[0].double().log_softmax(-1)
    targets = [t for t in range(len(row.input_ids)) if row.scored[t]]
    return sum(-float(logprobs[t - 1, row.input_ids[t]]) for t in targets) / len(targets)


def test_exact_equals_plain(model: PreTrainedModel) -> None:
    sites, rows = find_sites(model, mlp_unit_size=8), examples()
    exact, plain = (
        exact_losses(ModelView(model, sites), rows),
        plain_losses(ModelView(model, sites), rows),
    )
    assert [(s.name, u.index) for s, u in exact.units] == [
        (s.name, u.index) for s, u in plain.units
    ]
    torch.testing.assert_close(exact.masked, plain.masked, rtol=1e-5, atol=0)
    torch.testing.assert_close(exact.intact, plain.intact, rtol=1e-5, atol=0)
    # The agreement means something: masking moves the losses by much more than the tolerance.
    assert (plain.masked - plain.intact).abs().max() > 1e-2


@pytest.mark.slow
def test_a_small_budget_gives_the_same_losses(model: PreTrainedModel) -> None:
    sites, rows = find_sites(model), examples()
    torch.testing.assert_close(
        exact_losses(
            ModelView(model, sites), rows, settings=ScoringSettings(memory_budget=20_000)
        ).masked,
        exact_losses(ModelView(model, sites), rows).masked,
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt_neox"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attention_implementations(name: str, attention: str) -> None:
    model = tiny_model(name, attn_implementation=attention)
    sites, rows = find_sites(model), examples()
    torch.testing.assert_close(
        exact_losses(ModelView(model, sites), rows).masked,
        plain_losses(ModelView(model, sites), rows).masked,
        rtol=1e-5,
        atol=0,
    )


def test_post_norm_opt_equals_plain() -> None:
    model = tiny_model("opt", do_layer_norm_before=False)
    sites, rows = find_sites(model, mlp_unit_size=8), examples()
    torch.testing.assert_close(
        exact_losses(ModelView(model, sites), rows).masked,
        plain_losses(ModelView(model, sites), rows).masked,
        rtol=1e-5,
        atol=0,
    )


def test_losses_are_means_over_scored_tokens(model: PreTrainedModel) -> None:
    rows = examples()
    losses = exact_losses(ModelView.of(model), rows)
    expected = torch.tensor([hand_losses(model, row) for row in rows])
    torch.testing.assert_close(losses.intact.float(), expected, rtol=1e-5, atol=1e-6)


def test_padding_with_an_attention_mask_gives_the_same_losses(model: PreTrainedModel) -> None:
    """The batches carry no attention mask; a padded batch with one gives the same losses."""
    rows = examples()
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row.input_ids)] = row.input_ids
        mask[index, : len(row.input_ids)] = 1
    with torch.no_grad():
        logprobs = model(ids, attention_mask=mask).logits.log_softmax(-1)
    expected = []
    for index, row in enumerate(rows):
        at = row.scored.nonzero().flatten()
        expected.append(-logprobs[index, at - 1, row.input_ids[at]].mean())
    losses = exact_losses(ModelView.of(model), rows)
    torch.testing.assert_close(losses.intact.float(), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_the_model_comes_back_as_it_was(model: PreTrainedModel) -> None:
    model.train()
    model.get_decoder().eval()  # a mixture of modes must survive
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact_losses(ModelView.of(model), examples(3))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_an_error_on_the_way_leaves_no_trace(llama: PreTrainedModel) -> None:
    rows = examples(3)
    rows[1].input_ids[0] = 10_000  # outside of the vocabulary
    with pytest.raises(IndexError):
        exact_losses(ModelView.of(llama), rows)
    for module in llama.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sites, rows = find_sites(model), examples()
    losses = exact_losses(ModelView(model, sites), rows)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    widened = plain_losses(ModelView(model.float(), sites), rows)
    torch.testing.assert_close(losses.masked, widened.masked, rtol=1e-5, atol=0)


def losses_of(masked: list[list[float]], intact: list[float]) -> UnitLosses:
    site = find_sites(tiny_model("llama"))[0]
    units = [SiteUnit(site, site.units[index]) for index in range(len(masked))]
    as_tensor = torch.tensor(masked, dtype=torch.float64)
    return UnitLosses(units, torch.tensor(intact, dtype=torch.float64), as_tensor)


def test_median_of_subsets_minus_mean_of_intact() -> None:
    losses = losses_of([[1, 3, 10, 20, 5, 5]], [1, 1, 2, 2, 3, 3])
    scores = causal_scores(losses, subsets=3)
    assert float(scores.scores[0]) == 5 - 2  # median of (2, 15, 5), mean of (1, 2, 3)
    assert scores.intact_loss == 2
    mean = causal_scores(losses, subsets=3, aggregation="mean")
    assert float(mean.scores[0]) == pytest.approx(22 / 3 - 2)


def test_median_of_an_even_number_of_subsets_is_the_middle() -> None:
    scores = causal_scores(losses_of([[1, 2, 4, 9]], [0, 0, 0, 0]), subsets=4)
    assert float(scores.scores[0]) == 3


def test_standard_error_is_of_the_paired_differences() -> None:
    scores = causal_scores(losses_of([[2, 4, 6, 8]], [1, 1, 1, 1]), subsets=1)
    expected = torch.tensor([1.0, 3.0, 5.0, 7.0]).std() / 2
    assert float(scores.standard_errors[0]) == pytest.approx(float(expected))
    assert causal_scores(losses_of([[2.0]], [1.0]), subsets=1).standard_errors.isnan().all()


def test_nonfinite_losses_are_counted_and_left_out() -> None:
    scores = causal_scores(
        losses_of([[1, math.inf, 3, 3], [math.nan] * 4, [1, 1, 1, 1]], [1, 1, 1, 1]), subsets=2
    )
    assert scores.nonfinite.tolist() == [1, 4, 0]
    assert float(scores.scores[0]) == 1  # subsets of means 1 and 3
    assert scores.scores[1].isnan()
    assert float(scores.scores[2]) == 0


def test_a_unit_is_compared_on_the_examples_on_which_it_is_finite() -> None:
    losses = losses_of([[1.2, 1.2, 1.2, math.inf], [1.2, 1.2, 1.2, 9.2]], [1, 1, 1, 9])
    scores = causal_scores(losses, subsets=2)
    assert float(scores.scores[0]) == pytest.approx(0.2)  # not 1.2 - 3
    assert scores.intact_loss == 3
    whole = losses_of([[math.inf, math.inf, 1.5, 2.5]], [1, 1, 1, 2])
    assert float(causal_scores(whole, subsets=2).scores[0]) == 0.5


def test_a_masked_head_that_lets_the_model_overflow(llama: PreTrainedModel) -> None:
    """Heads 0 and 1 take back what the other one adds, and without one the last norm overflows."""
    sites, rows = find_sites(llama), examples()
    attention, norm = llama.model.layers[1].self_attn, llama.model.norm
    queries, output_proj = attention.q_proj.weight, attention.o_proj.weight
    with torch.no_grad():
        queries[8:16] = queries[:8]  # they share keys and values
        output_proj[:, 8:16] = 0
        output_proj[0, :8] = 300
        output_proj[0, 8:16] = -300
    own = norm.forward
    with replaced_forward(norm, lambda x: own(x) * (x[..., :1].abs() / 16).exp()):
        exact, plain = (
            exact_losses(ModelView(llama, sites), rows),
            plain_losses(ModelView(llama, sites), rows),
        )
    assert torch.equal(exact.masked.isfinite(), plain.masked.isfinite())
    assert exact.intact.isfinite().all()
    scores = causal_scores(exact, subsets=2)
    broken = [i for i, (site, unit) in enumerate(exact.units) if scores.nonfinite[i]]
    assert [(exact.units[i][0].layer, exact.units[i][1].index) for i in broken] == [(1, 0), (1, 1)]
    for index in broken:
        finite = exact.masked[index].isfinite()
        assert 0 < finite.sum() < len(rows)


def test_units_out_of_order_are_refused(llama: PreTrainedModel) -> None:
    sites = find_sites(llama)
    units = [(sites[-2], sites[-2].units[1]), (sites[0], sites[0].units[0])]
    with pytest.raises(ValueError, match=r"unit 0 of model\.layers\.0\.self_attn\.o_proj comes"):
        exact_losses(ModelView(llama, sites), examples(2), units=units)


def test_nonfinite_intact_loss_is_an_error() -> None:
    with pytest.raises(ValueError, match="not finite on 1 of 2 calibration examples"):
        causal_scores(losses_of([[1, 1]], [1, math.nan]), subsets=1)


def test_more_subsets_than_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 calibration examples cannot be split into 3"):
        causal_scores(losses_of([[1, 1]], [1, 1]), subsets=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "tokens"),
    [("cuda", 1000), ("cpu", 100), ("python", 30), ("driver", 1000), ("cublas", 1000)],
    ids=["fewer streams", "one stream", "fewer examples", "driver", "cublas"],
)
def test_out_of_memory_continues_with_less(
    device: str,
    tokens: int,
    llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sites, rows = find_sites(llama, mlp_unit_size=4), examples(12)
    expected = exact_losses(ModelView(llama, sites), rows)
    tried = limit_memory(monkeypatch, tokens, OUT_OF_MEMORY[device])
    losses = exact_losses(ModelView(llama, sites), rows)
    torch.testing.assert_close(losses.masked, expected.masked, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.intact, expected.intact, rtol=1e-6, atol=0)
    (said,) = caplog.messages
    assert f"memory ran out with {tried[0]} tokens" in said
    assert "a lower memory_budget" in said
    refused = [count for count in tried if count > tokens]
    assert len(refused) <= 6, "what was learnt of the memory is kept for the batches that follow"


def test_out_of_memory_with_a_single_example_and_unit_is_an_error(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, 0, OUT_OF_MEMORY["cuda"])
    with pytest.raises(MemoryError, match=r"a single example of \d+ tokens .* memory_budget"):
        exact_losses(ModelView.of(llama), examples(3))


def test_another_error_is_no_lack_of_memory(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = limit_memory(monkeypatch, 0, RuntimeError("a wrong shape"))
    with pytest.raises(RuntimeError, match="a wrong shape"):
        exact_losses(ModelView.of(llama), examples(3))
    assert len(tried) == 1


@pytest.mark.parametrize(
    "where", ["model.layers.1.mlp.act_fn", "model.layers.2.self_attn.o_proj", "lm_head"]
)
def test_memory_that_runs_out_inside_the_model_leaves_no_trace(
    where: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a layer that is passed whole, under replaced forwards of the last one, in the logits."""
    monkeypatch.setattr("optimum_cap.scoring.exact.check_streams", lambda *args: 1)
    sites, rows = find_sites(llama, mlp_unit_size=4), examples(12)
    expected = exact_losses(ModelView(llama, sites), rows)
    failures = iter([3, 7, 8])
    calls, due = 0, next(failures)
    module = llama.get_submodule(where)

    def fail(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal calls, due
        calls += 1
        if calls == due:
            due = next(failures, 0)
            raise OUT_OF_MEMORY["cuda"]

    handle = module.register_forward_pre_hook(fail)
    losses = exact_losses(ModelView(llama, sites), rows)
    handle.remove()
    assert due == 0
    torch.testing.assert_close(losses.masked, expected.masked, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.intact, expected.intact, rtol=1e-6, atol=0)
    assert not any("forward" in module.__dict__ for module in llama.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


def test_the_weights_of_attention_are_not_recorded() -> None:
    model = tiny_model("llama", attn_implementation="eager")
    sites = find_sites(model)
    [batch] = batches(examples(3), 3)
    with torch.no_grad():
        waves = Wavefront(ModelView(model, sites), batch)
    _, weights = waves.suffix.calls["attention 1"].output
    assert weights is None
