"""Disk space of a pruned model's weights in each checkpoint format."""

import functools
from collections.abc import Callable

import torch

from optimum_cap.estimation.work import ModelWork
from optimum_cap.formats import encode_coded

_SAMPLE = 1 << 18  # weights, four chunks of the coded format
_SCALE = 0.02  # their standard deviation


@functools.cache
def coded_share(sparsity: float, dtype: torch.dtype) -> float:
    """Return the size of a coded pruned matrix relative to its dense size.

    It is measured on a sample of normally distributed weights, pruned by magnitude. Trained weights
    pruned by CAP differ little from it (`docs/estimate.md`).

    Args:
        sparsity: Sparsity of the matrix; 0 if it is not pruned.
        dtype: Dtype of the weights.
    """
    weights = _SCALE * torch.randn(_SAMPLE, generator=torch.Generator().manual_seed(0))
    weights[weights.abs().argsort()[: round(sparsity * _SAMPLE)]] = 0
    matrix = weights.to(dtype).view(512, -1)
    parts = encode_coded("sample.weight", matrix)
    return sum(part.nbytes for part in parts.values()) / matrix.nbytes


def _packed(work: ModelWork, sparsity: float, dtype: torch.dtype) -> float:
    """Return the bytes of the kept values plus one bit per prunable weight."""
    share = 1 - sparsity + 1 / (8 * dtype.itemsize)
    return _with_share(work, min(1.0, share), 1.0, dtype)


def _coded(work: ModelWork, sparsity: float, dtype: torch.dtype) -> float:
    """Return the bytes when dense matrices, such as embeddings, are coded as well."""
    return _with_share(work, coded_share(sparsity, dtype), coded_share(0.0, dtype), dtype)


def _dense(work: ModelWork, sparsity: float, dtype: torch.dtype) -> float:
    return _with_share(work, 1.0, 1.0, dtype)


def _with_share(work: ModelWork, pruned: float, others: float, dtype: torch.dtype) -> float:
    weights = pruned * work.prunable + others * (work.parameters - work.prunable)
    return dtype.itemsize * weights


SIZES: dict[str, Callable[[ModelWork, float, torch.dtype], float]] = {
    "packed": _packed,
    "coded": _coded,
    "dense": _dense,
}
"""Bytes of the weights in each of `FORMATS`, by sparsity and dtype of the checkpoint."""
