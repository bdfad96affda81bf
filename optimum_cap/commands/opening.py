"""Announcements of what a command will do, shown before the slow imports."""

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from optimum_cap.text import format_size

# Shown if a flag is not set; a test compares them with the defaults of CAPConfig.
DEFAULTS = {"recipe": "causal", "dataset": ["gsm8k"], "num_samples": 128, "seed": 0}
# Recipes and criteria; a test compares them with the recipes of CAPConfig.
WITHOUT_DATA = ("magnitude", "magnitude_global", "random")
_WEIGHTS = (".safetensors", ".bin")


def opening_lines(
    args: Namespace, doing: str, aim: str | None = None, **defaults: object
) -> list[str]:
    """Return three lines: the model and the action, the data, and the device.

    Args:
        args: The flags, which nothing has checked yet.
        doing: What the command does, such as `"pruning"`.
        aim: Its aim (default: recipe and sparsity).
        **defaults: Values of flags that are not set.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    chosen = {**_settings(given.get("config")), **given}
    if "scores" in given and chosen.keys().isdisjoint({"recipe", "criterion"}):
        chosen["recipe"] = "paper"
    flags = {**DEFAULTS, **defaults, **chosen}
    aims = [aim or f"recipe {flags['recipe']}"]
    aims += [
        f"{name} {flags[name]}" for name in ("criterion", "sparsity", "pattern") if name in flags
    ]
    if "config" in flags:
        aims.append(f"settings of {flags['config']}")
    names = flags["dataset"] if isinstance(flags["dataset"], list) else [flags["dataset"]]
    data = f"{', '.join(map(str, names))}, {flags['num_samples']} examples, seed {flags['seed']}"
    if "scores" in flags:
        data = f"scores of {flags['scores']}"
    elif "allocation" not in flags and flags.get("criterion", flags["recipe"]) in WITHOUT_DATA:
        data = "none"
    resume = flags.get("resume_dir", "the Hugging Face cache")
    return [
        f"{doing} {args.model}{_size_of(args.model)}: {', '.join(aims)}",
        f"data: {data}",
        f"device: {flags['device_map']}; an interrupted run resumes from {resume}",
    ]


def evaluation_lines(args: Namespace, models: Sequence[str], with_files: bool = False) -> list[str]:
    """Return three lines: the models to evaluate, the tasks, and the device.

    Args:
        args: The flags, which nothing has checked yet.
        models: The models to evaluate.
        with_files: Whether they are compared with results in files, whose settings are then the
            defaults.
    """
    tasks = args.tasks or ("those of the files" if with_files else "the default ones")
    limit = "as many items as in the files" if with_files else "all items"
    if args.limit is not None:
        limit = f"{args.limit} items per task"
    resume = args.resume_dir or "the Hugging Face cache"
    return [
        f"evaluating {', '.join(f'{name}{_size_of(name)}' for name in models)}",
        f"tasks: {tasks}, {limit}",
        f"device: {args.device_map}; an interrupted run resumes from {resume}",
    ]


def _settings(file: Path | None) -> dict[str, Any]:
    """Return the settings in the file of `--config`; empty if it cannot be read."""
    if file is None:
        return {}
    from optimum_cap.yaml_files import read_yaml

    with suppress(OSError, ValueError):
        values = read_yaml(file, "settings file")
        return {str(name): value for name, value in values.items() if value is not None}
    return {}


def _size_of(name: str) -> str:
    """Return the size of the weights if they are stored locally."""
    folder = Path(name)
    with suppress(OSError, ValueError):
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
    """Return the newest snapshot of a model in the Hub cache, without importing the slow client.

    The layout is documented: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")
    snapshots = (cache / f"models--{name.replace('/', '--')}" / "snapshots").iterdir()
    return max(snapshots, key=lambda each: each.stat().st_mtime)
