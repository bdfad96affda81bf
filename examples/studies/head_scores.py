"""How concentrated the causal scores of a study are, and how well they agree between seeds.

    python examples/studies/head_scores.py examples/studies/reproduction.yaml

Reads what `optimum-cli cap study` left, and prints per model and recipe how many heads score more
than a tenth of the highest, and the rank correlation (Spearman) of the heads between seeds.
"""

import argparse
from itertools import combinations
from pathlib import Path

import torch
from mlp_scores import spearman

from optimum_cap.study import Study, read_cells


def scores_by_seed(study: Study, folder: Path) -> dict[tuple[str, str], dict[int, torch.Tensor]]:
    """Return the scores of the heads by model and recipe, then by seed; any sparsity has them."""
    found: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for cell, values in read_cells(study, folder):
        if values["scores"] and cell.seed is not None:
            scores = torch.tensor([unit["score"] for unit in values["scores"]])
            found.setdefault((cell.label, cell.recipe), {})[cell.seed] = scores
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("--folder", type=Path, help="of its results (default: runs/ and its name)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path("runs") / arguments.study.stem
    print("| model | recipe | heads | above a tenth of the highest | Spearman, pairs of seeds |")
    print("|---|---|---|---|---|")
    found = scores_by_seed(Study.load(arguments.study), folder)
    for (model, recipe), by_seed in found.items():
        high = [int((scores > scores.max() / 10).sum()) for scores in by_seed.values()]
        ranks = torch.tensor([spearman(*pair) for pair in combinations(by_seed.values(), 2)])
        agreement = f"{ranks.mean():.2f} ({ranks.min():.2f} to {ranks.max():.2f})"
        heads = len(next(iter(by_seed.values())))
        print(f"| {model} | {recipe} | {heads} | {min(high)} to {max(high)} | {agreement} |")


if __name__ == "__main__":
    main()
