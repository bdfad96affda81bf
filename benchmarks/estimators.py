"""Estimators of causal scores against the plain loop (one hooked forward pass per head).

All of them run on the same model and examples in one process, taking turns; each run draws its
exact examples anew. Their scores are compared with the exact ones by Spearman's rank correlation.
Then the draw of `control_variate` is repeated on the measured losses, with starts at equal
distances, beside draws with equal probabilities.

    python benchmarks/estimators.py                       # a random 12-layer Llama
    python benchmarks/estimators.py --model examples/tiny_reasoner/model \
        --data examples/tiny_reasoner/data/calibration.jsonl --examples 128
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time

import torch
from scoring import add_model_arguments, model_of, place, random_examples
from transformers import AutoTokenizer
from transformers.utils import logging

from optimum_cap import CAPConfig
from optimum_cap.data import build_calibration_set
from optimum_cap.models import ModelView, find_sites
from optimum_cap.runtime import ALONE
from optimum_cap.scoring import (
    ESTIMATORS,
    SampledLosses,
    UnitLosses,
    causal_scores,
    chances_in_blocks,
    chances_of_drawing,
    draw_blocks,
    draw_examples,
)

_DRAWS = 100
_COUNTS = (8, 16, 24, 32, 48, 64, 96, 128)  # exact examples


def spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    """Pearson's correlation of the ranks (there are no ties among measured losses)."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def scores_of(losses: UnitLosses, aggregation: str) -> torch.Tensor:
    subsets = 3 if aggregation == "median" else 1
    return causal_scores(losses, subsets, aggregation).scores


def halves(losses: UnitLosses) -> tuple[UnitLosses, UnitLosses]:
    """The losses on the first and on the second half of the examples."""
    middle = len(losses.intact) // 2
    first, second = (
        UnitLosses(losses.units, losses.intact[part], losses.masked[:, part])
        for part in (slice(middle), slice(middle, None))
    )
    return first, second


def over_draws(
    exact: UnitLosses, first_order: UnitLosses, count: int, clear: torch.Tensor
) -> list[str]:
    """Agreement with all exact losses, of three uses of `count` of them, and a ratio of errors.

    The uses are the control variate, the same with equal probabilities, and these examples alone.
    The ratio is that of the first two's root mean square error of a mean score over the draws, as
    its geometric mean over the heads: those that are `clear`, and the others.
    """
    wanted, truth = scores_of(exact, "median"), exact.masked.mean(dim=1)
    chances = chances_of_drawing(first_order, count)
    agreement: list[list[float]] = [[], [], []]
    errors: list[list[torch.Tensor]] = [[], []]
    for seed in range(_DRAWS):
        blocks = draw_blocks(len(exact.intact), count, seed)
        by_effects = draw_examples(chances, (seed + 0.5) / _DRAWS)
        equal = sorted(block[0] for block in blocks)
        estimates = [
            estimated(exact, first_order, by_effects, chances),
            estimated(exact, first_order, equal, chances_in_blocks(blocks, 1)),
        ]
        alone = UnitLosses(exact.units, exact.intact[equal], exact.masked[:, equal])
        for values, losses in zip(agreement, [*estimates, alone], strict=True):
            values.append(spearman(scores_of(losses, "median"), wanted))
        for of_draws, losses in zip(errors, estimates, strict=True):
            of_draws.append(losses.masked.mean(dim=1) - truth)
    cuts = [statistics.quantiles(values, n=20) for values in agreement]
    squares = [torch.stack(of_draws).square().mean(dim=0) for of_draws in errors]
    ratios = (squares[0] / squares[1]).sqrt()
    means = [float(ratios[which].log().mean().exp()) for which in (clear, ~clear)]
    return [
        *(f"{cut[9]:.3f} ({cut[0]:.3f} to {cut[-1]:.3f})" for cut in cuts),
        *(f"{mean:.2f}" if math.isfinite(mean) else "-" for mean in means),
    ]


def estimated(
    exact: UnitLosses, first_order: UnitLosses, drawn: list[int], chances: torch.Tensor
) -> UnitLosses:
    """The estimate with exact losses of some examples."""
    sampled = SampledLosses(first_order)
    sampled.record(range(len(exact.units)), drawn, exact.masked[:, drawn], chances)
    return sampled.losses()


def spread(values: list[float], digits: int = 2) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--data", help="calibration data of that model")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="tokens per random example")
    parser.add_argument("--exact-examples", type=int, default=16)
    parser.add_argument("--precision", type=float, default=0.1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, where other work shares the CPU"
    )
    arguments = parser.parse_args()
    logging.disable_progress_bar()

    config = CAPConfig(
        sparsity=0.5,
        recipe="paper",
        estimator="adaptive",
        dataset=arguments.data or "random",
        num_samples=arguments.examples,
        exact_examples=arguments.exact_examples,
        precision=arguments.precision,
    )
    model = model_of(arguments)
    if arguments.model:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        examples = build_calibration_set(config, tokenizer).examples
    else:
        examples = random_examples(
            arguments.examples, arguments.tokens, model.config.vocab_size, 0.0
        )
    sites = [site for site in find_sites(model) if site.kind == "attention"]

    clock = time.process_time if arguments.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    found: dict[str, list[UnitLosses]] = {name: [] for name in ESTIMATORS}
    # The first pass of a kind pays for what all later ones use.
    for estimator in ESTIMATORS.values():
        estimator.losses(
            ModelView(model, sites),
            examples[:2],
            dataclasses.replace(config, exact_examples=2),
            ALONE,
        )
    for run in range(arguments.runs):
        for name, estimator in ESTIMATORS.items():
            start = clock()
            losses = estimator.losses(
                ModelView(model, sites), examples, dataclasses.replace(config, seed=run), ALONE
            )
            seconds[name].append(clock() - start)
            found[name].append(losses)
            print(f"run {run}: {name} {seconds[name][-1]:.2f} s", file=sys.stderr)

    exact = found["exact"][0]
    scores = causal_scores(exact, 1, "mean")
    clear = scores.scores.abs() > 2 * scores.standard_errors
    tokens = sum(len(example.input_ids) for example in examples)
    print(
        f"{len(exact.units)} heads in {len(sites)} layers, {len(examples)} examples, {tokens} "
        f"tokens, {place(model)}; {arguments.exact_examples} exact examples; {int(clear.sum())} "
        "heads have a mean score beyond 2 standard errors\n"
    )
    print(
        "| estimator | seconds | plain / it | Spearman with exact, median of subsets | mean |\n"
        "|---|---|---|---|---|"
    )
    for name in ESTIMATORS:
        ratios = [plain / own for plain, own in zip(seconds["plain"], seconds[name], strict=True)]
        agreement = [
            spread([spearman(scores_of(own, how), scores_of(exact, how)) for own in found[name]], 3)
            for how in ("median", "mean")
        ]
        print(
            f"| {name} | {spread(seconds[name])} | {spread(ratios, 1)} | {' | '.join(agreement)} |"
        )
    first_order = found["first_order"][0]
    print(
        f"\nSpearman over {_DRAWS} draws, median (5 to 95 %), of the median of subsets; error of a "
        "mean score over that with equal probabilities, of heads beyond 2 standard errors and "
        "others:\n\n"
        "| exact examples | control_variate | equal probabilities | exact on these alone "
        "| error, clear | error, others |\n|---|---|---|---|---|---|"
    )
    counts = {count for count in _COUNTS if count <= len(examples) // 2}
    for count in sorted({*counts, arguments.exact_examples}):
        print(f"| {count} | {' | '.join(over_draws(exact, first_order, count, clear))} |")
    between = [
        spearman(*(scores_of(half, how) for half in halves(exact))) for how in ("median", "mean")
    ]
    print(
        "\nexact on the first half of the examples against exact on the second: Spearman "
        f"{between[0]:.3f} (median of subsets), {between[1]:.3f} (mean)"
    )


if __name__ == "__main__":
    main()
