"""What the default recipe costs beside SparseGPT: whole prunes, in turns in one process.

Also the gain: which share of SparseGPT's loss increase on the validation problems a variant takes
away. Random weights have no such loss; there only the time counts.

    python benchmarks/recipes.py --sparsity 0.6                      # reasoner of the repository
    python benchmarks/recipes.py --model DIR --sparsity 0.7          # another on the same problems
    python benchmarks/recipes.py --layers 8 --heads 12 --hidden 768  # random weights
"""

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from estimate import number_tokenizer
from estimators import spread
from scoring import random_examples, random_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.data import build_calibration_set
from optimum_cap.scoring import example_losses

REASONER = Path(__file__).resolve().parents[1] / "examples" / "tiny_reasoner"
VARIANTS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"recipe": "sparsegpt"},
    "ALPS alone": {"criterion": "alps"},
    "causal_fast": {"recipe": "causal_fast"},
    "causal, one pass": {"refine": 1},
    "causal": {},
    "causal without sensitivities": {"allocation": "uniform"},
    "causal_fast, measured sensitivities": {
        "recipe": "causal_fast",
        "allocation": "interventional",
    },
    "causal_fast, measured sensitivities, dense target, by projection": {
        "recipe": "causal_fast",
        "allocation": "interventional",
        "target": "dense",
        "order": "projection",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(REASONER / "model"))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, help="of a random Llama instead of --model")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=128, help="per example of the random Llama")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    if arguments.layers:
        model = random_llama(arguments.layers, arguments.heads, arguments.hidden)
        vocabulary = model.config.vocab_size
        tokenizer = number_tokenizer(vocabulary)
        examples = random_examples(arguments.examples, arguments.tokens, vocabulary, 0.0)
        dataset = [" ".join(map(str, example.input_ids.tolist())) for example in examples]
        problems = None
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        dataset = str(REASONER / "data" / "calibration.jsonl")
        validation = str(REASONER / "data" / "validation.jsonl")
        config = CAPConfig(sparsity=0.5, dataset=validation, num_samples=300)
        problems = build_calibration_set(config, tokenizer).examples

    # The first prune pays for what all later ones use.
    warm_up = CAPConfig(
        sparsity=0.5, recipe="sparsegpt", dataset=dataset, num_samples=arguments.examples
    )
    CAPPruner(warm_up).prune(copy.deepcopy(model), tokenizer)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in range(arguments.runs):
        for name, fields in VARIANTS.items():
            config = CAPConfig(
                sparsity=arguments.sparsity,
                dataset=dataset,
                num_samples=arguments.examples,
                seed=seed,
                **fields,
            )
            copied = copy.deepcopy(model)
            start = time.perf_counter()
            CAPPruner(config).prune(copied, tokenizer)
            seconds[name].append(time.perf_counter() - start)
            if problems:
                losses[name].append(float(example_losses(copied, problems).mean()))

    dense = float(example_losses(model, problems).mean()) if problems else None
    print(
        f"{arguments.layers or arguments.model}, sparsity {arguments.sparsity}, "
        f"{arguments.examples} examples, {arguments.threads} threads, median (min to max) of "
        f"{arguments.runs} runs"
        + (f", loss of the dense model {dense:.5f}" if dense is not None else "")
        + "\n"
    )
    print(
        "| variant | seconds | over SparseGPT, same run | loss | gain over SparseGPT's increase |"
    )
    print("|---|---|---|---|---|")
    reference = "sparsegpt"
    for name, own in seconds.items():
        ratios = [one / other for one, other in zip(own, seconds[reference], strict=True)]
        cells = [name, spread(own), spread(ratios), "", ""]
        if dense is not None:
            loss, theirs = statistics.fmean(losses[name]), statistics.fmean(losses[reference])
            cells[3:] = [f"{loss:.5f}", f"{(theirs - loss) / (theirs - dense):.1%}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
