"""Samples answers to many prompts, in batches shared by processes and stored for resuming."""

import functools
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_cap.config import CAPConfig
from optimum_cap.data import Batch, CalibrationExample, batches
from optimum_cap.generation.cache import AnswerStore
from optimum_cap.generation.sampling import (
    Answer,
    Sampling,
    examples_per_batch,
    sample_answers,
)
from optimum_cap.models import evaluation_mode, float32_on_cpu
from optimum_cap.progress import progress_bar
from optimum_cap.runtime import ProcessGroup, digest_of, each_in_memory, resume_hint_on_stop

_TOKENS_SHOWN = 20  # between two updates of the progress bar


@dataclass(frozen=True)
class AnswerSampler:
    """Samples answers of a model.

    Attributes:
        model: The model.
        sampling: The settings.
        seed: Seed of all answers.
        memory_budget: As in `CAPConfig`.
        process_group: The processes that share the prompts.
        store: Stores finished answers; may be `None`.
    """

    model: PreTrainedModel
    sampling: Sampling
    seed: int
    memory_budget: int | str
    process_group: ProcessGroup
    store: AnswerStore | None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: CAPConfig,
        process_group: ProcessGroup,
    ) -> "AnswerSampler":
        """Return a sampler with the settings of a config."""
        ends = _end_tokens(model, tokenizer)
        pad = tokenizer.pad_token_id
        sampling = Sampling(
            config.temperature,
            config.top_p,
            config.max_new_tokens,
            ends,
            ends[0] if pad is None else pad,
        )
        folder = config.resume_dir
        store = None if folder is None else AnswerStore(folder, model, sampling)
        return cls(model, sampling, config.seed, config.memory_budget, process_group, store)

    def sample(self, prompts: list[CalibrationExample], attempt: int) -> list[Answer]:
        """Return one answer to each prompt, on all processes.

        Args:
            prompts: The prompts.
            attempt: Number of previous answers to these prompts.
        """
        seeds = [_seed(prompt, self.seed, attempt) for prompt in prompts]
        longest = max(len(prompt.input_ids) for prompt in prompts)
        size = examples_per_batch(
            self.model, longest, self.sampling.max_new_tokens, self.memory_budget
        )
        planned = batches(prompts, size)
        shared = self.process_group.share([len(batch.positions) for batch in planned])
        mine = [planned[index] for index in shared]
        answers: dict[int, Answer] = {}
        total = sum(len(batch.positions) for batch in mine)

        def status() -> str:
            return f"the model had answered {len(answers)} of {total} prompts"

        with (
            resume_hint_on_stop(status, self.store),
            evaluation_mode(self.model),
            float32_on_cpu(self.model),
            progress_bar(total=total, desc="Answering") as progress,
        ):
            for batch in mine:
                answers |= self._stored(batch, prompts, seeds) or self._sampled(
                    batch, prompts, seeds, progress
                )
                progress.update(len(batch.positions))
            gathered = self.process_group.all_gather(answers)
        everyone = {position: answer for each in gathered for position, answer in each.items()}
        return [everyone[position] for position in range(len(prompts))]

    def _stored(
        self, batch: Batch, prompts: list[CalibrationExample], seeds: list[int]
    ) -> dict[int, Answer] | None:
        """Return the answers to a batch by position, if all are stored.

        Otherwise all are sampled again, so that they are bit-identical to an uninterrupted run.
        """
        if self.store is None:
            return None
        answers = {}
        for position in batch.positions:
            answer = self.store.get(prompts[position].input_ids, seeds[position])
            if answer is None:
                return None
            answers[position] = answer
        return answers

    def _sampled(
        self, batch: Batch, prompts: list[CalibrationExample], seeds: list[int], progress: Any
    ) -> dict[int, Answer]:
        """Sample and store the answers to a batch, by position."""

        def sample(part: Batch) -> list[Answer]:
            of_part = [seeds[position] for position in part.positions]
            show = functools.partial(_show_tokens, progress, self.sampling)
            return sample_answers(self.model, part, of_part, self.sampling, show)

        answers = {}
        for part, results in each_in_memory([batch], sample):
            for position, answer in zip(part.positions, results, strict=True):
                answers[position] = answer
                if self.store is not None:
                    self.store.put(prompts[position].input_ids, seeds[position], answer)
        return answers


def _show_tokens(progress: Any, sampling: Sampling, count: int) -> None:
    """Show the length of the longest answer of a batch so far."""
    if count % _TOKENS_SHOWN == 0:
        progress.set_postfix_str(f"token {count} of {sampling.max_new_tokens}")


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that end an answer: the checkpoint's and the tokenizer's."""
    of_model = getattr(model.generation_config, "eos_token_id", None)
    ids = of_model if isinstance(of_model, list | tuple) else [of_model]
    return tuple(sorted({int(each) for each in (*ids, tokenizer.eos_token_id) if each is not None}))


def _seed(prompt: CalibrationExample, seed: int, attempt: int) -> int:
    """Return the seed of an answer, which depends only on its prompt and these numbers."""
    return int(digest_of(seed, attempt, prompt.input_ids)[:15], 16)
