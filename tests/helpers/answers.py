"""A tiny model that answers prompts, and what it answers."""

from typing import Any

import pytest
from transformers import PreTrainedModel

from helpers.calibration import ROWS
from helpers.tiny_models import tiny_tokenizer
from optimum_cap import CAPConfig
from optimum_cap.config import effective
from optimum_cap.data.batches import Batch
from optimum_cap.generation import AnsweredPrompts, answer_prompts, sampler
from optimum_cap.generation.sampling import Answer, Sampling
from optimum_cap.runtime.distributed import ProcessGroup

TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
FIELDS: dict[str, Any] = {
    "sparsity": 0.5,
    "recipe": "wanda",
    "dataset": ROWS,
    "num_samples": 8,
    "answers": "model",
    "max_new_tokens": 12,
}


def config(**changes: Any) -> CAPConfig:
    """Settings of a small pruning on the model's own answers."""
    return CAPConfig(**effective(FIELDS, changes))


def answered(
    model: PreTrainedModel, tokenizer: Any = None, group: Any = None, **changes: Any
) -> AnsweredPrompts:
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    return answer_prompts(model, tokenizer, config(**changes), group or ProcessGroup())


def let_it_answer(monkeypatch: pytest.MonkeyPatch, *rounds: Any) -> list[int]:
    """Replace the answers of the model; return the list of the sizes of the batches it gets.

    Args:
        monkeypatch: The fixture.
        *rounds: For each round of prompts, a function from the text of a prompt to that of its
            answer, or to a pair of this and of whether the answer is finished. The last one serves
            all further rounds.
    """
    sizes: list[int] = []
    tokenizer = tiny_tokenizer()
    known: dict[str, int] = {}

    def sample(
        model: PreTrainedModel, batch: Batch, seeds: list[int], sampling: Sampling, *rest: Any
    ) -> list[Answer]:
        sizes.append(len(batch.positions))
        found = []
        for ids, real in zip(batch.input_ids, batch.real, strict=True):
            prompt = tokenizer.decode(ids[real], skip_special_tokens=True).rstrip("\n")
            number = known[prompt] = known.get(prompt, 0) + 1
            text = rounds[min(number, len(rounds)) - 1](prompt)
            text, finished = text if isinstance(text, tuple) else (text, True)
            answer = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            found.append(Answer(answer + (2,) * finished, finished))
        return found

    monkeypatch.setattr(sampler, "sample_answers", sample)
    return sizes
