"""Rounding of weights to an integer grid, with error compensation."""

from dataclasses import dataclass

import torch

from optimum_cap.methods.reconstruction import BLOCK, factor_inverse_hessian
from optimum_cap.methods.statistics import InputStatistics

LEVELS = 7  # 4-bit integers from -7 to 7, so that the grid is symmetric


@dataclass(frozen=True)
class RoundedMatrix:
    """A matrix of integers with a scale per output and group of inputs.

    Attributes:
        codes: Integers from -7 to 7, int8 `[out, in]`.
        scales: Their scales, `[out, in / group]`.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weights, `[out, in]`, in the dtype of the scales."""
        group = self.codes.shape[1] // self.scales.shape[1]
        scales = self.scales.repeat_interleave(group, dim=1)
        return self.codes.to(scales.dtype) * scales


def round_columns(
    weight: torch.Tensor,
    inputs: InputStatistics,
    group: int,
    dtype: torch.dtype = torch.float32,
    name: str = "matrix",
) -> RoundedMatrix:
    """Round a matrix to 4 bits column by column, updating later columns and keeping zeros.

    Source: GPTQ (Frantar et al. 2022, arXiv 2210.17323, Algorithm 1), with the mask kept as in
    SparseGPT (arXiv 2301.00774, section 3.4): updates of zero weights are passed on to later
    columns. The largest kept weight of a group, after the updates from all earlier groups, gets the
    largest integer.

    Args:
        weight: `[out, in]`; it is not changed.
        inputs: Statistics of its inputs, with `gram`.
        group: Number of consecutive inputs that share a scale, a divisor of 128.
        dtype: Dtype of the scales, which are rounded to it first.
        name: Name of the matrix, for log and error messages.

    Raises:
        ValueError: The number of inputs is not a multiple of `group`, `inputs` has no `gram`, or
            the Hessian cannot be inverted.
    """
    new = weight.detach().float().clone()
    rows, columns = new.shape
    if columns % group:
        raise ValueError(
            f"{name} has {columns} inputs, which do not divide into groups of {group}: choose "
            "another size of the groups"
        )
    keep = new != 0
    factor = factor_inverse_hessian(inputs, columns, name)
    codes = torch.zeros(rows, columns, dtype=torch.int8, device=new.device)
    scales = torch.ones(rows, columns // group, dtype=dtype, device=new.device)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, inner, kept = new[:, start:stop], factor[start:stop, start:stop], keep[:, start:stop]
        errors = torch.empty_like(block)
        for column in range(stop - start):
            index = (start + column) // group
            if (start + column) % group == 0:
                of_group = block[:, column : column + group] * kept[:, column : column + group]
                scale = (of_group.abs().amax(dim=1) / LEVELS).to(dtype)
                scales[:, index] = torch.where(scale > 0, scale, scales[:, index])
            scale = scales[:, index].float()
            code = (block[:, column] / scale).round().clamp(-LEVELS, LEVELS) * kept[:, column]
            codes[:, start + column] = code.to(torch.int8)
            errors[:, column] = (block[:, column] - code * scale) / inner[column, column]
            block[:, column:] -= errors[:, column : column + 1] * inner[column, column:]
        new[:, stop:] -= errors @ factor[start:stop, stop:]
    return RoundedMatrix(codes, scales)
