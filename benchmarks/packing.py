"""Packing, unpacking and loading of sparse checkpoints: speed and size.

Packing and unpacking run on one thread, against boolean indexing in torch. Loading compares
`from_pretrained` of a packed and of a dense checkpoint of the same model, in turns: with the file
on the disk, and with the file in the page cache. A dense file that is in the page cache is only
mapped, nothing is moved at all, whereas packed weights are made anew in memory. So dense weights
are measured twice: mapped, and copied to memory of their own, as a cast to another dtype does.

    python benchmarks/packing.py --megabytes 512
"""

import argparse
import gc
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_cap import CAPConfig
from optimum_cap.checkpoint import (
    MatrixSparsity,
    PruningRecord,
    attach,
    convert_checkpoint,
    inspect_checkpoint,
)
from optimum_cap.formats import pack, unpack


def sparse_matrices(megabytes: int, sparsity: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for _ in range(max(1, megabytes // 32)):
        weight = torch.randn(4000, 4000, generator=generator)
        weight[torch.rand(weight.shape, generator=generator) < sparsity] = 0
        matrices.append(weight.to(torch.bfloat16))
    return matrices


def naive_pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keep = weight != 0
    return weight[keep], keep


def naive_unpack(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    weight = torch.zeros(keep.shape, dtype=values.dtype)
    weight[keep] = values
    return weight


def run_all(function: Callable[..., object], arguments: list[tuple[torch.Tensor, ...]]) -> None:
    for each in arguments:
        function(*each)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float], digits: int = 0) -> str:
    middle, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def measure_packing(megabytes: int, runs: int) -> None:
    torch.set_num_threads(1)
    print(
        f"{megabytes} MB of bfloat16, one thread; MB of dense weights per second, median (range)\n"
    )
    print("| sparsity | pack | naive | unpack | naive | size over the bound |")
    print("|---|---|---|---|---|---|")
    for sparsity in (0.2, 0.5):
        matrices = sparse_matrices(megabytes, sparsity)
        size = sum(matrix.nbytes for matrix in matrices) / 1e6
        packed = [pack(matrix) for matrix in matrices]
        alone = [(matrix,) for matrix in matrices]
        naive = [naive_pack(matrix) for matrix in matrices]
        rounds: dict[str, tuple[Callable[..., object], list[tuple[torch.Tensor, ...]]]] = {
            "pack": (pack, alone),
            "naive pack": (naive_pack, alone),
            "unpack": (unpack, [tuple(parts.values()) for parts in packed]),
            "naive unpack": (naive_unpack, naive),
        }
        speeds: dict[str, list[float]] = {name: [] for name in rounds}
        for _ in range(runs):
            for name, (function, arguments) in rounds.items():
                speeds[name].append(size / seconds(partial(run_all, function, arguments)))
        stored = sum(part.nbytes for parts in packed for part in parts.values())
        weights = sum(matrix.numel() for matrix in matrices)
        zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
        bound = 2 * (weights - zeros) + weights / 8
        columns = (spread(values) for values in speeds.values())
        print(f"| {sparsity:.0%} | {' | '.join(columns)} | {stored / bound - 1:+.4%} |")


def half_zero_model(megabytes: int) -> LlamaForCausalLM:
    """Return a random model in bfloat16 with half of its weights zero, as a pruned one."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=max(1, megabytes // 103),
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    matrices = []
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data[torch.rand(parameter.shape) < 0.5] = 0
            zeros = int((parameter == 0).sum())
            matrices.append(MatrixSparsity(name, zeros, parameter.numel()))
    settings = CAPConfig(sparsity=0.5, dataset="gsm8k").to_dict()
    attach(model, PruningRecord(settings, None, None, matrices, [], {"digests": []}, {}))
    return model


def measure_loading(megabytes: int, runs: int) -> None:
    torch.set_num_threads(2)
    model = half_zero_model(megabytes)
    with tempfile.TemporaryDirectory() as folder:
        packed, dense = Path(folder) / "packed", Path(folder) / "dense"
        model.save_pretrained(packed)
        convert_checkpoint(packed, dense, "dense")
        ways = {
            "packed": (packed, touch),
            "dense, mapped": (dense, touch),
            "dense, copied": (dense, torch.clone),
        }
        times: dict[tuple[str, str], list[float]] = {}
        for cache in ("disk", "page cache"):
            for run in range(runs + 1):
                for name, (path, use) in ways.items():
                    gc.collect()  # a pruned model refers to itself: the last one is still there
                    if cache == "disk":
                        drop_from_page_cache(path)
                    taken = seconds(partial(load, path, use))
                    if run:  # the first one fills the page cache
                        times.setdefault((cache, name), []).append(taken)
        summary = inspect_checkpoint(packed)
    print(
        f"\nfrom_pretrained, {summary.dense_bytes / 1e6:.0f} MB of bfloat16 at 50 %, two threads; "
        f"the packed file is {summary.weight_bytes / summary.dense_bytes:.1%} of the dense one\n"
    )
    print("| file in | weights | seconds, median (range) | packed takes, median (range) |")
    print("|---|---|---|---|")
    for (cache, name), taken in times.items():
        ratios = [a / b for a, b in zip(times[cache, "packed"], taken, strict=True)]
        ratio = "" if name == "packed" else f"{spread(ratios, 2)} times as long"
        print(f"| {cache} | {name} | {spread(taken, 2)} | {ratio} |")


def drop_from_page_cache(folder: Path) -> None:
    """Have the next read of the weights come from the disk (Linux; elsewhere nothing happens)."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(path: Path, use: Callable[[torch.Tensor], object]) -> None:
    """Load, and use every weight: a dense file is read only when its weights are used."""
    model = AutoModelForCausalLM.from_pretrained(path)
    weights = [use(parameter.detach()) for parameter in model.parameters()]
    del weights


def touch(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(-1)[::1024].sum()  # two weights of every page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512, help="dense size, MB")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    measure_packing(arguments.megabytes, arguments.runs)
    measure_loading(arguments.megabytes, arguments.runs)


if __name__ == "__main__":
    main()
