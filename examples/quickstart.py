"""The main job, offline: prune the embedded reasoning model, save it, load it, compare it.

python examples/quickstart.py [--sparsity 0.2] [--output runs/quickstart]
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import optimum_cap  # noqa: F401  (teaches from_pretrained the keyword pruning_config)
from optimum_cap import CAPConfig
from optimum_cap.checkpoint import inspect_checkpoint

REASONER = Path(__file__).parent / "tiny_reasoner"
sys.path.insert(0, str(REASONER))
from evaluate import correct_answers, load_problems, wilson_interval  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.2, help="fraction (default: 0.2)")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--limit", type=int, default=100, help="test problems of each kind")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    model_path = str(REASONER / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    problems = load_problems("test", arguments.limit)

    dense = AutoModelForCausalLM.from_pretrained(model_path)
    before = correct_answers(dense, tokenizer, problems)

    # The three lines this project is about.
    config = CAPConfig(
        sparsity=arguments.sparsity, dataset=str(REASONER / "data" / "calibration.jsonl")
    )
    model = AutoModelForCausalLM.from_pretrained(model_path, pruning_config=config)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)

    # Anyone loads it like any other model.
    pruned = AutoModelForCausalLM.from_pretrained(arguments.output)
    after = correct_answers(pruned, tokenizer, problems)

    logging.disable_progress_bar()
    print_summary(arguments.output, [problem.kind for problem in problems], before, after)


def print_summary(output: Path, kinds: list[str], before: list[bool], after: list[bool]) -> None:
    summary = inspect_checkpoint(output)
    record = summary.record
    ranked = sorted(
        (site for site in record.sensitivities if site.divergence is not None),
        key=lambda site: site.divergence,
        reverse=True,
    )
    print(
        f"\nMeasured   {len(record.sensitivities)} sites, each pruned alone, on "
        f"{len(record.calibration['digests'])} calibration examples"
    )
    for label, site in (("Needed most ", ranked[0]), ("Needed least", ranked[-1])):
        print(
            f"  {label} {site.kind} of layer {site.layer}: pruned alone it changes the predictions "
            f"by {site.divergence:.2g} nats per token; pruned to {site.sparsity:.1%}"
        )
    print(f"Pruned     {record.zeros:,} of {record.total:,} weights: {record.sparsity:.4%}")
    print(
        f"Saved      {output}: {summary.weight_bytes:,} bytes of weights, "
        f"{summary.weight_bytes / summary.dense_bytes:.1%} of dense"
    )
    print("Accuracy   on held-out test problems (95 % interval)")
    totals = Counter(kinds)
    for kind, total in totals.items():
        shares = []
        for answers in (before, after):
            right = sum(correct for k, correct in zip(kinds, answers, strict=True) if k == kind)
            low, high = wilson_interval(right, total)
            shares.append(f"{right / total:6.1%} ({low:.0%} to {high:.0%})")
        print(f"  {kind:16} dense {shares[0]}   pruned {shares[1]}")


if __name__ == "__main__":
    main()
