"""What the digests of a checkpoint cost: when it is loaded, verified and saved.

Loads a packed and a dense checkpoint from the page cache, in turns with and without the comparison
with the digests, and hashes the same files as a whole with XXH3-128, CRC-32 and SHA-256.

    python benchmarks/verification.py --megabytes 512
"""

import argparse
import gc
import hashlib
import logging
import mmap
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
import xxhash
from packing import half_zero_model
from transformers import AutoModelForCausalLM

from optimum_cap.checkpoint import (
    convert_checkpoint,
    inspect_checkpoint,
    validate_shards,
)

HASHES: dict[str, Callable[[Any], object]] = {
    "XXH3-128": xxhash.xxh3_128_digest,
    "CRC-32": zlib.crc32,
    "SHA-256": lambda data: hashlib.sha256(data).digest(),
}


def save_models(megabytes: int, folder: Path, shards: str) -> None:
    """Save one random model with half of its weights zero, packed and dense."""
    model = half_zero_model(megabytes)
    model.save_pretrained(folder / "packed", max_shard_size=shards)
    convert_checkpoint(folder / "packed", folder / "dense", "dense")


def without_digests() -> Any:
    """Check only sizes, headers and parts of packed weights."""

    def check_loaded(files: list[Path], digests: object, checkpoint_format: str) -> None:
        if checkpoint_format == "packed":
            validate_shards(files)

    return mock.patch.multiple(
        "optimum_cap.checkpoint", check_loaded=check_loaded, check_loaded_folder=lambda *_: None
    )


def seconds(work: Callable[[], object]) -> float:
    gc.collect()  # a pruned model refers to itself: the last one is still there
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def load(folder: Path, use: Callable[[torch.Tensor], object], context: Any) -> None:
    with context():
        model = AutoModelForCausalLM.from_pretrained(folder)
    weights = [use(parameter.detach()) for parameter in model.parameters()]
    del weights


def touch(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(-1)[::1024].sum()  # two weights of every page


def hash_files(folder: Path, function: Callable[[Any], object], threads: int) -> None:
    def hash_file(file: Path) -> object:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return function(data)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(hash_file, sorted(folder.glob("*.safetensors"))))


def spread(values: list[float], digits: int = 3) -> str:
    middle, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512, help="dense size, MB")
    parser.add_argument("--shards", default="120MB", help="largest dense file")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        save_models(arguments.megabytes, folder, arguments.shards)
        works: dict[str, Callable[[], object]] = {}
        for name, use in (
            ("packed", touch),
            ("dense, mapped", touch),
            ("dense, copied", torch.clone),
        ):
            path = folder / name.partition(",")[0]
            works[f"load {name}"] = partial(load, path, use, nullcontext)
            works[f"load {name}, no digests"] = partial(load, path, use, without_digests)
        for name in ("packed", "dense"):
            works[f"verify {name}"] = partial(inspect_checkpoint, folder / name, verify=True)
            for title, function in HASHES.items():
                work = partial(hash_files, folder / name, function, arguments.threads)
                works[f"{title} of {name}"] = work
        times: dict[str, list[float]] = {name: [] for name in works}
        for run in range(arguments.runs + 1):
            # Every other round backwards, so that no way is always the one after a slow one.
            for name, work in list(works.items())[:: 1 if run % 2 else -1]:
                taken = seconds(work)
                if run:  # the first round fills the page cache
                    times[name].append(taken)
        size = sum(file.stat().st_size for file in (folder / "packed").glob("*.safetensors"))
    print(f"packed files of {size / 1e6:.0f} MB, {arguments.threads} threads\n")
    print("| | seconds, median (range) | ratio to the load without digests, median (range) |")
    print("|---|---|---|")
    for name, taken in times.items():
        base = times.get(f"{name}, no digests")
        ratios = [a / b for a, b in zip(taken, base, strict=True)] if base else []
        print(f"| {name} | {spread(taken)} | {spread(ratios, 2) if ratios else ''} |")


if __name__ == "__main__":
    main()
