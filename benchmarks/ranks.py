"""Exact scores, or a whole pruning, in two processes against one, one thread each.

    python benchmarks/ranks.py --runs 5
    python benchmarks/ranks.py --runs 5 --recipe causal --hidden 576 --examples 32 --tokens 160

A random Llama, and both sides in turns. A run is timed inside, from the first chunk to the last
exchange: Python's start and the making of the model are not counted. The losses, or the pruned
weights, have to be the same in every byte.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from optimum_cap import CAPConfig
from optimum_cap.data import CalibrationExample
from optimum_cap.models import ModelView, find_sites
from optimum_cap.pruning import PruningRun
from optimum_cap.runtime import ProcessGroup, digest_of
from optimum_cap.scoring import exact_losses
from optimum_cap.scoring.settings import ScoringSettings


def measure(arguments: argparse.Namespace) -> None:
    """Score or prune in this process, and print seconds and a digest of the result."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    hidden = arguments.hidden
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.layers,
        num_key_value_heads=arguments.layers,
    )
    model = LlamaForCausalLM(config).eval()
    scored = torch.arange(arguments.tokens) >= arguments.tokens // 2
    examples = [
        CalibrationExample(torch.randint(3, 1000, scored.shape), scored, "random", n, f"{n:064x}")
        for n in range(arguments.examples)
    ]
    process_group = ProcessGroup.current()
    process_group.all_gather(None)
    start = time.monotonic()
    if arguments.recipe:
        result = dict(pruned(model, examples, arguments.recipe).state_dict())
    else:
        sites = [site for site in find_sites(model) if site.kind == "attention"]
        settings = ScoringSettings(memory_budget="1GB", process_group=process_group)
        result = exact_losses(ModelView(model, sites), examples, settings=settings).masked
    seconds = time.monotonic() - start
    if process_group.rank == 0:
        print(seconds, digest_of(result))


def pruned(
    model: PreTrainedModel, examples: list[CalibrationExample], recipe: str
) -> PreTrainedModel:
    """Prune half of the weights by a recipe."""
    view = ModelView.of(model)
    config = CAPConfig(sparsity=0.5, recipe=recipe)
    run = PruningRun(view, config, view.matrices, examples, ProcessGroup.current())
    total = sum(view.oriented(matrix).numel() for matrix in view.matrices)
    run.prune_layer_by_layer_(run.allocate(total // 2))
    return model


def run(ranks: int, flags: list[str]) -> tuple[float, str]:
    """Start so many processes; return the seconds and the digest of the first one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in launched.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *flags, "--measure"]
        processes.append(
            subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
    outs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process failed")
    seconds, digest = outs[0].split()
    return float(seconds), digest


def main() -> None:
    """Time both sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8, help="and heads (default: 8)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default: 256)")
    parser.add_argument("--examples", type=int, default=16, help="(default: 16)")
    parser.add_argument("--tokens", type=int, default=128, help="per example (default: 128)")
    parser.add_argument("--runs", type=int, default=5, help="(default: 5)")
    parser.add_argument("--recipe", help="prune by this recipe instead of scoring heads")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments)
        return
    seconds: dict[int, list[float]] = {1: [], 2: []}
    digests = set()
    for _ in range(arguments.runs):
        for ranks, times in seconds.items():
            taken, digest = run(ranks, sys.argv[1:])
            times.append(taken)
            digests.add(digest)
    if len(digests) > 1:
        raise SystemExit(f"the results differ: {digests}")
    for ranks, times in seconds.items():
        print(
            f"{ranks} process(es): {statistics.median(times):.1f} s "
            f"({min(times):.1f} to {max(times):.1f})"
        )
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    print(
        f"one / two: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
        "the results are the same in every byte"
    )


if __name__ == "__main__":
    main()
