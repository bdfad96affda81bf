"""Calibrate on published answers or on the model's own, and compare the losses on both kinds.

    python examples/real_models/own_answers.py runs/models/smollm2 --sparsity 0.5
    python examples/real_models/own_answers.py MODEL --data train.jsonl --held-out test.jsonl

The dense model answers prompts of the training split, on which one copy is calibrated, and prompts
of the test split, on which the losses are measured, beside those of their published answers. All
losses are means over examples, in nats per token. Answers and pruned layers are stored, so an
interrupted run continues.
"""

import argparse
import json
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.data import CalibrationExample, build_calibration_set, load_tokenizer
from optimum_cap.generation import answer_prompts
from optimum_cap.runtime import ALONE
from optimum_cap.scoring import example_losses

SETS = ("own", "published")
HELD_OUT = {"path": "gsm8k", "split": "test"}


def dataset(text: str) -> Any:
    """Return a data set as `CAPConfig` takes it: a preset, a file, or a JSON specification."""
    return json.loads(text) if text.startswith("{") else text


def held_out(
    model: PreTrainedModel, tokenizer: Any, config: CAPConfig
) -> dict[str, list[CalibrationExample]]:
    """Return prompts with the answers of the dense model, and the same with published answers."""
    answered = answer_prompts(model, tokenizer, config, ALONE)
    published = build_calibration_set(
        CAPConfig(
            sparsity=config.sparsity,
            dataset=config.dataset,
            num_samples=config.num_samples,
            seed=config.seed,
        ),
        tokenizer,
    )
    own = [answer.example("answer") for answer in answered.answers]
    digests = {example.digest for example in own}
    return {"own": own, "published": [e for e in published.examples if e.digest in digests]}


def line(name: str, model: PreTrainedModel, sets: dict[str, list[CalibrationExample]]) -> str:
    """Return a row of the table: the losses of a model with standard errors."""
    cells = []
    for which in SETS:
        losses = example_losses(model, sets[which]).double().tolist()
        mean = sum(losses) / len(losses)
        cells.append(f"{mean:.4f} ± {stdev(losses) / len(losses) ** 0.5:.4f}")
    return f"| {name} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Print a table: a row for the dense model and for each kind of calibration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Hub id or folder of a dense model")
    parser.add_argument("--sparsity", type=float, default=0.5, help="(default: 0.5)")
    parser.add_argument("--recipe", default="causal_fast", help="(default: causal_fast)")
    parser.add_argument(
        "--data", type=dataset, default="gsm8k", help="training prompts (default: gsm8k)"
    )
    parser.add_argument(
        "--held-out",
        type=dataset,
        default=HELD_OUT,
        help="prompts to measure the losses on (default: the split test of gsm8k)",
    )
    parser.add_argument("--num-samples", type=int, default=64, help="of each (default: 64)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="(default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--store", default="runs/own_answers", help="(default: runs/own_answers)")
    given = parser.parse_args(arguments)

    common = {
        "sparsity": given.sparsity,
        "recipe": given.recipe,
        "num_samples": given.num_samples,
        "seed": given.seed,
        "resume_dir": Path(given.store),
    }
    answering = {
        "answers": "model",
        "answer_attempts": 1,
        "max_new_tokens": given.max_new_tokens,
    }

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)

    tokenizer = load_tokenizer(given.model)
    dense = load()
    sets = held_out(dense, tokenizer, CAPConfig(dataset=given.held_out, **common, **answering))
    print(f"| calibrated on | loss on own answers ({len(sets['own'])}) | on published answers |")
    print("|---|---|---|")
    print(line("dense", dense, sets), flush=True)
    del dense
    for name, fields in (("published answers", {}), ("own answers", answering)):
        config = CAPConfig(dataset=given.data, **common, **fields)
        print(line(name, CAPPruner(config).prune(load(), tokenizer), sets), flush=True)


if __name__ == "__main__":
    main()
