"""What `optimum-cli cap estimate` predicts for this machine against what it then takes.

Random Llamas of several sizes are scored and pruned; before each size the machine is measured anew.

    python benchmarks/estimate.py --tokens 128 --runs 3
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from scoring import random_examples, random_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.estimation import estimate
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


def steps(
    model: LlamaForCausalLM, count: int, tokens: int
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
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    print(f"{arguments.examples} examples of {arguments.tokens} tokens, ", end="")
    print(f"{torch.get_num_threads()} threads, median (min to max) of {arguments.runs} runs\n")
    print("| Llama (layers, heads, hidden) | step | predicted s | measured s | ratio |")
    print("|---|---|---|---|---|")
    ratios = []
    for name in arguments.sizes:
        model = random_llama(*SIZES[name])
        prepared = steps(model, arguments.examples, arguments.tokens)
        predicted = estimate(
            model.config, "measured", examples=arguments.examples, tokens=arguments.tokens
        )
        seconds = {cost.name: cost.seconds for cost in predicted.costs}
        measured: dict[str, list[float]] = {step: [] for step in prepared}
        for _ in range(arguments.runs):
            for step, ready in prepared.items():
                run = ready()
                start = time.perf_counter()
                run()
                measured[step].append(time.perf_counter() - start)
        for step, times in measured.items():
            median, low, high = statistics.median(times), min(times), max(times)
            ratios.append(seconds[step] / median)
            print(
                f"| {SIZES[name]} | {step} | {seconds[step]:.2f} | "
                f"{median:.2f} ({low:.2f} to {high:.2f}) | {ratios[-1]:.2f} |",
                flush=True,
            )
    within = sum(abs(ratio - 1) <= _TOLERANCE for ratio in ratios)
    print(f"\nwithin {_TOLERANCE:.0%}: {within} of {len(ratios)}")


if __name__ == "__main__":
    main()
