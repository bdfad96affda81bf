"""The interface to lm-evaluation-harness."""

import bisect
import copy
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LogitsProcessorList, PreTrainedModel

from optimum_cap.evaluation.prompts import is_chat
from optimum_cap.evaluation.tasks import HARNESS_PREFIX
from optimum_cap.models import device_of
from optimum_cap.runtime import digest_of
from optimum_cap.text import did_you_mean
from optimum_cap.version import install_command

_FEWSHOT_SEED = 1234  # the harness's command line draws worked examples with it


def import_harness(module: str) -> Any:
    """Import a module of lm-evaluation-harness only when needed, because importing takes seconds.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"evaluation needs lm-evaluation-harness ({error}): run {install_command('eval')}"
        ) from error


def harness_model(
    model: PreTrainedModel, tokenizer: Any, length: int, batch_size: int, plain: bool = False
) -> Any:
    """Wrap `model` as a language model of lm-evaluation-harness.

    Args:
        model: The model.
        tokenizer: Its tokenizer; it is not changed.
        length: Longest sequence, in tokens.
        batch_size: Sequences per batch.
        plain: Whether prompts are plain texts, to which the tokenizer adds its special tokens;
            otherwise the chat template, if there is one, has added them.
    """
    prints_special = is_chat(tokenizer) and not plain
    lm = import_harness("lm_eval.models.huggingface").HFLM(
        pretrained=model,
        # HFLM sets a padding token and a padding side on the tokenizer.
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=batch_size,
        max_length=length,
        # A chat template adds its own special tokens; None keeps the tokenizer's default.
        add_bos_token=False if prints_special else None,
        softmax_dtype="float32",
    )
    # HFLM uses the device of the first weight, which may be offloaded; `device` has no setter.
    lm._device = device_of(model)
    return lm


def token_log_likelihoods(lm: Any, requests: list[Any]) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each request `(None, given ids, ids to predict)`.

    The public `loglikelihood` takes text and would tokenize it again for each window.
    """
    scored: list[tuple[float, bool]] = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    return scored


def log_likelihoods(lm: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Return the log-likelihood of each `(context, continuation)`, in nats."""
    instance = import_harness("lm_eval.api.instance").Instance
    requests = [
        instance("loglikelihood", {}, pair, position) for position, pair in enumerate(pairs)
    ]
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]


# Generation


@dataclass(frozen=True)
class Response:
    """A response of a model.

    Attributes:
        text: The text, without the stop text.
        tokens: Its length in tokens, without the end-of-sequence token.
        hit_limit: Whether it was cut off at the length limit.
    """

    text: str
    tokens: int
    hit_limit: bool


def in_order_of_length(lm: Any, prompts: Sequence[str]) -> list[int]:
    """Return the positions of prompts in the order in which `lm` processes them: longest first."""
    keys = [(-len(lm.tok_encode(prompt)), prompt) for prompt in prompts]
    return sorted(range(len(prompts)), key=keys.__getitem__)


def generate_batch(
    lm: Any,
    prompts: Sequence[str],
    until: Sequence[str],
    max_new_tokens: int,
    on_token: Callable[[int], None] = lambda count: None,
) -> list[Response]:
    """Continue prompts greedily, as one batch.

    Args:
        lm: The model.
        prompts: The prompts, in the order of `in_order_of_length`.
        until: Texts that end a response, besides the end-of-sequence token.
        max_new_tokens: Longest response in tokens.
        on_token: Called before each token with the number of tokens so far.
    """
    instance = import_harness("lm_eval.api.instance").Instance
    settings = {"until": list(until), "do_sample": False, "max_gen_toks": max_new_tokens}
    requests = [
        instance("generate_until", {}, (prompt, dict(settings)), position)
        for position, prompt in enumerate(prompts)
    ]
    rows: list[list[int]] = []
    # The public method returns only text, from which the length in tokens is unknown.
    original = lm._model_generate

    def recorded(context: Any, **options: Any) -> Any:
        start = context.shape[1]

        def count(input_ids: Any, scores: Any) -> Any:
            on_token(input_ids.shape[1] - start)
            return scores

        processors = LogitsProcessorList([count])
        output = original(context=context, logits_processor=processors, **options)
        rows.extend(output[:, start:].tolist())
        return output

    lm._model_generate, size = recorded, lm.batch_size_per_gpu
    lm.batch_size_per_gpu = len(prompts)
    try:
        lm.generate_until(requests, disable_tqdm=True)
    finally:
        lm.batch_size_per_gpu = size
        del lm._model_generate
    ends = end_tokens(lm.model, lm.tokenizer, until)
    return [_response(lm, row, until, ends, max_new_tokens) for row in rows]


def end_tokens(model: Any, tokenizer: Any, until: Sequence[str] = ()) -> set[int]:
    """Return the ids of the tokens that end a response."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = [each for each, token in added.items() if token.special and str(token) in until]
    return {each for each in [*ids, tokenizer.eos_token_id, *special] if each is not None}


def _response(
    lm: Any, row: Sequence[int], until: Sequence[str], ends: set[int], max_new_tokens: int
) -> Response:
    """Return the response in a row of generated tokens, which longer rows of the batch may pad."""
    end = next((position for position, token in enumerate(row) if token in ends), None)
    tokens = list(row if end is None else row[:end])
    whole = lm.tok_decode(tokens)
    text = whole
    for stop in until:
        text = text.split(stop)[0]
    if text == whole:
        return Response(text, len(tokens), end is None and len(tokens) >= max_new_tokens)
    length = bisect.bisect_left(
        range(len(tokens)), len(text), key=lambda count: len(lm.tok_decode(tokens[:count]))
    )
    return Response(text, length, False)


# Tasks of the harness


@dataclass(frozen=True)
class HarnessTask:
    """A task or a group of tasks that lm-evaluation-harness defines.

    Attributes:
        name: Its name in the harness.
        include_path: Folder with definitions of tasks besides those of the harness.
        digest: Digest of its definition and of its documents.
    """

    name: str
    include_path: str | None
    digest: str


def find_harness_task(name: str, include_path: str | Path | None) -> HarnessTask:
    """Return a task of the harness after reading its data, which is downloaded if necessary.

    Args:
        name: Name of the task or group, without prefix.
        include_path: Folder with definitions of tasks besides those of the harness.

    Raises:
        ValueError: The name is unknown, or its data cannot be read.
        FileNotFoundError: `include_path` is not a folder.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(
            f"the folder {include_path} with definitions of tasks (include_path, --include-path) "
            "does not exist: check its path"
        )
    place = None if include_path is None else str(include_path)
    return HarnessTask(name, place, _digest(load_harness_task(name, place)))


def load_harness_task(name: str, include_path: str | None) -> Any:
    """Return the tasks of the harness under a name, with their documents.

    Raises:
        ValueError: The name is unknown, or its data cannot be read.
    """
    with quiet_harness():
        manager = _task_manager(include_path, _definitions(include_path))
        if name not in manager.all_tasks:
            raise ValueError(
                f"lm-evaluation-harness has no task {name!r}"
                f"{did_you_mean(name, manager.all_tasks)}: `lm_eval ls tasks` lists them, and "
                "include_path (--include-path) names a folder with others"
            )
        try:
            return manager.load([name])
        # Errors of a download, a data set, or a task's function, which share no base class.
        except Exception as error:
            cause = " ".join(str(error).split())
            raise ValueError(
                f"the task {HARNESS_PREFIX}{name} of lm-evaluation-harness cannot be loaded "
                f"({type(error).__name__}: {cause}): without a network, its data must be in the "
                "cache of the package `datasets`"
            ) from error


@functools.lru_cache(maxsize=4)  # reads thousands of definitions
def _task_manager(include_path: str | None, definitions: tuple[tuple[str, int], ...]) -> Any:
    return import_harness("lm_eval.tasks").TaskManager(include_path=include_path)


def _definitions(include_path: str | None) -> tuple[tuple[str, int], ...]:
    """Return the files of a folder with task definitions, with their modification times."""
    files = () if include_path is None else sorted(Path(include_path).rglob("*.y*ml"))
    return tuple((str(file), file.stat().st_mtime_ns) for file in files)


def _digest(loaded: Any) -> str:
    return digest_of(
        {
            name: [str(task.dump_config()), [str(document) for document in task.eval_docs]]
            for name, task in loaded["tasks"].items()
        }
    )


def run_harness_task(
    lm: Any, task: HarnessTask, limit: int | None, num_fewshot: int | None
) -> dict[str, Any]:
    """Return the harness's report on a task, with its samples.

    Args:
        lm: The model.
        task: The task.
        limit: Number of documents, the first ones; `None` takes all.
        num_fewshot: Number of worked examples; `None` is the task's.
    """
    loaded = load_harness_task(task.name, task.include_path)
    # Like `simple_evaluate`, but that seeds the caller's generators and runs git in the current
    # folder.
    for each in loaded["tasks"].values():
        default = each.get_config("num_fewshot")
        if num_fewshot is not None and default != 0:
            each.set_config(key="num_fewshot", value=num_fewshot)
        elif default is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=_FEWSHOT_SEED)
    results: dict[str, Any] = import_harness("lm_eval").evaluate(lm, loaded, limit=limit)
    return results


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence the harness's warnings about how it is called, which users cannot act on."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
