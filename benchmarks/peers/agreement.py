"""Wanda and SparseGPT against llm-compressor's: same model, same calibration tokens.

Wanda: share of the weights on which the masks agree. SparseGPT: how far the output of each matrix
moves on its inputs (the squared error, relative to the squared output), theirs and ours.

    python benchmarks/peers/agreement.py --peer .venv-peer/bin/python
"""

import argparse
import copy
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from pruning import environment
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.data import CalibrationExample, build_calibration_set
from optimum_cap.models import ModelView, find_sites, matrices_by_layer, oriented
from optimum_cap.pruning import LayerwisePass

# 20 % of a row is no whole number of weights of the embedded model: the peer rounds down.
TARGETS = ((0.2, "unstructured"), (0.25, "unstructured"), (0.5, "unstructured"), (0.5, "2:4"))
REASONER = Path(__file__).parents[2] / "examples" / "tiny_reasoner"


def by_peer(
    python: str, model: str, method: str, config: CAPConfig, examples: list[CalibrationExample]
) -> dict[str, torch.Tensor]:
    """Weights after pruning in the peer's environment."""
    job = {
        "model": str(Path(model).resolve()),
        "method": method,
        "sparsity": config.sparsity,
        "pattern": "0:0" if config.pattern == "unstructured" else config.pattern,
        "input_ids": [example.input_ids.tolist() for example in examples],
        "dtype": "float32",
        "device": "cpu",
    }
    script = Path(__file__).with_name("run_llmcompressor.py")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.json").write_text(json.dumps(job))
        # In the folder, where it writes its logs.
        subprocess.run(
            [Path(python).absolute(), script.resolve(), folder],
            check=True,
            cwd=folder,
            env=environment("cpu"),
            stdout=subprocess.DEVNULL,
        )
        return load_file(Path(folder) / "pruned.safetensors")


@torch.no_grad()
def reconstruction_errors(
    dense: PreTrainedModel,
    candidates: list[dict[str, torch.Tensor]],
    examples: list[CalibrationExample],
) -> list[list[float]]:
    """Relative squared error of the output of each matrix, per candidate.

    The inputs are those of the first candidate, pruned up to the layer.
    """
    model = copy.deepcopy(dense)
    sites = find_sites(model)
    layerwise = LayerwisePass(ModelView(model, sites), examples)
    errors: list[list[float]] = [[] for _ in candidates]
    for layer, matrices in matrices_by_layer(sites).items():
        statistics = layerwise.statistics(layer, matrices, gram=True)
        for matrix in matrices:
            gram = statistics[matrix].gram.double()
            weight = oriented(model, matrix).double()
            output = torch.einsum("oi,ij,oj->", weight, gram, weight)
            for found, state in zip(errors, candidates, strict=True):
                change = weight - state[matrix.parameter].double()
                found.append(float(torch.einsum("oi,ij,oj->", change, gram, change) / output))
            oriented(model, matrix).copy_(candidates[0][matrix.parameter])
        layerwise.advance(layer)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="python with llmcompressor installed")
    parser.add_argument("--model", default=str(REASONER / "model"), help="folder of a Llama")
    parser.add_argument("--data", default=str(REASONER / "data" / "calibration.jsonl"))
    parser.add_argument("--examples", type=int, default=128)
    arguments = parser.parse_args()
    logging.disable_progress_bar()

    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    names = [m.parameter for own in matrices_by_layer(find_sites(dense)).values() for m in own]
    print("| method | sparsity | masks agree | error, theirs | error, ours | ours / theirs |")
    print("|---|---|---|---|---|---|")
    for method in ("wanda", "sparsegpt"):
        for sparsity, pattern in TARGETS:
            config = CAPConfig(
                sparsity=sparsity,
                recipe=method,
                pattern=pattern,
                dataset=arguments.data,
                num_samples=arguments.examples,
            )
            examples = build_calibration_set(config, tokenizer).examples
            theirs = by_peer(arguments.peer, arguments.model, method, config, examples)
            ours = CAPPruner(config).prune(copy.deepcopy(dense), tokenizer).state_dict()
            same = sum(int(((ours[name] == 0) == (theirs[name] == 0)).sum()) for name in names)
            total = sum(ours[name].numel() for name in names)
            errors = [
                sum(each) / len(each)
                for each in reconstruction_errors(dense, [ours, theirs], examples)
            ]
            print(
                f"| {method} | {sparsity:.0%} {pattern} | {same / total:.4%} | {errors[1]:.6f} | "
                f"{errors[0]:.6f} | {errors[0] / errors[1]:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
