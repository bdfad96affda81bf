"""Accuracy and perplexity of a model, dense or pruned, with lm-evaluation-harness as the engine.

`evaluate` follows the data flow: tasks, model, exclusions, responses or losses, results.
"""

import importlib.metadata
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from optimum_cap.data import load_tokenizer, usable_tokenizer
from optimum_cap.evaluation.harness import (
    HarnessTask,
    end_tokens,
    find_harness_task,
    import_harness,
    quiet_harness,
)
from optimum_cap.evaluation.measure import BatchStore, Engine, measure, measure_harness_task
from optimum_cap.evaluation.prepare import LONGEST_WINDOW, Draw, check_tokens, prepare
from optimum_cap.evaluation.prompts import is_chat, may_need_examples
from optimum_cap.evaluation.results import (
    AccuracyResult,
    Evaluation,
    Result,
    hardly_answers_warning,
)
from optimum_cap.evaluation.samples import SampleLog, check_sample_log
from optimum_cap.evaluation.tasks import (
    DEFAULT_TASKS,
    HARNESS_PREFIX,
    TaskItems,
    load_examples,
    load_items,
    resolve_tasks,
    result_name,
    task_of,
)
from optimum_cap.models import (
    check_saved_with_lm_head,
    device_of,
    evaluation_mode,
    float32_on_cpu,
    has_lm_head,
    load_model,
    longest_sequence,
    number_of_embeddings,
)

logger = logging.get_logger(__name__)

_VERSIONED = ("optimum-cap", "lm-eval", "torch", "transformers")

TaskData = dict[str, TaskItems | HarnessTask]


def load_task_data(
    tasks: str | Iterable[str],
    data_dir: str | Path | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
) -> TaskData:
    """Read the data of tasks, so that bad data is reported before a model is loaded.

    Args:
        tasks: Names of tasks or groups, as a list or as comma-separated text.
        data_dir: Folder with the files of the data sets; `None` downloads them from the Hub.
        num_fewshot: Number of worked examples in prompts; `None` is each task's default.
        include_path: Folder with definitions of tasks for lm-evaluation-harness, besides its own.

    Returns:
        Per task, its questions or texts and their source.

    Raises:
        ValueError: A task is unknown, or its data cannot be used.
        FileNotFoundError: A file does not exist; the message names the paths that were tried.
        ImportError: lm-evaluation-harness is not installed.
    """
    names = resolve_tasks(tasks)
    if include_path is not None and not any(name.startswith(HARNESS_PREFIX) for name in names):
        raise ValueError(
            f"include_path {include_path} has no effect, as no task is one of "
            f"lm-evaluation-harness: name one as {HARNESS_PREFIX}NAME, or leave it out"
        )
    import_harness("lm_eval")
    folder = None if data_dir is None else Path(data_dir)
    data: TaskData = {}
    for name in names:
        if name.startswith(HARNESS_PREFIX):
            in_harness = name.removeprefix(HARNESS_PREFIX)
            data[name] = find_harness_task(in_harness, include_path)
            continue
        key = result_name(name)
        if key in data:
            raise ValueError(
                f"two tasks have the name {key!r} in the results: rename the file of one of them"
            )
        needs_examples = task_of(name).shows_examples and may_need_examples(name, num_fewshot)
        examples, source = load_examples(name, folder) if needs_examples else ((), {})
        data[key] = TaskItems(*load_items(name, folder), examples, source)
    return data


def check_counts(
    limit: int | None,
    batch_size: int,
    num_fewshot: int | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Check the numbers of an evaluation.

    Raises:
        ValueError: `limit`, `batch_size` or `max_new_tokens` is not a positive integer, or
            `num_fewshot` is negative or not an integer.
    """
    for label, value, least in (
        ("limit", limit, 1),
        ("batch_size", batch_size, 1),
        ("num_fewshot", num_fewshot, 0),
        ("max_new_tokens", max_new_tokens, 1),
    ):
        if value is None and label != "batch_size":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{label} must be an integer of at least {least}, got {value!r}")


def evaluate(
    model: PreTrainedModel | str | Path,
    tokenizer: Any = None,
    *,
    tasks: str | Iterable[str] = DEFAULT_TASKS,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    num_fewshot: int | None = None,
    max_new_tokens: int | None = None,
    include_path: str | Path | None = None,
    log_samples: str | Path | None = None,
    resume_dir: str | Path | None = None,
    data: TaskData | None = None,
    **load_options: Any,
) -> Evaluation:
    """Measure accuracy on questions with worked answers, and perplexity on texts.

    Questions go through the tokenizer's chat template if it has one, with an instruction on the
    form of the answer; otherwise worked examples show it. Decoding is greedy. Items that a pruned
    model was calibrated on (`model.pruning_record`) are left out. A warning is logged if a model
    rarely gives an answer that can be extracted.

    Args:
        model: A causal language model or its name. It is not changed.
        tokenizer: The tokenizer or processor; `None` loads the one saved with the model.
        tasks: Names of tasks or groups, as a list or as comma-separated text.
        data_dir: Folder with the files of the data sets; `None` downloads them from the Hub.
        limit: Number of questions, or windows of text, per task; `None` takes all. The same
            `seed` draws the same ones for every model, except those left out. Tasks of
            lm-evaluation-harness take the first ones, as the harness does.
        batch_size: Questions per batch. Windows are batched up to 2048 tokens.
        seed: Seed for drawing `limit` items and worked examples.
        num_fewshot: Number of worked examples in each prompt. They come from the split `train`, or
            from questions that are then left out. `None` is 5 for generated answers of a model
            without a chat template, a lm-evaluation-harness task's own number, and otherwise 0.
        max_new_tokens: Longest answer in tokens; `None` is each task's limit. The model's context
            length may lower it.
        include_path: Folder with definitions of tasks for lm-evaluation-harness, besides its own.
        log_samples: JSON lines file, or folder for one file per task, to write prompts, responses,
            extracted and expected answers, lengths, and log-likelihoods of choices to.
        resume_dir: Folder for finished batches, from which an evaluation with the same model and
            settings resumes; `None` stores nothing.
        data: The result of `load_task_data`; replaces `tasks`, `data_dir` and `include_path`.
        **load_options: Passed to `from_pretrained` if `model` is a name: `dtype`, `revision`, ...

    Returns:
        Accuracies as fractions of 1, losses in nats. A perplexity that is not finite is `None`,
        with an entry in `errors`; other tasks keep their results.

    Raises:
        ValueError: A task is unknown, its data cannot be used or is entirely in the calibration
            set, a question leaves no room for an answer, there are too few worked examples, the
            chat template leaves out the answers, the tokenizer is not the model's, a number is out
            of range, or `log_samples` cannot be written.
        TypeError: `tokenizer` is not a tokenizer.
        FileNotFoundError: A file does not exist.
        ImportError: lm-evaluation-harness is not installed.
    """
    check_counts(limit, batch_size, num_fewshot, max_new_tokens)
    if log_samples is not None:
        check_sample_log(log_samples)
    if data is None:
        data = load_task_data(tasks, data_dir, num_fewshot, include_path)
    start = time.monotonic()
    model, tokenizer = _loaded(model, tokenizer, load_options)
    length = _length(model, tokenizer)
    draw = Draw(_calibration_digests(model), limit, seed, num_fewshot, max_new_tokens)
    log = None if log_samples is None else SampleLog(log_samples)
    results: dict[str, Result] = {}
    with (
        float32_on_cpu(model),
        evaluation_mode(model),
        _greedy(model, tokenizer),
        quiet_harness(),
    ):
        jobs = {
            name: prepare(name, items, tokenizer, length, draw)
            for name, items in data.items()
            if isinstance(items, TaskItems)
        }
        if jobs:  # the others are harness tasks; the harness tokenizes itself
            check_tokens(list(jobs.values()), tokenizer, number_of_embeddings(model))
        store = None if resume_dir is None else BatchStore(resume_dir, model, batch_size)
        engine = Engine(model, tokenizer, length, batch_size, limit, num_fewshot, store)
        for name, items in data.items():
            if isinstance(items, TaskItems):
                results[name], samples = measure(engine, jobs[name])
            else:
                results[name], samples = measure_harness_task(engine, items)
            if log is not None and samples:
                log.add(name, samples)
    _warn_if_hardly_any_answers(results)
    return Evaluation(
        model=model.name_or_path or type(model).__name__,
        tasks=results,
        settings={
            "seed": seed,
            "limit": limit,
            "batch_size": batch_size,
            "num_fewshot": num_fewshot,
            "max_new_tokens": max_new_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device_of(model).type,
            "chat_template": is_chat(tokenizer),
            "calibration_digests": len(draw.seen),
        },
        versions={name: importlib.metadata.version(name) for name in _VERSIONED},
        seconds=time.monotonic() - start,
    )


def _loaded(
    model: PreTrainedModel | str | Path, tokenizer: Any, options: dict[str, Any]
) -> tuple[PreTrainedModel, Any]:
    if isinstance(model, str | Path):
        loaded = load_model(model, **options)
        check_saved_with_lm_head(loaded.config, str(model))
    elif options:
        raise ValueError(
            f"{', '.join(options)} need the name of a model to load, got a loaded "
            f"{type(model).__name__}: leave them out"
        )
    else:
        loaded = model
        if not has_lm_head(model):
            raise ValueError(
                f"{type(model).__name__} has no LM head, so it predicts no tokens to evaluate: "
                "choose a causal language model"
            )
    if tokenizer is None:
        shared = ("revision", "token", "trust_remote_code")
        tokenizer_options = {name: options[name] for name in shared if name in options}
        tokenizer = load_tokenizer(loaded.name_or_path, **tokenizer_options)
    return loaded, usable_tokenizer(tokenizer)


def _length(model: PreTrainedModel, tokenizer: Any) -> int:
    """Return the maximum number of tokens of model and tokenizer; 2048 if neither has a limit."""
    # Tokenizers without a limit report an extremely large one.
    token_limit = min(getattr(tokenizer, "model_max_length", None) or 10**12, 10**12)
    limit = min(longest_sequence(model) or 10**12, token_limit)
    return LONGEST_WINDOW if limit >= 10**12 else int(limit)


def _calibration_digests(model: PreTrainedModel) -> frozenset[str]:
    record = getattr(model, "pruning_record", None)
    # A criterion that needs no data leaves the calibration record empty.
    return frozenset(record.calibration.get("digests", ()) if record is not None else ())


def _warn_if_hardly_any_answers(results: dict[str, Result]) -> None:
    for name, result in results.items():
        if isinstance(result, AccuracyResult) and result.hardly_answers:
            logger.warning(hardly_answers_warning(name, result))


@contextmanager
def _greedy(model: PreTrainedModel, tokenizer: Any) -> Iterator[None]:
    """Generate greedily, ignoring the checkpoint's settings for sampling, penalties and lengths.

    The end-of-sequence token of the tokenizer ends a response too.
    """
    original = model.generation_config
    names = ("bos_token_id", "pad_token_id")
    settings = {name: getattr(original, name) for name in names}
    ends = sorted(end_tokens(model, tokenizer)) or None
    model.generation_config = GenerationConfig(**settings, eos_token_id=ends)
    try:
        yield
    finally:
        model.generation_config = original
