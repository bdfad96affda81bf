"""What a command is about to do, said before the imports, which take seconds."""

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from optimum_cap.text import format_size

# Shown where a flag is not set; a test compares them with the defaults of CAPConfig.
DEFAULTS = {"recipe": "causal", "dataset": ["gsm8k"], "num_samples": 128, "seed": 0}
_WEIGHTS = (".safetensors", ".bin")


def opening_lines(
    args: Namespace, doing: str, aim: str | None = None, **defaults: object
) -> list[str]:
    """Return three lines: the model and what is done to it, the data, and where it runs.

    Args:
        args: The flags, which nothing has checked yet.
        doing: What the command does, such as `"pruning"`.
        aim: To what end (default: recipe and sparsity).
        **defaults: Values of flags that are not set.
    """
    flags = {**DEFAULTS, **defaults, **vars(args)}
    aims = [aim or f"recipe {flags['recipe']}"]
    if flags.get("config") is not None:
        aims = [f"settings of {flags['config']}"]
    if "sparsity" in flags:
        aims.append(f"sparsity {flags['sparsity']}")
    if "pattern" in flags:
        aims.append(f"pattern {flags['pattern']}")
    data = f"{', '.join(map(str, flags['dataset']))}, {flags['num_samples']} examples"
    if flags.get("scores") is not None:
        data = f"scores of {flags['scores']}"
    resume = flags.get("resume_dir") or "the Hugging Face cache"
    return [
        f"{doing} {args.model}{_size_of(args.model)}: {', '.join(aims)}",
        f"data: {data}, seed {flags['seed']}",
        f"device: {flags['device_map']}; an interrupted run resumes from {resume}",
    ]


def evaluation_lines(args: Namespace, models: Sequence[str]) -> list[str]:
    """Return three lines: the models that are evaluated, the tasks, and where it runs."""
    limit = "all items" if args.limit is None else f"{args.limit} items per task"
    resume = args.resume_dir or "the Hugging Face cache"
    return [
        f"evaluating {', '.join(f'{name}{_size_of(name)}' for name in models)}",
        f"tasks: {args.tasks or 'those of the files, or the default ones'}, {limit}",
        f"device: {args.device_map}; an interrupted run resumes from {resume}",
    ]


def _size_of(name: str) -> str:
    """Return the size of the weights, if they are on this machine."""
    folder = Path(name)
    with suppress(OSError, ValueError, StopIteration):
        if not folder.is_dir():
            folder = _cached(name)
        size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in _WEIGHTS)
        if size:
            return f" ({format_size(size)}{_kind(folder)})"
    return ""


def _kind(folder: Path) -> str:
    with suppress(OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        return f", {json.loads((folder / 'config.json').read_text())['architectures'][0]}"
    return ""


def _cached(name: str) -> Path:
    """Return the newest snapshot of a model in the cache of the Hub; importing its client is slow.

    The layout is documented: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")
    snapshots = (cache / f"models--{name.replace('/', '--')}" / "snapshots").iterdir()
    return max(snapshots, key=lambda each: each.stat().st_mtime)
