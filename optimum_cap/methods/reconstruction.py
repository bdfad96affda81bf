"""Criteria that also change the weights they keep, so that the layer's output stays what it was."""

from collections.abc import Callable

import torch
from transformers.utils import logging

from optimum_cap.methods.masks import mask_per_matrix, n_of_m_mask, split_proportionally
from optimum_cap.methods.statistics import InputStatistics

logger = logging.get_logger(__name__)

Reconstruction = Callable[
    [torch.Tensor, InputStatistics, int, tuple[int, int] | None, str], torch.Tensor
]
"""`(weight [out, in], statistics of its inputs, zeros, pattern, name)` -> new weight."""

BLOCK = 128  # columns
_DAMPING = 0.01  # of the mean of the diagonal
_MOST_DAMPING = 1.0
ALPS_INVERSES = 10
_STEPS_PER_INVERSE = 2
ALPS_STEPS = ALPS_INVERSES * _STEPS_PER_INVERSE
_SAMPLE = 1 << 12  # weights that give the threshold of a step
_PENALTY, _PENALTY_GROWTH = 0.03, 1.44  # relative to a Hessian with a diagonal of 1
FITTING_STEPS = 10
_CORRECTION = 0.75


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
    the mean of its diagonal. Unlike there, a channel without any input does not count in that mean,
    and is pruned first, but only as far as `zeros` asks.

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
    _, factor = _damped(inputs, columns, name, _factor_of_inverse)
    # Of a channel that is always zero, every weight can go.
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
    """Prune a matrix by alternating directions, and fit what is kept by least squares.

    The source is ALPS (Meng et al. 2024, arXiv 2406.07831, Algorithms 1 and 2): the outputs are to
    stay what they are (solved for all weights at once), and the weights are to be sparse (a
    projection); a penalty that grows makes the two agree. Then conjugate gradients bring the
    weights that are kept to the least squares solution. Here the inputs are scaled to the same
    norm, so that the projection ranks as Wanda does, all weights of the matrix compete, and the
    penalty grows by a fixed factor after every other step of 20: four times as many lower the error
    of the outputs by 4 to 5 % more. An inverse for each penalty takes the place of an
    eigendecomposition, which takes far longer on a GPU.

    Args and returns: as `sparsegpt`.
    """
    hessian = _damped(inputs, weight.shape[1], name, torch.linalg.cholesky_ex)[0]
    scale = hessian.diagonal().sqrt()
    hessian.div_(scale).div_(scale.unsqueeze(1))
    dense = weight.detach().float() * scale
    # Of a channel that is always zero, every weight can go.
    needed = ((inputs.squares > 0) | (inputs.tokens == 0)).to(dense.dtype)

    def importance(candidate: torch.Tensor) -> torch.Tensor:
        return candidate.square().mul_(needed)

    def kept(candidate: torch.Tensor) -> torch.Tensor:
        if pattern is not None:
            return n_of_m_mask(importance(candidate), *pattern)
        return mask_per_matrix(importance(candidate), zeros)

    if inputs.tokens == 0:
        return dense.masked_fill(~kept(dense), 0)

    if dense.numel() <= _SAMPLE:
        drawn = torch.arange(dense.numel())
    else:
        # At random: weights at equal distances would be of a few channels only.
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(dense.numel(), (_SAMPLE,), generator=generator)
    drawn = drawn.to(dense.device)

    def roughly_kept(candidate: torch.Tensor) -> torch.Tensor:
        """Keep about as many as asked for: a sample of the matrix gives the threshold."""
        if pattern is not None:
            return kept(candidate)
        squares = importance(candidate)
        sample = squares.flatten()[drawn]
        rank = round(zeros / squares.numel() * len(sample))
        return squares > sample.kthvalue(rank).values if rank else squares >= 0

    target = dense @ hessian
    # In place where it can be, and `dense` is made again later: the matrices and the Hessian are
    # the most that is in memory. Stored by rows, even if the weights are stored by columns.
    sparse = (dense * roughly_kept(dense)).contiguous()
    last, dual, penalty = torch.empty_like(target), torch.zeros_like(target), _PENALTY
    del dense
    for _ in range(ALPS_INVERSES):
        inverse = _inverse(hessian, penalty)
        for _ in range(_STEPS_PER_INVERSE):
            sparse.sub_(dual).mul_(penalty).add_(target)
            torch.mm(sparse, inverse, out=last).add_(dual)
            torch.mul(last, roughly_kept(last), out=sparse)
            torch.sub(last, sparse, out=dual)
        del inverse  # before there is another one
        dual /= _PENALTY_GROWTH
        penalty *= _PENALTY_GROWTH
    del target, sparse, dual
    keep = kept(last)
    dense = weight.detach().float() * scale
    return _least_squares_(last.masked_fill_(~keep, 0), dense, hessian, keep).div_(scale)


def _inverse(hessian: torch.Tensor, penalty: float) -> torch.Tensor:
    """Inverse of the Hessian with a penalty added to its diagonal."""
    # Stored by columns, as LAPACK wants it: on a CPU neither step makes a copy.
    work = torch.empty_like(hessian).mT.copy_(hessian)
    work.diagonal().add_(penalty)
    torch.linalg.cholesky(work, out=work)
    return torch.cholesky_inverse(work, out=work)


def _least_squares_(
    weight: torch.Tensor, dense: torch.Tensor, hessian: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """Minimise tr((W - dense) H (W - dense)^T) over the weights that are kept, in place.

    Conjugate gradients, all rows at once; the Hessian has a diagonal of 1, which preconditions it.
    """
    residual = ((dense - weight) @ hessian).mul_(keep)
    direction = residual.clone()
    square = residual.square().sum(dim=1, keepdim=True)
    for _ in range(FITTING_STEPS):
        along = (direction @ hessian).mul_(keep)
        curvature = (direction * along).sum(dim=1, keepdim=True)
        # Rows without weights, or already solved, stay.
        step = (square / curvature).where(curvature > 0, 0)
        weight += step * direction
        residual -= step * along
        before, square = square, residual.square().sum(dim=1, keepdim=True)
        direction.mul_((square / before).where(before > 0, 0)).add_(residual)
    return weight


def correct_toward_dense(
    weight: torch.Tensor, inputs: InputStatistics, name: str = "matrix"
) -> torch.Tensor:
    """Return the dense matrix that best brings back what its outputs miss.

    Regression of the dense model's outputs on the inputs that the pruned model gives the matrix, as
    in GPTAQ (Li et al. 2025, arXiv 2504.02692), damped like the Hessian. The inputs are noisy, so a
    full correction would follow the noise: three quarters of it are made.

    Args:
        weight: `[out, in]`; it is not changed.
        inputs: Statistics of its inputs, with `gram` and `output_error_moment`.
        name: Of the matrix, for the log and errors.

    Raises:
        ValueError: What the outputs miss is not finite.
    """
    if inputs.tokens == 0 or inputs.output_error_moment is None:
        return weight
    if not inputs.output_error_moment.isfinite().all():
        raise ValueError(
            f"{name}: the pruned model's outputs are not a finite way from the dense model's, so "
            "the matrix cannot be fitted to them: check the model, or choose target 'local'"
        )
    _, lower = _damped(inputs, weight.shape[1], name, torch.linalg.cholesky_ex)
    change = torch.cholesky_solve(inputs.output_error_moment.T / inputs.tokens, lower).T
    return weight.float() + _CORRECTION * change


def _damped(
    inputs: InputStatistics,
    columns: int,
    name: str,
    factorize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Damp the Hessian until it can be factorized; return it and its factor, float32 `[in, in]`."""
    if inputs.gram is None:
        raise ValueError(f"{name}: the statistics x_i x_j of its inputs are needed")
    if inputs.tokens == 0:
        identity = torch.eye(columns, device=inputs.gram.device)
        return identity, identity
    hessian = inputs.gram / inputs.tokens
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    diagonal[dead] = mean
    added, damping = 0.0, _DAMPING
    while True:
        diagonal += (damping - added) * mean
        added = damping
        factor, failed = factorize(hessian)
        if not failed:
            return hessian, factor
        damping *= 10
        if damping > _MOST_DAMPING:
            raise ValueError(
                f"{name}: the Hessian of its inputs cannot be inverted even with a damping of "
                f"{added:g}: the inputs are not finite, or far out of scale; check the model"
            )
        logger.warning(f"{name}: a damping of {added:g} does not suffice; trying {damping:g}")


def _factor_of_inverse(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper Cholesky factor of the inverse, and whether it failed."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return lower, failed
    factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return factor, failed
