"""Packed and coded checkpoints: speed of encoding, decoding and loading, and size.

Encoding and decoding run on one thread, against boolean indexing in torch. The matrices are random,
or those of a pruned checkpoint. Loading compares `from_pretrained` of a packed, a coded and a dense
checkpoint of the same model, in turns: with the file on the disk, and with the file in the page
cache. A dense file that is in the page cache is only mapped, nothing is moved at all, whereas other
weights are made anew in memory. So dense weights are measured twice: mapped, and copied to memory
of their own, as a cast to another dtype does.

    python benchmarks/packing.py --megabytes 512
    python benchmarks/packing.py --checkpoint DIR
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
from typing import Any

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
from optimum_cap.formats import coded, pack, unpack


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


def pruned_matrices(folder: Path) -> list[torch.Tensor]:
    """Return the pruned matrices of a checkpoint, experts one by one."""
    record = inspect_checkpoint(folder).record
    pruned = {matrix.name.partition("[")[0] for matrix in record.matrices}
    parameters = AutoModelForCausalLM.from_pretrained(folder).named_parameters()
    return [
        matrix
        for name, parameter in parameters
        if name in pruned
        for matrix in parameter.detach().view(-1, *parameter.shape[-2:])
    ]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float], digits: int = 0) -> str:
    middle, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def measure_encoding(matrices: list[torch.Tensor], runs: int) -> None:
    torch.set_num_threads(1)
    ways: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "packed": (pack, lambda parts: unpack(*parts.values())),
        "coded": (coded.encode, coded.decode),
        "boolean index": (naive_pack, lambda parts: naive_unpack(*parts)),
    }
    size = sum(matrix.nbytes for matrix in matrices)
    encoded = {name: list(map(encode, matrices)) for name, (encode, _) in ways.items()}
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(runs):
        for name, (encode, decode) in ways.items():
            for step, function, inputs in (
                ("encode", encode, matrices),
                ("decode", decode, encoded[name]),
            ):
                speed = size / 1e6 / seconds(partial(run_all, function, inputs))
                taken.setdefault((name, step), []).append(speed)
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
    weights = sum(matrix.numel() for matrix in matrices)
    stored = {
        "packed": sum(part.nbytes for parts in encoded["packed"] for part in parts.values()),
        "coded": sum(stream.nbytes for stream in encoded["coded"]),
    }
    for name in ways:
        share = f"{stored[name] / size:.4f}" if name in stored else ""
        columns = (spread(taken[name, step]) for step in ("encode", "decode"))
        print(f"| {zeros / weights:.0%} | {name} | {share} | {' | '.join(columns)} |")


def run_all(function: Callable[[Any], object], inputs: list[Any]) -> None:
    for each in inputs:
        function(each)


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
        packed, *others = (Path(folder) / name for name in ("packed", "coded", "dense"))
        model.save_pretrained(packed)
        for other in others:
            convert_checkpoint(packed, other, other.name)
        coded_folder, dense = others
        ways = {
            "packed": (packed, touch),
            "coded": (coded_folder, touch),
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
        sizes = [inspect_checkpoint(path) for path in (packed, coded_folder)]
    dense_bytes = sizes[0].dense_bytes
    shares = [f"{summary.weight_bytes / dense_bytes:.1%}" for summary in sizes]
    print(
        f"\nfrom_pretrained, {dense_bytes / 1e6:.0f} MB of bfloat16 at 50 %, two threads; the "
        f"packed file is {shares[0]} of the dense one, the coded file {shares[1]}\n"
    )
    print("| file in | weights | seconds | over dense, mapped | over dense, copied |")
    print("|---|---|---|---|---|")
    for (cache, name), taken in times.items():
        columns = [
            spread([a / b for a, b in zip(taken, times[cache, base], strict=True)], 2)
            for base in ("dense, mapped", "dense, copied")
        ]
        print(f"| {cache} | {name} | {spread(taken, 2)} | {' | '.join(columns)} |")


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
    parser.add_argument("--checkpoint", type=Path, help="pruned checkpoint: encode its matrices")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    print("One thread; MB of dense weights per second, median (range)\n")
    print("| sparsity | weights | share of dense | encode | decode |")
    print("|---|---|---|---|---|")
    if arguments.checkpoint is not None:
        measure_encoding(pruned_matrices(arguments.checkpoint), arguments.runs)
        return
    for sparsity in (0.2, 0.5):
        measure_encoding(sparse_matrices(arguments.megabytes, sparsity), arguments.runs)
    measure_loading(arguments.megabytes, arguments.runs)


if __name__ == "__main__":
    main()
