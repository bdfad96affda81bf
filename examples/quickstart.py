"""Prune the embedded reasoning model with Wanda and with CAP, and compare their answers. Offline.

python examples/quickstart.py [--sparsity 0.7] [--output runs/quickstart]
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from optimum_cap import CAPConfig
from optimum_cap.checkpoint import inspect_checkpoint
from optimum_cap.text import aligned

REASONER = Path(__file__).parent / "tiny_reasoner"
MODEL = str(REASONER / "model")
sys.path.insert(0, str(REASONER))
from evaluate import correct_answers, generated_answers, load_problems  # noqa: E402
from tasks import KINDS, Problem  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.7, help="fraction (default: 0.7)")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--limit", type=int, default=50, help="test problems of each kind")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    problems = load_problems("test", arguments.limit)

    def answers(model: PreTrainedModel) -> list[str]:
        return generated_answers(model, tokenizer, problems)

    dense = answers(AutoModelForCausalLM.from_pretrained(MODEL))
    wanda = answers(pruned("wanda", arguments.sparsity))

    # The lines this project is about: prune, save, and load like any other model.
    model = pruned("causal", arguments.sparsity)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    cap = answers(AutoModelForCausalLM.from_pretrained(arguments.output))

    logging.disable_progress_bar()
    print_summary(arguments.output)
    results = {"dense": dense, "Wanda": wanda, "CAP": cap}
    print_accuracy(problems, results)
    print_example(problems, results)


def pruned(recipe: str, sparsity: float) -> PreTrainedModel:
    """Prune the embedded model; "causal" is the default recipe."""
    calibration = str(REASONER / "data" / "calibration.jsonl")
    config = CAPConfig(sparsity=sparsity, dataset=calibration, recipe=recipe)
    return AutoModelForCausalLM.from_pretrained(MODEL, pruning_config=config)


def print_summary(output: Path) -> None:
    summary = inspect_checkpoint(output)
    record = summary.record
    print(
        f"\nPruned {record.zeros:,} of {record.total:,} weights ({record.sparsity:.2%}) with "
        f"{len(record.calibration['digests'])} calibration examples."
    )
    print(
        f"Saved {output}: {summary.weight_bytes:,} bytes of weights, "
        f"{summary.weight_bytes / summary.dense_bytes:.0%} of the dense model's."
    )
    sites = sorted(
        (site for site in record.sensitivities if site.divergence is not None),
        key=lambda site: site.divergence,
    )
    for label, site in (("The most sensitive", sites[-1]), ("The least sensitive", sites[0])):
        print(
            f"{label} site is the {site.kind} of layer {site.layer} ({site.divergence:.1e} nats "
            f"per token when it alone is pruned): CAP pruned it to {site.sparsity:.1%}."
        )


def print_accuracy(problems: list[Problem], results: dict[str, list[str]]) -> None:
    rows = [["correct answers", *results]]
    correct = {name: correct_answers(problems, texts) for name, texts in results.items()}
    for kind in KINDS:
        places = [place for place, problem in enumerate(problems) if problem.kind == kind]
        counts = [sum(each[place] for place in places) for each in correct.values()]
        rows.append([kind, *(f"{count} of {len(places)}" for count in counts)])
    print(f"\n{aligned(rows, left=1)}")


def print_example(problems: list[Problem], results: dict[str, list[str]]) -> None:
    """Print the first problem that Wanda answers wrong, or the first one, with all answers."""
    wrong = [not each for each in correct_answers(problems, results["Wanda"])]
    place = wrong.index(True) if any(wrong) else 0
    print(f"\nQuestion: {problems[place].question}")
    print(f"Answer in the data: {problems[place].final_answer}")
    for name, texts in results.items():
        lines = texts[place].strip().splitlines() or [""]
        print(f"{name:>6} | " + "\n       | ".join(lines))


if __name__ == "__main__":
    main()
