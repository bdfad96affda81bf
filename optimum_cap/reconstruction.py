"""Criteria that also change the weights they keep, so that the layer's output stays what it was."""

from collections.abc import Callable

import torch
from transformers.utils import logging

from optimum_cap.activations import InputStatistics
from optimum_cap.masking import lowest_in_matrix, most_of_each, shares

logger = logging.get_logger(__name__)

BLOCK = 128  # columns
_DAMPING = 0.01  # of the mean of the diagonal
_MOST_DAMPING = 1.0


def sparsegpt(
    weight: torch.Tensor,
    inputs: InputStatistics,
    zeros: int,
    pattern: tuple[int, int] | None = None,
    name: str = "matrix",
) -> torch.Tensor:
    """Prune a matrix by optimal brain surgeon, column by column, and update what is kept.

    The source is SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, Algorithm 1;
    https://github.com/IST-DASLab/sparsegpt, `sparsegpt.py`): the mask of a block of 128 columns is
    chosen when the updates of the columns before have reached it; the Hessian is damped by 1 % of
    the mean of its diagonal. Unlike there, a channel without any input is pruned first, but only
    as far as `zeros` asks.

    Args:
        weight: `[out, in]`; it is not changed.
        inputs: Statistics of its inputs, with `gram`. Without any tokens all channels count alike.
        zeros: Number of weights to prune, spread evenly over the blocks of columns.
        pattern: `(N, M)`, N weights kept of every M; `zeros` is then not read.
        name: Of the matrix, for the log.

    Returns:
        The new weights, float32 `[out, in]`, with exact zeros.
    """
    new = weight.detach().float().clone()
    rows, columns = new.shape
    factor = _inverse_factor(inputs, columns, name)
    # Of a channel that is always zero, every weight can go.
    scale = factor.diagonal().masked_fill((inputs.squares == 0) & (inputs.tokens > 0), torch.inf)
    width = BLOCK if pattern is None else BLOCK // pattern[1] * pattern[1] or pattern[1]
    starts = range(0, columns, width)
    sizes = [rows * (min(start + width, columns) - start) for start in starts]
    for start, block_zeros in zip(starts, shares(zeros, sizes), strict=True):
        stop = min(start + width, columns)
        block = new[:, start:stop]
        inner = factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        if pattern is None:
            keep = lowest_in_matrix((block / scale[start:stop]).square(), block_zeros)
        else:
            keep = torch.ones_like(block, dtype=torch.bool)
        for column in range(stop - start):
            if pattern is not None and column % pattern[1] == 0:
                group = slice(column, column + pattern[1])
                importance = (block[:, group] / scale[start:stop][group]).square()
                keep[:, group] = most_of_each(importance, *pattern)
            pruned = block[:, column].masked_fill(keep[:, column], 0)
            errors[:, column] = pruned / inner[column, column]
            block[:, column:] -= errors[:, column : column + 1] * inner[column, column:]
            block[:, column].masked_fill_(~keep[:, column], 0)
        new[:, stop:] -= errors @ factor[start:stop, stop:]
    return new


def _inverse_factor(inputs: InputStatistics, columns: int, name: str) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, float32 `[in, in]`."""
    if inputs.gram is None:
        raise ValueError(f"{name}: SparseGPT needs the statistics x_i x_j of the inputs")
    if inputs.tokens == 0:
        return torch.eye(columns, device=inputs.gram.device)
    hessian = inputs.gram / inputs.tokens
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    mean, added, damping = float(diagonal.mean()), 0.0, _DAMPING
    while True:
        diagonal += (damping - added) * mean
        added = damping
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return factor
        damping *= 10
        if damping > _MOST_DAMPING:
            raise ValueError(
                f"{name}: the Hessian of its inputs cannot be inverted even with a damping of "
                f"{added:g}: the inputs are not finite, or far out of scale; check the model"
            )
        logger.warning(f"{name}: a damping of {added:g} does not suffice; trying {damping:g}")


Reconstruction = Callable[
    [torch.Tensor, InputStatistics, int, tuple[int, int] | None, str], torch.Tensor
]

RECONSTRUCTIONS: dict[str, Reconstruction] = {"sparsegpt": sparsegpt}
