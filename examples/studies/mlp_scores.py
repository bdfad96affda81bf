"""Does the mean score of a layer's heads say what its MLP is worth? The paper assumes it does.

    python examples/studies/mlp_scores.py examples/tiny_reasoner/model

Masks each whole MLP like a head, and prints its causal score beside the mean of the layer's heads.
"""

import argparse
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_cap import CAPConfig
from optimum_cap.data import build_calibration_set
from optimum_cap.models import ModelView
from optimum_cap.scoring import causal_scores, exact_losses

DATA = Path(__file__).parents[1] / "tiny_reasoner" / "data" / "calibration.jsonl"


def scores_by_layer(model_name: str, data: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean score of the heads and the score of the MLP, each `[layers]`, in nats."""
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    config = CAPConfig(sparsity=0.5, dataset=data, seed=seed)
    calibration = build_calibration_set(config, AutoTokenizer.from_pretrained(model_name))
    scores = causal_scores(exact_losses(ModelView.of(model), calibration.examples))
    found: dict[str, dict[int, list[float]]] = {"attention": {}, "mlp": {}}
    for (site, _), score in zip(scores.units, scores.scores.tolist(), strict=True):
        found[site.kind].setdefault(site.layer, []).append(score)
    heads, mlps = (
        torch.tensor([fmean(of_layer[layer]) for layer in sorted(of_layer)])
        for of_layer in found.values()
    )
    return heads, mlps


def spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the rank correlation of two vectors without ties."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return float(ranks.corrcoef()[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model with dense MLPs")
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    found = [scores_by_layer(arguments.model, arguments.data, s) for s in range(arguments.seeds)]
    heads, mlps = (torch.stack(values) for values in zip(*found, strict=True))
    print("| layer | mean score of its heads (range over seeds) | score of its MLP |")
    print("|---|---|---|")
    for layer in range(heads.shape[1]):
        cells = (
            f"{values[:, layer].mean():.4f} ({values[:, layer].min():.4f} to "
            f"{values[:, layer].max():.4f})"
            for values in (heads, mlps)
        )
        print(f"| {layer} | {' | '.join(cells)} |")
    ranks = ", ".join(f"{spearman(*pair):.2f}" for pair in found)
    print(f"\nSpearman over the layers, by seed: {ranks}")


if __name__ == "__main__":
    main()
