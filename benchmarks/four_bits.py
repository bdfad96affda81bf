"""Rounds a model to 4 bits in a way to compare with `cap prune --then-quantize int4`.

The weights are saved as floats on the grid of integers from -7 to 7 times a scale for each 64
inputs, so that `cap eval` measures them without another package. `nearest` rounds each kept weight
to the nearest integer, `compensated` is what `int4` does (also for a dense model), and `joint`
prunes half of a dense model in the same pass that rounds it (SparseGPT, section 3.4).

    python benchmarks/four_bits.py nearest PRUNED DIR
    python benchmarks/four_bits.py joint DENSE DIR --dataset gsm8k arc_challenge --num-samples 64
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.methods import BLOCK, InputStatistics, split_proportionally
from optimum_cap.methods.masks import mask_per_matrix
from optimum_cap.methods.reconstruction import factor_inverse_hessian
from optimum_cap.models import Matrix, ModelView
from optimum_cap.pruning import MatrixPruner
from optimum_cap.quantization.rounding import round_model_

GROUP, LEVELS = 64, 7


def rounded(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scale = torch.where(scale > 0, scale, 1)
    return (weight / scale).round().clamp(-LEVELS, LEVELS) * scale


@torch.no_grad()
def round_to_nearest_(view: ModelView) -> None:
    for matrix in view.matrices:
        weight = view.writable_weights(matrix)
        groups = weight.unflatten(1, (-1, GROUP))
        weight.copy_(rounded(groups, groups.abs().amax(2, keepdim=True) / LEVELS).flatten(1))


def prune_and_round(
    pruner: MatrixPruner, matrix: Matrix, statistics: InputStatistics, zeros: int
) -> torch.Tensor:
    """Prune a matrix as SparseGPT does, but round each column before its error moves on."""
    new = pruner._view.weights(matrix).detach().float().clone()
    rows, columns = new.shape
    factor = factor_inverse_hessian(statistics, columns, matrix.name)
    starts = range(0, columns, BLOCK)
    sizes = [rows * min(BLOCK, columns - start) for start in starts]
    for start, of_block in zip(starts, split_proportionally(zeros, sizes), strict=True):
        stop = min(start + BLOCK, columns)
        block, inner = new[:, start:stop], factor[start:stop, start:stop]
        keep = mask_per_matrix((block / inner.diagonal()).square(), of_block)
        errors = torch.empty_like(block)
        for column in range(stop - start):
            if column % GROUP == 0:
                group = slice(column, column + GROUP)
                scale = (block[:, group] * keep[:, group]).abs().amax(dim=1) / LEVELS
            result = rounded(block[:, column], scale) * keep[:, column]
            errors[:, column] = (block[:, column] - result) / inner[column, column]
            block[:, column:] -= errors[:, column : column + 1] * inner[column, column:]
            block[:, column] = result
        new[:, stop:] -= errors @ factor[start:stop, stop:]
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("how", choices=("nearest", "compensated", "joint"))
    parser.add_argument("model", help="folder or Hub id of the pruned or the dense model")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--dataset", nargs="+", default=["gsm8k", "arc_challenge"])
    parser.add_argument("--num-samples", type=int, default=64)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    config = CAPConfig(
        sparsity=0.5,
        recipe="sparsegpt",
        dataset=arguments.dataset,
        num_samples=arguments.num_samples,
    )
    if arguments.how == "nearest":
        round_to_nearest_(ModelView.of(model))
    elif arguments.how == "compensated":
        round_model_(model, tokenizer, config)
    else:
        MatrixPruner.pruned = prune_and_round
        CAPPruner(config).prune(model, tokenizer)
    for name in ("pruning_config", "quantization_config"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    type(model).save_pretrained(model, arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
