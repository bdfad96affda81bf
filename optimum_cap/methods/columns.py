"""Removal of whole columns of a matrix, with a least squares fit of the remaining ones."""

import torch

from optimum_cap.methods.reconstruction import factor_hessian
from optimum_cap.methods.statistics import InputStatistics

_DAMPING = 0.01  # fraction of the mean of the diagonal of the Hessian
COLUMN_ROUNDS = 128  # at most; each recomputes the errors of all groups


def remove_columns(
    weight: torch.Tensor,
    inputs: InputStatistics,
    groups: torch.Tensor,
    count: int,
    name: str = "matrix",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove groups of columns one by one, each time the group with the smallest error.

    The error of a group is the squared error of the outputs that remains after fitting all other
    columns to compensate for its removal. Removing a group and fitting the others is one step of
    Gaussian elimination on the inverse of the Hessian, so the result is the least squares solution
    for the kept columns.

    Sources: Optimal Brain Surgeon (Hassibi and Stork 1992) on groups of columns, as in ZipLM
    (Kurtic et al. 2023, arXiv 2302.04089, Eq. 3 and 4) and SlimGPT (Ling et al. 2024, arXiv
    2412.18110). Unlike ZipLM, several groups are removed between two rankings if there are many.

    Args:
        weight: `[out, in]`; it is not changed.
        inputs: Statistics of its inputs, with `gram`. Without any tokens, all inputs count equally.
        groups: The columns of each group, int64 `[groups, size]`.
        count: Number of groups to remove.
        name: Name of the matrix, for messages.

    Returns:
        The mask of kept columns, bool `[in]`; and the new weights, float32 `[out, in]`, zero in the
        removed columns.

    Raises:
        ValueError: `inputs` has no `gram`, or the Hessian cannot be inverted.
    """
    new = weight.detach().float().clone()
    inverse = torch.cholesky_inverse(factor_hessian(inputs, new.shape[1], name, _DAMPING))
    groups = groups.to(new.device)
    left = torch.ones(len(groups), dtype=torch.bool, device=new.device)
    at_once = -(-count // COLUMN_ROUNDS)
    removed = 0
    while removed < count:
        errors = _errors(new, inverse, groups).masked_fill(~left, torch.inf)
        chosen = errors.argsort(stable=True)[: min(at_once, count - removed)]
        columns = groups[chosen].flatten()
        coupling = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        new -= new[:, columns] @ coupling
        inverse -= inverse[:, columns] @ coupling
        # Exactly zero, and no longer coupled to the other columns.
        new[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse.diagonal()[columns] = 1
        left[chosen] = False
        removed += len(chosen)
    kept = torch.ones(new.shape[1], dtype=torch.bool, device=new.device)
    kept[groups[~left].flatten()] = False
    return kept, new


def _errors(weight: torch.Tensor, inverse: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return the squared error that remains after removing each group alone, `[groups]`."""
    if groups.shape[1] == 1:
        columns = groups[:, 0]
        return weight.square().sum(dim=0)[columns] / inverse.diagonal()[columns]
    errors = []
    for columns in groups:
        of_group = weight[:, columns]
        solved = torch.linalg.solve(inverse[columns][:, columns], of_group.T)
        errors.append((of_group.T * solved).sum())
    return torch.stack(errors)
