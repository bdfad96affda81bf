"""Whether two computations agree, and whether what a model computes is finite."""

import torch


def tolerance(dtype: torch.dtype) -> float:
    """Return a relative difference far above rounding: 2e-5 in float32, 4 % in bfloat16."""
    return float(torch.finfo(dtype).eps ** (2 / 3))


def share_that_differs(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the share of tokens whose values differ by more than `tolerance` allows.

    Each token is compared on its own: a few tokens have hidden states a thousand times larger than
    the others, which a norm over all tokens would hide.

    Args:
        values: `[..., width]`.
        expected: The same values, computed in another way.
    """
    expected = expected.to(values.device).float()
    difference = (values.float() - expected).norm(dim=-1)
    # Not the other way round, so that NaN differs.
    agrees = difference <= tolerance(values.dtype) * expected.norm(dim=-1)
    return 1 - float(agrees.double().mean())


def rows_not_finite(values: torch.Tensor, real: torch.Tensor) -> list[int]:
    """Return which rows have values that are not finite, besides padding.

    Args:
        values: `[..., rows, tokens, width]`.
        real: bool `[rows, tokens]`, False for padding.
    """
    if values.isfinite().all():
        return []
    finite = values.isfinite().all(dim=-1) | ~real.to(values.device)
    of_rows = finite.all(dim=-1).view(-1, len(real)).all(dim=0)
    return (~of_rows).nonzero()[:, 0].tolist()
