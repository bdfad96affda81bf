"""Exact causal scores against the plain method (one hooked forward pass per head), side by side.

Both run on the same model and examples in one process, taking turns; their scores are compared.

    python benchmarks/scoring.py                       # a random 12-layer Llama
    python benchmarks/scoring.py --model DIR --texts FILE.jsonl
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from optimum_cap.architectures import find_sites
from optimum_cap.attribution import causal_scores, exact_losses, plain_losses
from optimum_cap.calibration import CalibrationExample


def random_llama(layers: int, heads: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // 8 * 8,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=2048,
            initializer_range=0.1,
        )
    ).eval()


def random_examples(count: int, tokens: int, vocabulary: int) -> list[CalibrationExample]:
    generator = torch.Generator().manual_seed(0)
    scored = torch.zeros(tokens, dtype=torch.bool)
    scored[tokens // 2 :] = True
    return [
        CalibrationExample(
            torch.randint(vocabulary, (tokens,), generator=generator), scored, "random", i, ""
        )
        for i in range(count)
    ]


def text_examples(path: Path, model_path: str, count: int, tokens: int) -> list[CalibrationExample]:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    examples = []
    with path.open(encoding="utf-8") as lines:
        for index, line in zip(range(count), lines, strict=False):
            ids = torch.tensor(tokenizer(json.loads(line)["text"])["input_ids"][:tokens])
            scored = torch.ones(len(ids), dtype=torch.bool)
            scored[0] = False
            examples.append(CalibrationExample(ids, scored, path.name, index, ""))
    return examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id; default: a random Llama")
    parser.add_argument("--texts", type=Path, help="json lines with a 'text' each")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="tokens per example")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    logging.disable_progress_bar()

    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    else:
        model = random_llama(arguments.layers, arguments.heads, arguments.hidden)
    if arguments.texts:
        examples = text_examples(
            arguments.texts, arguments.model, arguments.examples, arguments.tokens
        )
    else:
        examples = random_examples(arguments.examples, arguments.tokens, model.config.vocab_size)
    sites = [site for site in find_sites(model) if site.kind == "attention"]

    seconds: dict[str, list[float]] = {"exact": [], "plain": []}
    scores = {}
    for _ in range(arguments.runs):
        for name, method in (("exact", exact_losses), ("plain", plain_losses)):
            start = time.perf_counter()
            losses = method(model, sites, examples)
            seconds[name].append(time.perf_counter() - start)
            scores[name] = causal_scores(losses, subsets=min(3, len(examples))).scores
    ratios = [
        plain / exact for plain, exact in zip(seconds["plain"], seconds["exact"], strict=True)
    ]
    difference = (scores["exact"] - scores["plain"]).abs().max() / scores["plain"].abs().max()

    tokens = sum(len(example.input_ids) for example in examples)
    heads = sum(len(site.units) for site in sites)
    print(
        f"{heads} heads in {len(sites)} layers, {len(examples)} examples, {tokens} tokens, "
        f"{torch.get_num_threads()} threads, {model.device}\n"
    )
    print("| method | seconds, median (min to max) |\n|---|---|")
    for name, values in seconds.items():
        median, low, high = statistics.median(values), min(values), max(values)
        print(f"| {name} | {median:.2f} ({low:.2f} to {high:.2f}) |")
    print(
        f"\nplain / exact: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}); largest difference of a score: "
        f"{float(difference):.1e} of the largest score"
    )


if __name__ == "__main__":
    main()
