"""Prune with llm-compressor. Runs in the peer's environment, called by agreement.py and pruning.py.

Reads `job.json` in a folder (model, method, sparsity, pattern, input_ids, dtype, device)
and writes `pruned.safetensors` and `measured.json` there. The model is loaded as llm-compressor's
documentation shows, on the CPU: it brings each layer to the GPU by itself where there is one.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from measured import measured
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def main() -> None:
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    settings = {"block_size": 128, "dampening_frac": 0.01} if job["method"] == "sparsegpt" else {}
    modifier = MODIFIERS[job["method"]](
        sparsity=job["sparsity"],
        mask_structure=job["pattern"],
        targets=["Linear"],
        ignore=["re:.*lm_head"],
        **settings,
    )
    rows = job["input_ids"]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    dataset = Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )
    with measured(folder / "measured.json", job["device"]):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=modifier,
            dataset=dataset,
            max_seq_length=max(map(len, rows)),
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
        )
    save_file(
        {
            name: weight.clone(memory_format=torch.contiguous_format)
            for name, weight in model.state_dict().items()
        },
        folder / "pruned.safetensors",
    )


if __name__ == "__main__":
    main()
