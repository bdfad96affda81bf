"""Exact causal scores against the plain method (one hooked forward pass per head), side by side.

Both run on the same model and examples in one process, taking turns; their scores are compared.
The floor is the time that matrix products alone would take: the floating-point operations of what
follows each head, at the rate at which this machine multiplies matrices of the model's shapes,
which is measured in turn with the methods.

    python benchmarks/scoring.py                       # a random 12-layer Llama
    python benchmarks/scoring.py --hidden 768 --examples 32 --tokens 256 --prefix-share 0.75
    python benchmarks/scoring.py --model DIR --texts FILE.jsonl
    python benchmarks/scoring.py --device cuda --dtype bfloat16 --layers 20 --heads 32 \
        --hidden 2048 --vocabulary 32000 --examples 32 --tokens 256
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

from optimum_cap.data import CalibrationExample, shared_prefix
from optimum_cap.estimation import device_name
from optimum_cap.models import ModelView, Site, SiteUnit, find_sites
from optimum_cap.scoring import (
    ScoringSettings,
    UnitLosses,
    causal_scores,
    exact_losses,
    plain_losses,
    tokens_per_chunk,
)


def random_llama(
    layers: int, heads: int, hidden: int, vocabulary: int = 4096, device: str = "cpu"
) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=2048,
        initializer_range=0.1,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `model_of` reads."""
    parser.add_argument("--model", help="a Llama or alike: folder or Hub id; default: a random one")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the weights, such as bfloat16")


def model_of(arguments: argparse.Namespace) -> PreTrainedModel:
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
    else:
        sizes = arguments.layers, arguments.heads, arguments.hidden, arguments.vocabulary
        model = random_llama(*sizes, arguments.device)
    return model.to(arguments.device, getattr(torch, arguments.dtype))


def place(model: PreTrainedModel) -> str:
    """The device and dtype of a model, in words."""
    return f"{device_name(model.device)}, {str(model.dtype).removeprefix('torch.')}"


def random_examples(
    count: int, tokens: int, vocabulary: int, prefix_share: float
) -> list[CalibrationExample]:
    """Examples that begin with the same tokens; half of what follows is scored."""
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(vocabulary, (round(prefix_share * tokens),), generator=generator)
    scored = torch.zeros(tokens, dtype=torch.bool)
    scored[(len(prefix) + tokens) // 2 :] = True
    return [
        CalibrationExample(
            torch.cat(
                [prefix, torch.randint(vocabulary, (tokens - len(prefix),), generator=generator)]
            ),
            scored,
            "random",
            index,
            "",
        )
        for index in range(count)
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


def linear_flops(layer: nn.Module) -> dict[str, int]:
    """Floating-point operations per token of each projection in a layer, by its own name."""
    return {
        name.rpartition(".")[2]: 2 * module.weight.numel()
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


def floor_flops(
    model: PreTrainedModel,
    units: list[SiteUnit],
    examples: list[CalibrationExample],
) -> int:
    """Floating-point operations that exact scores of a Llama's heads cannot do without.

    Those that follow a head: the output projection and MLP of its layer, the layers above, the
    logits. In the last layer only keys and values are needed at positions that are not scored. A
    shared prefix counts once per head, the last token of an example, which predicts nothing, not at
    all, and in the attention each token meets only those before it.
    """
    prefix, last = shared_prefix(examples), model.config.num_hidden_layers - 1
    ends = [len(example.input_ids) - 1 for example in examples]
    tokens = prefix + sum(end - prefix for end in ends)
    pairs = (prefix * (prefix + 1) + sum((e - prefix) * (e + prefix + 1) for e in ends)) // 2
    scored = sum(int(example.scored.sum()) for example in examples)
    scored_pairs = sum(int(example.scored.nonzero().sum()) for example in examples)

    projections = linear_flops(ModelView(model, [site for site, _ in units]).layers[0])
    whole = sum(projections.values())
    keys_values = projections["k_proj"] + projections["v_proj"]
    behind = whole - keys_values - projections["q_proj"]
    pair = 4 * units[0][0].width
    logits = scored * 2 * model.lm_head.weight.numel()
    last_layer = tokens * keys_values + scored * (whole - keys_values) + scored_pairs * pair
    total = 0
    for site, _ in units:
        per_head = logits
        if site.layer == last:
            per_head += scored * behind
        else:
            between = last - site.layer - 1
            per_head += tokens * behind + between * (tokens * whole + pairs * pair) + last_layer
        total += per_head
    return total


def matmul_rate(model: PreTrainedModel, sites: list[Site]) -> float:
    """Floating-point operations per second of one layer's projections, on a chunk of tokens."""
    layer = ModelView(model, sites).layers[0]
    dtype = torch.float32 if model.device.type == "cpu" else model.dtype
    products = [
        (
            torch.randn(tokens_per_chunk(model), module.in_features).to(model.device, dtype),
            module.weight.detach().to(dtype),
        )
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    ]
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        for inputs, weight in products:
            nn.functional.linear(inputs, weight)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    per_token = sum(linear_flops(layer).values())
    return tokens_per_chunk(model) * per_token / statistics.median(seconds)


def summary(values: list[float], form: str = ".2f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratios(first: list[float], second: list[float]) -> str:
    return summary([a / b for a, b in zip(first, second, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--texts", type=Path, help="json lines with a 'text' each")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="tokens per example")
    parser.add_argument(
        "--prefix-share", type=float, default=0.0, help="share of an example that all begin with"
    )
    parser.add_argument(
        "--scored-heads", type=int, metavar="N", help="of each layer (default: all of them)"
    )
    parser.add_argument(
        "--layer-step", type=int, default=1, metavar="N", help="score each N-th layer alone"
    )
    parser.add_argument("--torch-compile", action="store_true", help="also with compiled layers")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    logging.disable_progress_bar()

    model = model_of(arguments)
    if arguments.texts:
        examples = text_examples(
            arguments.texts, arguments.model, arguments.examples, arguments.tokens
        )
    else:
        examples = random_examples(
            arguments.examples, arguments.tokens, model.config.vocab_size, arguments.prefix_share
        )
    sites = [site for site in find_sites(model) if site.kind == "attention"]
    units = [
        SiteUnit(site, unit)
        for site in sites[:: arguments.layer_step]
        for unit in site.units[: arguments.scored_heads]
    ]

    view = ModelView(model, sites)
    flops = floor_flops(model, units, examples)
    scores = {}
    methods: dict[str, Callable[..., UnitLosses]] = {"exact": exact_losses, "plain": plain_losses}
    if arguments.torch_compile:
        methods["exact, compiled"] = partial(
            exact_losses, settings=ScoringSettings(torch_compile=True)
        )
    seconds: dict[str, list[float]] = {name: [] for name in (*methods, "floor")}
    # The first pass of a kind pays for what all later ones use.
    first = {}
    for name, method in methods.items():
        start = time.perf_counter()
        method(view, examples[:2], units=units[:2])
        first[name] = time.perf_counter() - start
    for _ in range(arguments.runs):
        for name, method in methods.items():
            start = time.perf_counter()
            losses = method(view, examples, units=units)
            seconds[name].append(time.perf_counter() - start)
            scores[name] = causal_scores(losses, subsets=min(3, len(examples))).scores
        seconds["floor"].append(flops / matmul_rate(model, sites))

    tokens = sum(len(example.input_ids) for example in examples)
    layers = {site.layer for site, _ in units}
    print(
        f"{len(units)} heads of {len(layers)} layers, {len(examples)} examples, {tokens} tokens, "
        f"{shared_prefix(examples)} tokens shared, {place(model)}\n"
    )
    print("| method | seconds, median (min to max) |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {summary(values)} |")
    rates = [flops / floor / 1e9 for floor in seconds["floor"]]
    print(f"\nfloor: {flops / 1e12:.2f} TFLOP at {summary(rates, '.0f')} GFLOP/s")
    for name in methods:
        if name == "plain":
            continue
        difference = (scores[name] - scores["plain"]).abs().max() / scores["plain"].abs().max()
        print(f"plain / {name}: {ratios(seconds['plain'], seconds[name])}")
        print(f"{name} / floor: {ratios(seconds[name], seconds['floor'])}")
        print(f"largest difference of a score: {float(difference):.1e} of the largest score")
    if arguments.torch_compile:
        print(f"compiling, with two heads on two examples: {first['exact, compiled']:.1f} s")


if __name__ == "__main__":
    main()
