"""Causal scores: the wavefront equals one hooked pass per unit; the arithmetic of Eq. 1-2."""

import math

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.architectures import Site, Unit, find_sites
from optimum_cap.attribution import UnitLosses, causal_scores, exact_losses, plain_losses
from optimum_cap.calibration import Batch, CalibrationExample
from optimum_cap.wavefront import Wavefront


def examples(count: int = 7, longest: int = 24, seed: int = 0) -> list[CalibrationExample]:
    """Random examples of different lengths whose second half is scored."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        tokens = int(torch.randint(6, longest, (1,), generator=generator))
        scored = torch.zeros(tokens, dtype=torch.bool)
        scored[tokens // 2 :] = True
        ids = torch.randint(4, 60, (tokens,), generator=generator)
        made.append(CalibrationExample(ids, scored, "random", index, f"{index:064x}"))
    return made


def hand_losses(model: PreTrainedModel, row: CalibrationExample) -> float:
    """The loss of one example, from the logits, one token at a time."""
    with torch.no_grad():
        logprobs = model(row.input_ids[None]).logits[0].double().log_softmax(-1)
    targets = [t for t in range(len(row.input_ids)) if row.scored[t]]
    return sum(-float(logprobs[t - 1, row.input_ids[t]]) for t in targets) / len(targets)


def test_exact_equals_plain(model: PreTrainedModel) -> None:
    sites, rows = find_sites(model, mlp_unit_size=8), examples()
    exact, plain = exact_losses(model, sites, rows), plain_losses(model, sites, rows)
    assert [(s.name, u.index) for s, u in exact.units] == [
        (s.name, u.index) for s, u in plain.units
    ]
    torch.testing.assert_close(exact.masked, plain.masked, rtol=1e-5, atol=0)
    torch.testing.assert_close(exact.intact, plain.intact, rtol=1e-5, atol=0)
    # The agreement means something: masking moves the losses by much more than the tolerance.
    assert (plain.masked - plain.intact).abs().max() > 1e-2


def test_a_small_budget_gives_the_same_losses(model: PreTrainedModel) -> None:
    sites, rows = find_sites(model), examples()
    torch.testing.assert_close(
        exact_losses(model, sites, rows, memory_budget=20_000).masked,
        exact_losses(model, sites, rows).masked,
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt_neox"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attention_implementations(name: str, attention: str) -> None:
    model = tiny_model(name, attn_implementation=attention)
    sites, rows = find_sites(model), examples()
    torch.testing.assert_close(
        exact_losses(model, sites, rows).masked,
        plain_losses(model, sites, rows).masked,
        rtol=1e-5,
        atol=0,
    )


def test_post_norm_opt_equals_plain() -> None:
    model = tiny_model("opt", do_layer_norm_before=False)
    sites, rows = find_sites(model, mlp_unit_size=8), examples()
    torch.testing.assert_close(
        exact_losses(model, sites, rows).masked,
        plain_losses(model, sites, rows).masked,
        rtol=1e-5,
        atol=0,
    )


def test_losses_are_means_over_scored_tokens(model: PreTrainedModel) -> None:
    rows = examples()
    losses = exact_losses(model, find_sites(model), rows)
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
    losses = exact_losses(model, find_sites(model), rows)
    torch.testing.assert_close(losses.intact.float(), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_the_model_comes_back_as_it_was(model: PreTrainedModel) -> None:
    model.train()
    model.get_decoder().eval()  # a mixture of modes must survive
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact_losses(model, find_sites(model), examples(3))
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
        exact_losses(llama, find_sites(llama), rows)
    for module in llama.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sites, rows = find_sites(model), examples()
    losses = exact_losses(model, sites, rows)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    widened = plain_losses(model.float(), sites, rows)
    torch.testing.assert_close(losses.masked, widened.masked, rtol=1e-5, atol=0)


def losses_of(masked: list[list[float]], intact: list[float]) -> UnitLosses:
    site = find_sites(tiny_model("llama"))[0]
    units = [(site, site.units[index]) for index in range(len(masked))]
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


def test_nonfinite_intact_loss_is_an_error() -> None:
    with pytest.raises(ValueError, match="not finite on 1 of 2 calibration examples"):
        causal_scores(losses_of([[1, 1]], [1, math.nan]), subsets=1)


def test_more_subsets_than_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 calibration examples cannot be split into 3"):
        causal_scores(losses_of([[1, 1]], [1, 1]), subsets=3)


OUT_OF_MEMORY = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
    "python": MemoryError(),
}


def limit_memory(monkeypatch: pytest.MonkeyPatch, tokens: int, error: Exception) -> list[int]:
    """Let the masked streams of so many tokens raise `error`; return the list of what was tried."""
    tried = []

    class Limited(Wavefront):
        def __init__(
            self,
            model: PreTrainedModel,
            layers: list[nn.Module],
            sites: list[Site],
            batch: Batch,
            torch_compile: bool,
        ) -> None:
            super().__init__(model, layers, sites, batch, torch_compile)
            self.tokens_of_a_stream = batch.input_ids.numel()

        def masked_losses(self, jobs: list[tuple[Site, Unit]]) -> torch.Tensor:
            tried.append(len(jobs) * self.tokens_of_a_stream)
            if tried[-1] > tokens:
                raise error
            return super().masked_losses(jobs)

    monkeypatch.setattr("optimum_cap.chunks.Wavefront", Limited)
    return tried


@pytest.mark.parametrize(
    ("device", "tokens"),
    [("cuda", 1000), ("cpu", 100), ("python", 30)],
    ids=["fewer streams", "one stream", "fewer examples"],
)
def test_out_of_memory_goes_on_with_less(
    device: str,
    tokens: int,
    llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sites, rows = find_sites(llama, mlp_unit_size=4), examples(12)
    expected = exact_losses(llama, sites, rows)
    tried = limit_memory(monkeypatch, tokens, OUT_OF_MEMORY[device])
    losses = exact_losses(llama, sites, rows)
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
        exact_losses(llama, find_sites(llama), examples(3))


def test_another_error_is_no_lack_of_memory(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = limit_memory(monkeypatch, 0, RuntimeError("a wrong shape"))
    with pytest.raises(RuntimeError, match="a wrong shape"):
        exact_losses(llama, find_sites(llama), examples(3))
    assert len(tried) == 1
