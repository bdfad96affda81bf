"""Tokens are drawn from the nucleus, and an answer depends on its prompt and its seed alone."""

from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_model
from transformers import (
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from optimum_cap.data.batches import batches
from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.generation.sampling import (
    Answer,
    Sampling,
    _SampledTokens,
    examples_per_batch,
    sample_answers,
)

SAMPLING = Sampling(0.6, 0.95, 12, (2,), 0)


def prompts(count: int = 5) -> list[CalibrationExample]:
    """Prompts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        ids = torch.randint(4, 60, (4 + 3 * index,), generator=generator)
        made.append(CalibrationExample(ids, torch.arange(len(ids)) > 0, "random", index, "0" * 64))
    return made


def sampled(
    model: PreTrainedModel, size: int, sampling: Sampling = SAMPLING, seed: int = 0
) -> list[Answer]:
    """Answers to the prompts, in batches of `size`."""
    examples = prompts()
    answers: dict[int, Answer] = {}
    with torch.no_grad():
        for batch in batches(examples, size):
            seeds = [seed + position for position in batch.positions]
            answers |= zip(
                batch.positions, sample_answers(model, batch, seeds, sampling), strict=True
            )
    return [answers[position] for position in range(len(examples))]


def drawn(logits: torch.Tensor, count: int, temperature: float, top_p: float) -> torch.Tensor:
    """How often each token is drawn, as a share of `count` draws."""
    settings = Sampling(temperature, top_p, 1, (2,), 0)
    process = _SampledTokens(list(range(count)), settings, lambda tokens: None)
    scores = process(torch.zeros(count, 1, dtype=torch.long), logits.expand(count, -1))
    assert (scores.isfinite().sum(-1) == 1).all()
    return torch.bincount(scores.argmax(-1), minlength=len(logits)) / count


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.95), (1.0, 1.0), (1.5, 0.3)])
@pytest.mark.parametrize("vocabulary", [12, pytest.param(700, marks=pytest.mark.slow)])
def test_frequencies_are_those_of_transformers(
    temperature: float, top_p: float, vocabulary: int
) -> None:
    """The nucleus of 700 nearly equal tokens is larger than what is sorted at first."""
    spread = 2.0 if vocabulary == 12 else 0.1
    logits = spread * torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    warped = TemperatureLogitsWarper(temperature)(None, logits[None])
    expected = TopPLogitsWarper(top_p)(None, warped)[0].softmax(-1)
    count = 20_000
    shares = drawn(logits, count, temperature, top_p)
    assert not shares[expected == 0].any(), "a token outside of the nucleus"
    errors = (expected * (1 - expected) / count).sqrt()
    assert ((shares - expected).abs() <= 5 * errors + 1e-9).all()


def test_an_answer_does_not_depend_on_its_batch(model: PreTrainedModel) -> None:
    alone = sampled(model, 1)
    assert alone == sampled(model, 5)
    assert len({answer.ids for answer in alone}) == 5
    assert sampled(model, 5, seed=100) != alone


def test_tokens_are_those_that_the_model_predicts_without_padding(model: PreTrainedModel) -> None:
    """With so low a temperature, each token is the most probable one after those before it."""
    greedy = Sampling(1e-4, 0.5, 12, (2,), 0)
    for prompt, answer in zip(prompts(), sampled(model, 5, greedy), strict=True):
        ids = torch.cat([prompt.input_ids, torch.tensor(answer.ids)])[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt.input_ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == list(answer.ids)


def test_an_answer_ends_with_the_end_token_or_is_cut_off(llama: PreTrainedModel) -> None:
    answers = [each for seed in range(0, 500, 50) for each in sampled(llama, 5, seed=seed)]
    assert {answer.finished for answer in answers} == {True, False}
    for answer in answers:
        assert answer.ids.count(2) == answer.finished
        assert (answer.ids[-1] == 2) == answer.finished
        assert answer.finished or len(answer.ids) == 12


def test_settings_of_the_checkpoint_have_no_effect(llama: PreTrainedModel) -> None:
    expected = sampled(llama, 5)
    changes = {"repetition_penalty": 9.0, "max_length": 7, "do_sample": True, "top_k": 1}
    llama.generation_config.update(**changes, suppress_tokens=list(range(30)))
    before = llama.generation_config
    assert sampled(llama, 5) == expected
    assert llama.generation_config is before


def test_logits_that_are_not_finite_stop_the_run(llama: PreTrainedModel) -> None:
    llama.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match="computes NaN or infinite logits, so it cannot answer"):
        sampled(llama, 5)


@pytest.mark.parametrize(("budget", "size"), [("auto", 16), ("100GB", 16), (200_000, 3), (1, 1)])
def test_a_memory_budget_lowers_the_size_of_batches(budget: Any, size: int) -> None:
    assert examples_per_batch(tiny_model("llama"), 20, 12, budget) == size
