"""What `optimum-cli cap estimate` predicts for this machine against what it then takes.

Random Llamas of several sizes, or a real model, are scored and pruned, or lose parts; before each
run the machine is measured anew.

    python benchmarks/estimate.py --tokens 128 --runs 3
    python benchmarks/estimate.py --tokens 128 --runs 3 --parts channels=0.25 heads=0.5 layers=0.25
    python benchmarks/estimate.py --examples 4 --tokens 64 --model DIR --parts channels=0.2
    python benchmarks/estimate.py --cpu-seconds --threads 1    # on a machine that does other work
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from scoring import random_examples, random_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.estimation import estimate
from optimum_cap.estimation.hardware import Hardware, measure
from optimum_cap.estimation.run import size_of, work_of
from optimum_cap.models import ModelView, find_sites
from optimum_cap.scoring import ESTIMATORS

SIZES = {"small": (4, 8, 384), "medium": (6, 8, 512), "large": (8, 12, 768)}
_TOLERANCE = 0.3


def number_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are numbers between blanks; 0 is padding.

    Not by the name "0", which a tokenizer would find inside other numbers.
    """
    words = {str(number) if number else "<pad>": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def part_steps(
    model: PreTrainedModel, count: int, tokens: int, parts: dict[str, float], recipes: list[str]
) -> dict[str, Callable[[], Callable[[], object]]]:
    """Pattern and recipe -> what makes ready and returns what is timed."""
    examples = random_examples(count, tokens, model.config.vocab_size, 0.0)
    tokenizer = number_tokenizer(model.config.vocab_size)
    texts = [" ".join(map(str, example.input_ids.tolist())) for example in examples]

    def pruning(pattern: str, name: str) -> Callable[[], Callable[[], object]]:
        config = CAPConfig(
            parts[pattern], recipe=name, pattern=pattern, dataset=texts, num_samples=count
        )

        def ready() -> Callable[[], object]:
            fresh = copy.deepcopy(model)
            return lambda: CAPPruner(config).prune(fresh, tokenizer)

        return ready

    return {f"{pattern}, {name}": pruning(pattern, name) for pattern in parts for name in recipes}


def predictions(
    model: PreTrainedModel,
    hardware: Hardware,
    count: int,
    tokens: int,
    parts: dict[str, float],
) -> dict[str, float]:
    """Step -> predicted seconds."""
    lengths = {"examples": count, "tokens": tokens}
    if not parts:
        return {c.name: c.seconds for c in estimate(model.config, hardware, **lengths).costs}
    seconds = {}
    for pattern, sparsity in parts.items():
        # All tokens of a text but the first are scored.
        predicted = estimate(
            model.config, hardware, **lengths, scored=tokens - 1, pattern=pattern, sparsity=sparsity
        )
        seconds |= {
            f"{pattern}, {cost.name}": cost.seconds
            for cost in predicted.costs
            if cost.step == "prune"
        }
    return seconds


def steps(
    model: PreTrainedModel, count: int, tokens: int
) -> dict[str, Callable[[], Callable[[], object]]]:
    """Name -> what makes ready and returns what is timed."""
    examples = random_examples(count, tokens, model.config.vocab_size, 0.0)
    sites = [site for site in find_sites(model) if site.kind == "attention"]
    tokenizer = number_tokenizer(model.config.vocab_size)
    texts = [" ".join(map(str, example.input_ids.tolist())) for example in examples]

    def scoring(name: str) -> Callable[[], Callable[[], object]]:
        return lambda: lambda: ESTIMATORS[name].function(ModelView(model, sites), examples)

    def pruning(name: str) -> Callable[[], Callable[[], object]]:
        config = CAPConfig(sparsity=0.5, recipe=name, dataset=texts, num_samples=count)

        def ready() -> Callable[[], object]:
            fresh = copy.deepcopy(model)
            return lambda: CAPPruner(config).prune(fresh, tokenizer)

        return ready

    return {
        **{name: scoring(name) for name in ("exact", "plain", "first_order")},
        **{name: pruning(name) for name in ("causal", "wanda", "sparsegpt")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="tokens per example")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--model", help="folder of a model; default: random Llamas of --sizes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-seconds", action="store_true", help="of one thread; not of a clock")
    parser.add_argument(
        "--parts", nargs="+", default=[], help="PATTERN=SPARSITY to remove, instead of weights"
    )
    parser.add_argument("--recipes", nargs="+", default=["causal", "causal_fast"])
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    if arguments.cpu_seconds and arguments.threads != 1:
        parser.error("--cpu-seconds adds up the seconds of all threads: set --threads 1")
    clock = time.process_time if arguments.cpu_seconds else time.perf_counter
    pairs = (each.partition("=") for each in arguments.parts)
    parts = {pattern: float(sparsity) for pattern, _, sparsity in pairs}

    print(f"{arguments.examples} examples of {arguments.tokens} tokens, ", end="")
    print(f"{torch.get_num_threads()} threads, median (min to max) of {arguments.runs} runs\n")
    print("| model (layers, heads, hidden) | step | predicted s | measured s | ratio |")
    print("|---|---|---|---|---|")
    ratios = []
    models = [arguments.model] if arguments.model else arguments.sizes
    for name in models:
        if arguments.model:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        else:
            model = random_llama(*SIZES[name])
        lengths = arguments.examples, arguments.tokens
        prepared = (
            part_steps(model, *lengths, parts, arguments.recipes)
            if parts
            else steps(model, *lengths)
        )
        size = size_of(work_of(model.config), arguments.tokens)
        shape = (
            model.config.num_hidden_layers,
            model.config.num_attention_heads,
            model.config.hidden_size,
        )
        measured: dict[str, list[float]] = {step: [] for step in prepared}
        predicted: dict[str, list[float]] = {step: [] for step in prepared}
        for _ in range(arguments.runs):
            seconds = predictions(model, measure(size, clock), *lengths, parts)
            for step, ready in prepared.items():
                predicted[step].append(seconds[step])
                run = ready()
                start = clock()
                run()
                measured[step].append(clock() - start)
        for step, times in measured.items():
            median, low, high = statistics.median(times), min(times), max(times)
            expected = statistics.median(predicted[step])
            ratios.append(expected / median)
            print(
                f"| {shape} | {step} | {expected:.2f} | "
                f"{median:.2f} ({low:.2f} to {high:.2f}) | {ratios[-1]:.2f} |",
                flush=True,
            )
    within = sum(abs(ratio - 1) <= _TOLERANCE for ratio in ratios)
    print(f"\nwithin {_TOLERANCE:.0%}: {within} of {len(ratios)}")


if __name__ == "__main__":
    main()
