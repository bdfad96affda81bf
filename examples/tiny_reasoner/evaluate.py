"""Accuracy of a model on the reasoning problems, by kind, with 95 % intervals.

python examples/tiny_reasoner/evaluate.py MODEL_FOLDER [--split test] [--limit 300]
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from tasks import KINDS, Problem, extract_answer, read_jsonl
from train import encode, padded
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from optimum_cap.evaluation import wilson_interval

DATA = Path(__file__).parent / "data"


@torch.no_grad()
def generated_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    batch_size: int = 128,
) -> list[str]:
    """Answer each problem greedily, in order.

    Batches hold questions of similar length, padded on the left.
    """
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for problem in problems
    ]
    order = sorted(range(len(problems)), key=lambda index: len(prompts[index]))
    answers = [""] * len(problems)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[index] for index in chosen],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(**batch, max_new_tokens=96, do_sample=False)
        texts = tokenizer.batch_decode(
            output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
    return answers


def correct_answers(problems: list[Problem], answers: list[str]) -> list[bool]:
    """Compare what follows `####` in each answer with the final answer of its problem."""
    return [
        extract_answer(answer) == problem.final_answer
        for problem, answer in zip(problems, answers, strict=True)
    ]


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    batch_size: int = 128,
) -> dict[str, float]:
    """Fraction of right final answers per kind of problem."""
    right = defaultdict(list)
    answers = generated_answers(model, tokenizer, problems, batch_size)
    for problem, correct in zip(problems, correct_answers(problems, answers), strict=True):
        right[problem.kind].append(correct)
    return {kind: sum(values) / len(values) for kind, values in right.items()}


@torch.no_grad()
def answer_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    batch_size: int = 64,
) -> dict[str, float]:
    """Mean cross-entropy per answer token (nats) per kind of problem, the worked answer given."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    ordered = sorted(problems, key=lambda problem: len(problem.question) + len(problem.answer))
    for start in range(0, len(ordered), batch_size):
        rows = ordered[start : start + batch_size]
        input_ids, labels = padded(encode(tokenizer, rows), tokenizer.pad_token_id)
        logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float().cpu(), labels[:, 1:].flatten(), reduction="none"
        ).view(len(rows), -1)
        for row, values, targets in zip(rows, losses, labels[:, 1:], strict=True):
            sums[row.kind] += float(values.sum())
            counts[row.kind] += int((targets != -100).sum())
    kinds = dict.fromkeys(problem.kind for problem in problems)
    return {kind: sums[kind] / counts[kind] for kind in kinds if counts[kind]}


def load_problems(split: str, limit: int | None = None) -> list[Problem]:
    """Read a split; `limit` keeps the first that many problems of each kind."""
    rows = read_jsonl(DATA / f"{split}.jsonl")
    kept = (([row for row in rows if row.kind == kind])[:limit] for kind in KINDS)
    return [row for kind in kept for row in kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("--split", default="test", choices=("calibration", "validation", "test"))
    parser.add_argument("--limit", type=int, help="problems of each kind (default: all)")
    arguments = parser.parse_args()
    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    problems = load_problems(arguments.split, arguments.limit)
    losses = answer_loss(model, tokenizer, problems)
    print("| kind | accuracy | 95 % interval | loss per answer token |\n|---|---|---|---|")
    for kind, share in accuracy(model, tokenizer, problems).items():
        total = sum(problem.kind == kind for problem in problems)
        low, high = wilson_interval(round(share * total), total)
        print(f"| {kind} | {share:.1%} | {low:.1%} to {high:.1%} | {losses[kind]:.4f} |")


if __name__ == "__main__":
    main()
