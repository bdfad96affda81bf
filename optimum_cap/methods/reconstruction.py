"""Solvers that choose the weights to prune and update the rest to preserve a layer's outputs."""

from collections.abc import Callable

import torch
from transformers.utils import logging

from optimum_cap.methods.masks import mask_per_matrix, n_of_m_mask, split_proportionally
from optimum_cap.methods.statistics import InputStatistics

logger = logging.get_logger(__name__)

Reconstruction = Callable[
    [torch.Tensor, InputStatistics, int, tuple[int, int] | None, str], torch.Tensor
]
"""`(weight [out, in], input statistics, zeros, pattern, name)` -> new weight `[out, in]`."""

BLOCK = 128  # columns
_DAMPING = 0.01  # fraction of the mean of the diagonal
_ALPS_DAMPING = 0.05
_MOST_DAMPING = 1.0
ALPS_INVERSES = 3
_STEPS_PER_INVERSE = 4
ALPS_STEPS = ALPS_INVERSES * _STEPS_PER_INVERSE
_SAMPLE = 1 << 12  # weights from which the threshold of a step is estimated
_PENALTY, _PENALTY_GROWTH = 0.1, 2.5  # relative to a Hessian with a diagonal of 1
FITTING_STEPS = 8
_CORRECTION = 0.75  # fraction of the correction toward the dense model that is applied


def sparsegpt(
    weight: torch.Tensor,
    inputs: InputStatistics,
    zeros: int,
    pattern: tuple[int, int] | None = None,
    name: str = "matrix",
) -> torch.Tensor:
    """Prune a matrix with SparseGPT: column by column, updating the columns that follow.

    Source: SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, Algorithm 1;
    https://github.com/IST-DASLab/sparsegpt, `sparsegpt.py`). The mask of a block of 128 columns is
    chosen after the updates of all columns before it; the Hessian is damped by 1 % of the mean of
    its diagonal. Unlike in the reference code, channels whose input is always zero do not count in
    that mean; they are pruned first, but not beyond `zeros`.

    Args:
        weight: `[out, in]`; it is not changed.
        inputs: Statistics of its inputs, with `gram`. Without any tokens, all channels count
            equally.
        zeros: Number of weights to prune, spread evenly over the blocks of columns.
        pattern: `(N, M)`, which keeps N of every M weights; `zeros` is then ignored.
        name: Name of the matrix, for log and error messages.

    Returns:
        The new weights, float32 `[out, in]`, with exact zeros.

    Raises:
        ValueError: `inputs` has no `gram`, or the Hessian cannot be inverted.
    """
    new = weight.detach().float().clone()
    rows, columns = new.shape
    factor = factor_inverse_hessian(inputs, columns, name)
    # The weights of a channel that is always zero have no effect, so they are pruned first.
    scale = factor.diagonal().masked_fill((inputs.squares == 0) & (inputs.tokens > 0), torch.inf)
    width = BLOCK if pattern is None else BLOCK // pattern[1] * pattern[1] or pattern[1]
    starts = range(0, columns, width)
    sizes = [rows * (min(start + width, columns) - start) for start in starts]
    for start, block_zeros in zip(starts, split_proportionally(zeros, sizes), strict=True):
        stop = min(start + width, columns)
        block = new[:, start:stop]
        inner = factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        if pattern is None:
            keep = mask_per_matrix((block / scale[start:stop]).square(), block_zeros)
        else:
            keep = torch.ones_like(block, dtype=torch.bool)
        for column in range(stop - start):
            if pattern is not None and column % pattern[1] == 0:
                group = slice(column, column + pattern[1])
                importance = (block[:, group] / scale[start:stop][group]).square()
                keep[:, group] = n_of_m_mask(importance, *pattern)
            pruned = block[:, column].masked_fill(keep[:, column], 0)
            errors[:, column] = pruned / inner[column, column]
            block[:, column:] -= errors[:, column : column + 1] * inner[column, column:]
            block[:, column].masked_fill_(~keep[:, column], 0)
        new[:, stop:] -= errors @ factor[start:stop, stop:]
    return new


def alps(
    weight: torch.Tensor,
    inputs: InputStatistics,
    zeros: int,
    pattern: tuple[int, int] | None = None,
    name: str = "matrix",
) -> torch.Tensor:
    """Prune a matrix with ALPS: ADMM chooses the mask, least squares fits the kept weights.

    Source: ALPS (Meng et al. 2024, arXiv 2406.07831, Algorithms 1 and 2). ADMM alternates between
    preserving the outputs (a linear system for all weights) and sparsity (a projection); a growing
    penalty makes the two agree. Conjugate gradients then bring the kept weights to the least
    squares solution.

    Differences from the paper: the Hessian is damped by 5 % of the mean of its diagonal instead of
    1 %, because calibration sets have few tokens per input; the inputs are scaled to the same norm,
    so that the projection ranks weights as Wanda does; all weights of the matrix are ranked
    together; and the penalty grows by a fixed factor after every fourth of 12 steps. On matrices of
    SmolLM2-135M, 80 steps with 20 inverses lower the output error by 6 to 12 %, but take four times
    as long, mostly for the inverses of wide matrices. Computing one inverse per penalty is much
    faster on a GPU than an eigendecomposition.

    Args, returns and raises: as for `sparsegpt`.
    """
    hessian, _ = _damped(
        inputs, weight.shape[1], name, torch.linalg.cholesky_ex, damping=_ALPS_DAMPING
    )
    scale = hessian.diagonal().sqrt()
    hessian.div_(scale).div_(scale.unsqueeze(1))
    dense = weight.detach().float() * scale
    # The weights of a channel that is always zero have no effect, so they are pruned first.
    needed = ((inputs.squares > 0) | (inputs.tokens == 0)).to(dense.dtype)

    def importance(candidate: torch.Tensor) -> torch.Tensor:
        return candidate.square().mul_(needed)

    def exact_mask(candidate: torch.Tensor) -> torch.Tensor:
        if pattern is not None:
            return n_of_m_mask(importance(candidate), *pattern)
        return mask_per_matrix(importance(candidate), zeros)

    if inputs.tokens == 0:
        return dense.masked_fill(~exact_mask(dense), 0)

    if dense.numel() <= _SAMPLE:
        drawn = torch.arange(dense.numel())
    else:
        # Drawn at random, because evenly spaced weights would belong to only a few channels.
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(dense.numel(), (_SAMPLE,), generator=generator)
    drawn = drawn.to(dense.device)

    def approximate_mask(candidate: torch.Tensor) -> torch.Tensor:
        """Prune about `zeros` weights, with a threshold estimated from a sample of the matrix."""
        if pattern is not None:
            return exact_mask(candidate)
        squares = importance(candidate)
        sample = squares.flatten()[drawn]
        rank = round(zeros / squares.numel() * len(sample))
        return squares > sample.kthvalue(rank).values if rank else squares >= 0

    target = dense @ hessian
    # The steps work in place where possible, and `dense` is recomputed later, because these
    # matrices and the Hessian determine peak memory. Row-major, even if `weight` is not.
    sparse = (dense * approximate_mask(dense)).contiguous()
    last, dual, penalty = torch.empty_like(target), torch.zeros_like(target), _PENALTY
    del dense
    for _ in range(ALPS_INVERSES):
        inverse = _inverse(hessian, penalty)
        for _ in range(_STEPS_PER_INVERSE):
            sparse.sub_(dual).mul_(penalty).add_(target)
            torch.mm(sparse, inverse, out=last).add_(dual)
            torch.mul(last, approximate_mask(last), out=sparse)
            torch.sub(last, sparse, out=dual)
        del inverse  # before allocating the next one
        dual /= _PENALTY_GROWTH
        penalty *= _PENALTY_GROWTH
    del target, sparse, dual
    keep = exact_mask(last)
    dense = weight.detach().float() * scale
    return _least_squares_(last.masked_fill_(~keep, 0), dense, hessian, keep).div_(scale)


def _inverse(hessian: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return the inverse of the Hessian with `penalty` added to its diagonal."""
    # Column-major, as LAPACK expects, so that neither step makes a copy on the CPU.
    work = torch.empty_like(hessian).mT.copy_(hessian)
    work.diagonal().add_(penalty)
    torch.linalg.cholesky(work, out=work)
    return torch.cholesky_inverse(work, out=work)


def _least_squares_(
    weight: torch.Tensor, dense: torch.Tensor, hessian: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """Minimise tr((W - dense) H (W - dense)^T) over the kept weights, in place.

    Runs `FITTING_STEPS` steps of conjugate gradients on all rows at once. The Hessian is scaled to
    a diagonal of 1, which acts as a preconditioner.
    """
    residual = ((dense - weight) @ hessian).mul_(keep)
    direction = residual.clone()
    square = residual.square().sum(dim=1, keepdim=True)
    for _ in range(FITTING_STEPS):
        along = (direction @ hessian).mul_(keep)
        curvature = (direction * along).sum(dim=1, keepdim=True)
        # Rows that have no kept weights or are already solved do not change.
        step = (square / curvature).where(curvature > 0, 0)
        weight += step * direction
        residual -= step * along
        before, square = square, residual.square().sum(dim=1, keepdim=True)
        direction.mul_((square / before).where(before > 0, 0)).add_(residual)
    return weight


def correct_toward_dense(
    weight: torch.Tensor, inputs: InputStatistics, name: str = "matrix"
) -> torch.Tensor:
    """Return a dense matrix whose outputs in the pruned model are closer to the dense model's.

    Error compensation as in GPTAQ (Li et al. 2025, arXiv 2504.02692): a damped regression of the
    dense model's outputs on the inputs of the matrix in the pruned model. Only 75 % of the
    correction is applied, because the inputs are noisy and a full correction would fit the noise.

    Args:
        weight: `[out, in]`; it is not changed.
        inputs: Statistics of its inputs, with `gram` and `output_error_moment`.
        name: Name of the matrix, for log and error messages.

    Returns:
        The corrected matrix, float32 `[out, in]`; `weight` itself if there are no tokens or no
        `output_error_moment`.

    Raises:
        ValueError: `output_error_moment` is not finite.
    """
    if inputs.tokens == 0 or inputs.output_error_moment is None:
        return weight
    if not inputs.output_error_moment.isfinite().all():
        raise ValueError(
            f"{name}: the difference between the outputs of the dense and the pruned model is not "
            "finite, so the matrix cannot be corrected: check the model, or choose target 'local'"
        )
    _, lower = _damped(inputs, weight.shape[1], name, torch.linalg.cholesky_ex)
    change = torch.cholesky_solve(inputs.output_error_moment.T / inputs.tokens, lower).T
    return weight.float() + _CORRECTION * change


def factor_hessian(
    inputs: InputStatistics, columns: int, name: str, damping: float
) -> torch.Tensor:
    """Return the lower Cholesky factor of the damped Hessian of the inputs, float32 `[in, in]`.

    Args:
        inputs: Statistics of the inputs of a matrix, with `gram`; without any tokens, the Hessian
            is the identity.
        columns: Number of inputs.
        name: Name of the matrix, for messages.
        damping: Fraction of the mean of the diagonal to add to the diagonal.

    Raises:
        ValueError: `inputs` has no `gram`, or the Hessian cannot be inverted.
    """
    return _damped(inputs, columns, name, torch.linalg.cholesky_ex, damping)[1]


def factor_inverse_hessian(inputs: InputStatistics, columns: int, name: str) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the Hessian, damped by 1 %.

    Args, raises: as for `factor_hessian`.
    """
    return _damped(inputs, columns, name, _factor_of_inverse)[1]


def _damped(
    inputs: InputStatistics,
    columns: int,
    name: str,
    factorize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    damping: float = _DAMPING,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Damp the Hessian until it can be factorized; return it and its factor, float32 `[in, in]`.

    Raises:
        ValueError: `inputs` has no `gram`, or damping by the mean of the diagonal is not enough.
    """
    if inputs.gram is None:
        raise ValueError(
            f"{name}: the input statistics have no gram (x_i x_j): collect them with gram=True"
        )
    if inputs.tokens == 0:
        identity = torch.eye(columns, device=inputs.gram.device)
        return identity, identity
    hessian = inputs.gram / inputs.tokens
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    diagonal[dead] = mean
    added = 0.0
    while True:
        diagonal += (damping - added) * mean
        added = damping
        factor, failed = factorize(hessian)
        if not failed:
            return hessian, factor
        damping *= 10
        if damping > _MOST_DAMPING:
            raise ValueError(
                f"{name}: the Hessian of its inputs cannot be inverted, even with a damping of "
                f"{added:g}, because the inputs are not finite or extremely large: check the model"
            )
        logger.warning(f"{name}: a damping of {added:g} is not enough, trying {damping:g}")


def _factor_of_inverse(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the upper Cholesky factor of the inverse, and a nonzero value if that failed."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return lower, failed
    factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return factor, failed
