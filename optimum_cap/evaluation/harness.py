"""The interface to lm-evaluation-harness."""

import copy
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from optimum_cap.data import CalibrationExample
from optimum_cap.evaluation.tasks import TASKS, Question, extract_of
from optimum_cap.models import device_of
from optimum_cap.version import install_command


@dataclass(frozen=True)
class Questions:
    """The questions of a task with their prompts.

    Attributes:
        name: Name of the task.
        questions: The questions.
        prompts: The text that the model continues, per question.
        examples: The question with its worked answer, tokenized; `None` if the model cannot take
            it whole.
        losses: Mean loss over the tokens of the worked answer in nats, per question; `None` if it
            is not finite or there is no example.
        excluded: Number of questions left out because the model was calibrated on them.
        max_new_tokens: Longest answer, in tokens.
        source: Source of the questions, for the record.
    """

    name: str
    questions: list[Question]
    prompts: list[str]
    examples: list[CalibrationExample | None]
    losses: list[float | None]
    excluded: int
    max_new_tokens: int
    source: dict[str, Any]


# The engine


def import_harness(module: str) -> Any:
    """Import a module of lm-evaluation-harness when it is needed, because it takes seconds.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"evaluation needs lm-evaluation-harness ({error}): run {install_command('eval')}"
        ) from error


def harness_model(model: PreTrainedModel, tokenizer: Any, length: int, batch_size: int) -> Any:
    """Wrap `model` as a language model of lm-evaluation-harness.

    Args:
        model: The model.
        tokenizer: Its tokenizer; it is not changed.
        length: Longest sequence, in tokens.
        batch_size: Sequences per batch.
    """
    lm = import_harness("lm_eval.models.huggingface").HFLM(
        pretrained=model,
        # HFLM sets a padding token and a padding side on the tokenizer.
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=batch_size,
        max_length=length,
        # A chat template adds its own special tokens; None keeps the tokenizer's default.
        add_bos_token=False if getattr(tokenizer, "chat_template", None) else None,
        softmax_dtype="float32",
    )
    # HFLM uses the device of the first weights, which may be offloaded; `device` has no setter.
    lm._device = device_of(model)
    return lm


def token_log_likelihoods(lm: Any, requests: list[Any]) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each request `(None, given ids, ids to predict)`.

    The public `loglikelihood` takes text, which it would tokenize again for each window.
    """
    scored: list[tuple[float, bool]] = lm._loglikelihood_tokens(requests)
    return scored


def harness_task(job: Questions) -> Any:
    """Return a task of lm-evaluation-harness with prepared prompts, greedy decoding, one metric."""
    import datasets

    rows = [
        {"prompt": prompt, "target": question.answer}
        for prompt, question in zip(job.prompts, job.questions, strict=True)
    ]
    extract = extract_of(job.name)

    def dataset(**_: Any) -> dict[str, Any]:
        return {"test": datasets.Dataset.from_list(rows)}

    def grade(row: dict[str, str], responses: list[str]) -> dict[str, float]:
        return {"accuracy": float(extract(responses[0]) == extract(row["target"]))}

    return import_harness("lm_eval.api.task").ConfigurableTask(
        config={
            "task": job.name,
            "custom_dataset": dataset,
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "target",
            "num_fewshot": 0,
            "process_results": grade,
            "metric_list": [
                {"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}
            ],
            "generation_kwargs": {
                "until": list(TASKS[job.name].until),
                "do_sample": False,
                "max_gen_toks": job.max_new_tokens,
            },
        }
    )


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence the harness's warnings about how it is called, which the user cannot act on."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
