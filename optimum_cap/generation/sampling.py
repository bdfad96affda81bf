"""Samples continuations of prompts, each with its own random numbers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from optimum_cap.data import Batch
from optimum_cap.models import activation_bytes_per_token, device_of
from optimum_cap.runtime import budget_bytes

_NUCLEUS = 64  # tokens sorted at first; the nucleus rarely has more
# More rows per batch hardly save time once reading the weights is no longer the bottleneck.
LARGEST_BATCH = {"cpu": 16, "cuda": 64}


@dataclass(frozen=True)
class Answer:
    """A model's answer to a prompt.

    Attributes:
        ids: Its tokens, including the one that ends it.
        finished: Whether the model ended it; otherwise it was cut off at the token limit.
    """

    ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        temperature: Divides the logits.
        top_p: Tokens are drawn from the smallest set with this total probability.
        max_new_tokens: Longest answer, in tokens.
        end_tokens: Tokens that end an answer.
        pad_token: Pads shorter rows of a batch; nothing attends to it.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    end_tokens: tuple[int, ...]
    pad_token: int


def sample_answers(
    model: PreTrainedModel,
    batch: Batch,
    seeds: list[int],
    sampling: Sampling,
    on_token: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Sample one answer to each prompt of a batch.

    An answer depends on its prompt and its seed. The other rows of the batch affect the logits only
    by rounding.

    Args:
        model: The model, in evaluation mode.
        batch: The prompts.
        seeds: One seed for each prompt.
        sampling: The settings.
        on_token: Called with the number of tokens of the longest answer so far.

    Raises:
        ValueError: The model computes NaN or infinite logits.
    """
    input_ids, attention_mask = _padded_on_the_left(batch, sampling.pad_token)
    device = device_of(model)
    config = GenerationConfig(
        do_sample=False,  # `_SampledTokens` draws the tokens
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.end_tokens),
        pad_token_id=sampling.pad_token,
        disable_compile=True,
    )
    sampled = _SampledTokens(seeds, sampling, on_token)
    with no_other_generation_settings(model):
        sequences = model.generate(
            inputs=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([sampled]),
        )
    return [
        _until_end(ids, sampling.end_tokens) for ids in sequences[:, input_ids.shape[1] :].tolist()
    ]


def examples_per_batch(
    model: PreTrainedModel, longest: int, max_new_tokens: int, memory_budget: int | str
) -> int:
    """Return how many prompts to answer at a time.

    The number does not depend on the free memory, so that runs are bit-reproducible.

    Args:
        model: The model.
        longest: Tokens of the longest prompt.
        max_new_tokens: Tokens of the longest answer.
        memory_budget: As in `CAPConfig`; a number of bytes can only lower the result.
    """
    config = model.config.get_text_config(decoder=True)
    most = LARGEST_BATCH["cuda" if device_of(model).type == "cuda" else "cpu"]
    if memory_budget == "auto":
        return most
    # Keys and values in float32, for as many heads as queries have, plus one layer's copy as it
    # grows.
    cache = 8 * (config.num_hidden_layers + 1) * config.hidden_size * (longest + max_new_tokens)
    logits = 4 * 4 * config.vocab_size
    prefill = longest * activation_bytes_per_token(model, longest)
    return max(1, min(most, budget_bytes(memory_budget, model) // (cache + logits + prefill)))


def _padded_on_the_left(batch: Batch, pad_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and attention mask of a batch with the padding moved to the left."""
    longest = batch.input_ids.shape[1]
    input_ids = torch.full_like(batch.input_ids, pad_token)
    mask = torch.zeros_like(batch.input_ids)
    for row, length in enumerate(batch.real.sum(1).tolist()):
        input_ids[row, longest - length :] = batch.input_ids[row, :length]
        mask[row, longest - length :] = 1
    return input_ids, mask


def _until_end(ids: list[int], end_tokens: tuple[int, ...]) -> Answer:
    ends = [position for position, token in enumerate(ids) if token in end_tokens]
    return Answer(tuple(ids[: ends[0] + 1] if ends else ids), bool(ends))


class _SampledTokens(LogitsProcessor):
    """Draws the next token of each row, and makes it the only one that can be chosen.

    `generate` draws the tokens of all rows from one generator, so an answer would depend on the
    others in its batch.

    Args:
        seeds: One seed for each row.
        sampling: The temperature and the probability of the nucleus.
        on_token: Called with the number of tokens drawn for each row.
    """

    def __init__(
        self, seeds: list[int], sampling: Sampling, on_token: Callable[[int], None]
    ) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._on_token = on_token
        self._drawn = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `[rows, vocabulary]` scores that are minus infinity except for one token."""
        probabilities = (scores.float() / self._temperature).softmax(-1)
        if probabilities.isnan().any():
            raise ValueError(
                "the model computes NaN or infinite logits, so it cannot answer prompts: check its "
                "weights and the dtype of the model"
            )
        sorted_probabilities, tokens = self._nucleus(probabilities)
        cumulative = sorted_probabilities.double().cumsum(-1)
        # A token belongs to the nucleus if the tokens before it do not reach the probability
        # `top_p`.
        inside = cumulative - sorted_probabilities < self._top_p
        # In vocabulary order: ordered by probability, tokens equally probable up to rounding could
        # swap places and change which token is drawn.
        tokens, order = tokens.sort(-1)
        cumulative = (sorted_probabilities.double() * inside).gather(1, order).cumsum(-1)
        draws = torch.stack(
            [torch.rand((), generator=each, dtype=torch.float64) for each in self._generators]
        ).to(cumulative.device)
        # The first token whose cumulative probability exceeds the draw, which is in the nucleus.
        places = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(-1)
        chosen = tokens.gather(1, places[:, None])
        self._drawn += 1
        self._on_token(self._drawn)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def _nucleus(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest probabilities of each row, which cover the nucleus, and their tokens.

        Sorting the whole vocabulary would take longer than the forward pass of a small model.
        """
        count = _NUCLEUS
        while True:
            count = min(count, probabilities.shape[1])
            largest, tokens = probabilities.topk(count)
            if count == probabilities.shape[1] or (largest.sum(-1) >= self._top_p).all():
                return largest, tokens
            count *= 8


@contextmanager
def no_other_generation_settings(model: PreTrainedModel) -> Iterator[None]:
    """Ignore the checkpoint's settings for sampling, penalties and lengths.

    `generate` would use them for whatever the call does not set.
    """
    original = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = original
