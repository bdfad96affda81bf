"""A whole prune, scores cached, against llm-compressor's Wanda and SparseGPT: time and memory.

Each run is a process of its own on the same random Llama and the same calibration tokens; the
methods take turns. Counted is pruning alone, with the way to the GPU if it is to be used, but
neither imports nor loading; the peak is the resident memory of the process while it prunes, model
included.

    python benchmarks/peers/pruning.py --peer .venv-peer/bin/python
    python benchmarks/peers/pruning.py --peer .venv-peer/bin/python --device cuda \
        --dtype bfloat16 --hidden 2048
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from optimum_cap import CAPConfig
from optimum_cap.data import build_calibration_set
from optimum_cap.models import find_sites, heads

REASONER = Path(__file__).parents[2] / "examples" / "tiny_reasoner"
HERE = Path(__file__).parent
METHODS = (
    ("optimum-cap", "paper"),
    ("optimum-cap", "wanda"),
    ("optimum-cap", "sparsegpt"),
    ("llm-compressor", "wanda"),
    ("llm-compressor", "sparsegpt"),
)


def make_model(
    folder: Path, layers: int, hidden: int, examples: int, device: str, dtype: torch.dtype
) -> None:
    """Write a random Llama with the embedded model's tokenizer, and random losses of its heads.

    What the losses are changes nothing in the work of pruning by them.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(REASONER / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=256,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    count = len(heads(find_sites(model)))
    losses = {
        "intact": torch.rand(examples, dtype=torch.float64),
        "masked": torch.rand(count, examples, dtype=torch.float64),
    }
    save_file(losses, folder / "scores")


def run(package: str, job: dict[str, Any], peer: str) -> dict[str, float]:
    """Prune once in a process of its own; return its seconds and its peak in bytes."""
    python, script = (sys.executable, "run_ours.py")
    if package == "llm-compressor":
        python, script = (peer, "run_llmcompressor.py")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.json").write_text(json.dumps(job))
        subprocess.run(
            [Path(python).absolute(), (HERE / script).resolve(), folder],
            check=True,
            cwd=folder,
            env=environment(job["device"]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        measured: dict[str, float] = json.loads(Path(folder, "measured.json").read_text())
        return measured


def environment(device: str) -> dict[str, str]:
    """Environment variables for a run on a device: the peer takes a GPU wherever it sees one."""
    return {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="python with llmcompressor installed")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the weights, such as bfloat16")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        sizes = arguments.layers, arguments.hidden, arguments.examples
        make_model(model, *sizes, arguments.device, getattr(torch, arguments.dtype))
        config = {
            "sparsity": 0.5,
            "dataset": str(REASONER / "data" / "calibration.jsonl"),
            "num_samples": arguments.examples,
        }
        tokenizer = AutoTokenizer.from_pretrained(model)
        examples = build_calibration_set(CAPConfig(**config), tokenizer).examples
        found: dict[tuple[str, str], list[dict[str, float]]] = {method: [] for method in METHODS}
        turns = [method for _ in range(arguments.runs) for method in METHODS]
        for package, method in tqdm(turns, unit="run"):
            job = {
                "model": folder,
                "method": method,
                "sparsity": 0.5,
                "pattern": "0:0",
                "input_ids": [example.input_ids.tolist() for example in examples],
                "config": {**config, "recipe": method},
                "device": arguments.device,
                "dtype": arguments.dtype,
                "scores": str(model / "scores") if method == "paper" else None,
            }
            found[package, method].append(run(package, job, arguments.peer))

    tokens = sum(len(example.input_ids) for example in examples)
    print(
        f"{arguments.layers} layers, hidden size {arguments.hidden}, {arguments.dtype}, "
        f"{arguments.device}, {tokens} tokens\n"
    )
    peaks = {"peak": "peak, MB"}
    if arguments.device == "cuda":
        peaks["on_device"] = "peak on the GPU, MB"
    columns = ["package", "method", "seconds, median (range)", *peaks.values(), "paper takes"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    ours = [each["seconds"] for each in found["optimum-cap", "paper"]]
    for (package, method), runs in found.items():
        seconds = [each["seconds"] for each in runs]
        ratios = [mine / theirs for mine, theirs in zip(ours, seconds, strict=True)]
        memory = [f"{statistics.median(each[name] for each in runs) / 1e6:.0f}" for name in peaks]
        print(
            f"| {package} | {method} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to "
            f"{max(seconds):.2f}) | {' | '.join(memory)} | {statistics.median(ratios):.3f} times "
            f"as long ({min(ratios):.3f} to {max(ratios):.3f}) |"
        )


if __name__ == "__main__":
    main()
