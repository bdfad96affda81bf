"""Checks that two computations agree, and that the values a model computes are finite."""

import torch


def tolerance(dtype: torch.dtype) -> float:
    """Return a relative difference far above rounding errors: 2e-5 in float32, 4 % in bfloat16."""
    return float(torch.finfo(dtype).eps ** (2 / 3))


def share_that_differs(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the share of tokens whose values differ by more than the `tolerance`.

    Each token is compared separately, because a few tokens have hidden states a thousand times
    larger than the others, which would dominate a norm over all tokens.

    Args:
        values: `[..., width]`.
        expected: The same values, computed differently.
    """
    expected = expected.to(values.device).float()
    difference = (values.float() - expected).norm(dim=-1)
    # Negated, so that NaN counts as a difference.
    agrees = difference <= tolerance(values.dtype) * expected.norm(dim=-1)
    return 1 - float(agrees.double().mean())


def rows_not_finite(values: torch.Tensor, real: torch.Tensor) -> list[int]:
    """Return the rows with non-finite values outside the padding.

    Args:
        values: `[..., rows, tokens, width]`.
        real: bool `[rows, tokens]`, False for padding.
    """
    if values.isfinite().all():
        return []
    finite = values.isfinite().all(dim=-1) | ~real.to(values.device)
    of_rows = finite.all(dim=-1).view(-1, len(real)).all(dim=0)
    return (~of_rows).nonzero()[:, 0].tolist()
