"""Sparse tensors, and their comparison bit for bit."""

import torch


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))


def sparse(shape: tuple[int, ...], sparsity: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight.masked_fill(torch.rand(shape, generator=generator) < sparsity, 0)
