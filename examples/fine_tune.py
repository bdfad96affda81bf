"""Fine-tune the embedded reasoning model after pruning, and see what is left of its zeros. Offline.

All weights and LoRA adapters are trained, each with and without what keeps zeros, on the problems
that the model knows already or on others:

    python examples/fine_tune.py [--sparsity 0.5] [--recipe wanda] [--steps 200]
    python examples/fine_tune.py --train gsm8k/train.jsonl --test gsm8k/test.jsonl

A line of these files has a `question` and an `answer`.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from optimum_cap import CAPConfig
from optimum_cap.text import aligned
from optimum_cap.training import KeepSparsity, SparseLoraConfig, merge_and_keep_sparsity

REASONER = Path(__file__).parent / "tiny_reasoner"
MODEL = str(REASONER / "model")
sys.path.insert(0, str(REASONER))
from evaluate import answer_loss, load_problems  # noqa: E402
from tasks import Problem, make_split  # noqa: E402
from train import encode  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction (default: 0.5)")
    parser.add_argument("--recipe", default="wanda", help="recipe of pruning (default: wanda)")
    parser.add_argument("--steps", type=int, default=200, help="steps of training")
    parser.add_argument("--train", type=Path, help="JSON lines to train on")
    parser.add_argument("--test", type=Path, help="JSON lines to test with")
    parser.add_argument("--batch-size", type=int, default=32, help="problems in a step")
    parser.add_argument(
        "--max-length", type=int, default=256, help="tokens; longer ones are left out"
    )
    parser.add_argument("--limit", type=int, default=150, help="test problems of each kind")
    parser.add_argument("--output", type=Path, default=Path("runs/fine_tune"))
    arguments = parser.parse_args()
    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if arguments.train is None:
        problems = make_split("train", arguments.steps * arguments.batch_size // 3 + 1)
        tests = load_problems("test", arguments.limit)
    else:
        problems = read_problems(arguments.train)
        tests = read_problems(arguments.test or parser.error("--train needs --test"))
        tests = tests[: arguments.limit]
    kinds = list(dict.fromkeys(problem.kind for problem in tests))
    rows = [
        {"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]}
        for tokens, prompt in encode(tokenizer, problems)
        if len(tokens) <= arguments.max_length
    ]
    calibration = str(REASONER / "data" / "calibration.jsonl")
    config = CAPConfig(sparsity=arguments.sparsity, dataset=calibration, recipe=arguments.recipe)
    pruned = AutoModelForCausalLM.from_pretrained(MODEL, pruning_config=config)

    def train(model: Any, name: str, rate: float, **options: Any) -> float:
        settings = TrainingArguments(
            output_dir=str(arguments.output / name),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 10,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            logging_strategy="no",
        )
        set_seed(0)
        start = time.perf_counter()
        Trainer(
            model,
            settings,
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            **options,
        ).train()
        return (time.perf_counter() - start) / arguments.steps

    table = [["", "zeros", *kinds, "seconds a step"]]

    def report(name: str, model: PreTrainedModel, seconds: float | None = None) -> None:
        zeros, total = counts(model)
        losses = answer_loss(model.eval(), tokenizer, tests)
        row = [name, f"{zeros / total:.2%}", *(f"{losses[kind]:.4f}" for kind in kinds)]
        table.append([*row, "" if seconds is None else f"{seconds:.2f}"])
        print(f"{name}: done", flush=True)

    report("pruned", pruned)

    model = copy.deepcopy(pruned)
    seconds = train(model, "full", 5e-4)
    report("all weights, zeros filled", model, seconds)

    model = copy.deepcopy(pruned)
    seconds = train(model, "kept", 5e-4, callbacks=[KeepSparsity()])
    report("all weights, KeepSparsity", model, seconds)
    model.save_pretrained(arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")

    adapted = get_peft_model(
        copy.deepcopy(pruned), SparseLoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
    )
    seconds = train(adapted, "sparse_lora", 2e-3)
    before = logits(adapted)
    model, lost = merge_and_keep_sparsity(adapted)
    report("SparseLoraConfig, merged", model, seconds)
    change = (logits(model) - before).abs().max()
    print(f"merging the sparse adapter changes logits by {change:.1e} and loses {lost:.1%}")

    adapted = get_peft_model(
        copy.deepcopy(pruned), LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
    )
    seconds = train(adapted, "lora", 2e-3)
    filled = copy.deepcopy(adapted).merge_and_unload()
    report("LoRA, merged by PEFT", filled, seconds)
    model, lost = merge_and_keep_sparsity(adapted)
    report("LoRA, merge_and_keep_sparsity", model)
    print(f"merging the ordinary adapter loses {lost:.1%} of its update\n")

    print(aligned(table, left=1))


def read_problems(file: Path) -> list[Problem]:
    """Read problems that have a question and an answer, and no more."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [Problem(file.parent.name, row["question"], row["answer"]) for row in rows]


def counts(model: PreTrainedModel) -> tuple[int, int]:
    """Return the zeros and all weights of the matrices that were pruned."""
    weights = [model.get_parameter(matrix.name) for matrix in model.pruning_record.matrices]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Return the logits of a few tokens."""
    tokens = torch.arange(8, 40)[None]
    result: torch.Tensor = model.eval()(input_ids=tokens).logits
    return result


if __name__ == "__main__":
    main()
