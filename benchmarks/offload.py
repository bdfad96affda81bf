"""Peak memory of pruning and saving a model whose weights stay on disk, beside one in memory.

A random Llama checkpoint is written layer by layer, then pruned and saved in a process of its own
for each side and recipe, and the checkpoints are compared. "resident" is VmHWM of
/proc/self/status, the most that was in memory at once: anonymous memory and the pages of mapped
files (weights that are read, libraries), which the system can drop. "anonymous" is the largest
RssAnon that was seen, looking every 10 ms. Both count Python, torch and transformers too ("at the
start": once they are imported).

    python benchmarks/offload.py            # half a gigabyte, for a look
    python benchmarks/offload.py --gb 4     # the bar: under 1.5 GB resident when offloaded
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.config import effective

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 2048, 5632, 16384, 2
LAYER_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
SIDES = ("offloaded", "in memory")


def write_checkpoint(folder: Path, size: float, dtype: torch.dtype) -> int:
    """Write a random Llama of about `size` bytes, one file per layer; return its true size."""
    per_layer = sum(torch.Size(shape).numel() for shape in LAYER_SHAPES.values())
    layers = max(1, round((size / dtype.itemsize - 2 * VOCABULARY * HIDDEN) / per_layer))
    files = {
        "model-outside.safetensors": {
            "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
            "model.norm.weight": (HIDDEN,),
            "lm_head.weight": (VOCABULARY, HIDDEN),
        }
    }
    for layer in range(layers):
        files[f"model-{layer:05}.safetensors"] = {
            f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER_SHAPES.items()
        }
    generator = torch.Generator().manual_seed(0)
    weight_map, total = {}, 0
    for file, shapes in files.items():
        tensors = {
            name: torch.randn(shape, generator=generator).mul_(0.05).to(dtype)
            if len(shape) > 1
            else torch.ones(shape, dtype=dtype)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=512,
    ).save_pretrained(folder)
    return total


def tokenizer() -> PreTrainedTokenizerFast:
    digits = Tokenizer(models.WordLevel({str(n): n for n in range(10)} | {"?": 10}, unk_token="?"))
    digits.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=digits, pad_token="0", unk_token="?")


class Memory:
    """Resident memory of this process in MB, and the peak of its anonymous part."""

    def __init__(self) -> None:
        self.anonymous = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, self.read("RssAnon"))
            time.sleep(0.01)

    @staticmethod
    def read(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def measure(side: str, recipe: str, folder: Path) -> dict[str, float | str]:
    """Prune and save once: seconds, memory in MB, and a checksum of the checkpoint."""
    logging.disable_progress_bar()
    memory, before, start = Memory(), Memory.read("VmRSS"), time.perf_counter()
    placement = (
        {"device_map": "auto", "max_memory": {"cpu": "1MB"}, "offload_folder": folder / "scratch"}
        if side == "offloaded"
        else {"device_map": "cpu"}
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **placement)
    rows = [(str(n) * 12, str(n) * 4) for n in range(10)]
    data = {"dataset": rows, "num_samples": 2, "subsets": 1, "memory_budget": "200MB"}
    config = CAPConfig(**effective(data, {"sparsity": 0.2, "recipe": recipe}))
    pruned = CAPPruner(config).prune(model, tokenizer())
    pruned.save_pretrained(folder / "pruned", max_shard_size="300MB")
    result: dict[str, float | str] = {
        "seconds": time.perf_counter() - start,
        "start": before,
        "resident": Memory.read("VmHWM"),
        "anonymous": memory.anonymous,
    }
    digest = hashlib.sha256()
    for file in sorted((folder / "pruned").glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return result | {"checksum": digest.hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=0.5, help="size of the weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--recipes", default="paper,magnitude,wanda")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="folder on a disk with room for four such models")
    parser.add_argument("--offload-only", action="store_true", help="leave out the other side")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        side, recipe, folder = arguments.measure
        print(json.dumps(measure(side, recipe, Path(folder))))
        return

    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        if free < 4e9 * arguments.gb:
            raise SystemExit(
                f"{folder} has {free / 1e9:.1f} GB free, and {4 * arguments.gb:.1f} GB are needed: "
                "choose another disk with --dir"
            )
        (folder / "model").mkdir()
        dtype = getattr(torch, arguments.dtype)
        size = write_checkpoint(folder / "model", arguments.gb * 1e9, dtype)
        print(f"{size / 1e9:.2f} GB of {arguments.dtype}, {torch.get_num_threads()} threads\n")
        print("MB: median (min to max)\n")
        print("| recipe | side | seconds | resident | anonymous | at the start |")
        print("|---|---|---|---|---|---|", flush=True)
        sides = SIDES[:1] if arguments.offload_only else SIDES
        for recipe in arguments.recipes.split(","):
            compare(recipe, sides, folder, arguments.runs)


def compare(recipe: str, sides: tuple[str, ...], folder: Path, runs: int) -> None:
    """Measure the sides of a recipe, taking turns, and print a line for each."""
    results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    checksums = set()
    for _ in range(runs):
        for side, measured in results.items():
            command = [sys.executable, __file__, "--measure", side, recipe, str(folder)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured.append(json.loads(output.splitlines()[-1]))
            checksums.add(measured[-1].pop("checksum"))
    if len(checksums) != 1:
        raise SystemExit(f"{recipe}: the checkpoints differ")
    for side, measured in results.items():
        cells = [
            spread([run[field] for run in measured])
            for field in ("seconds", "resident", "anonymous", "start")
        ]
        print(f"| {recipe} | {side} | {' | '.join(cells)} |", flush=True)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    main()
