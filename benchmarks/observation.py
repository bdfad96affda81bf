"""Time to find the sites of a model, and to check its experts, against that of a default prune.

    python benchmarks/observation.py --runs 5
    python benchmarks/observation.py --runs 3 --model FOLDER --examples 16

By default, the model is the embedded one. Both sides run in turns, with one thread.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.models import ModelView, check_experts

REASONER = Path(__file__).parents[1] / "examples" / "tiny_reasoner"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", default=str(REASONER / "model"))
    parser.add_argument("--examples", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    config = CAPConfig(
        sparsity=0.5,
        dataset=str(REASONER / "data" / "calibration.jsonl"),
        num_samples=arguments.examples,
    )
    observing, pruning = [], []
    for _ in range(arguments.runs):
        start = time.monotonic()
        view = ModelView.of(model)
        check_experts(view, view.matrices)
        observing.append(time.monotonic() - start)
        copied = copy.deepcopy(model)
        start = time.monotonic()
        CAPPruner(config).prune(copied, tokenizer)
        pruning.append(time.monotonic() - start)
    for name, seconds in (("observing", observing), ("pruning", pruning)):
        middle = statistics.median(seconds)
        print(f"{name:10} {middle:8.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})")
    shares = [one / other for one, other in zip(observing, pruning, strict=True)]
    print(
        f"share      {statistics.median(shares):8.2%}    ({min(shares):.2%} to {max(shares):.2%})"
    )


if __name__ == "__main__":
    main()
