"""Statistics of the inputs of a matrix."""

from dataclasses import dataclass

import torch


@dataclass
class InputStatistics:
    """Second moments of the input of a matrix, summed over the calibration tokens that reach it.

    Padding is excluded. In a mixture of experts, only tokens routed to an expert count for its
    matrices. Tokens may be weighted.

    Attributes:
        tokens: Number of tokens, regardless of their weights.
        squares: Sum of x_i^2, float32 `[in]`.
        gram: Sum of x_i x_j, float32 `[in, in]`; `None` if not collected.
        output_error_moment: Sum of e_i x_j, float32 `[out, in]`, where e is the output of the dense
            model minus that of this matrix; `None` if the two models are not compared.
    """

    tokens: int
    squares: torch.Tensor
    gram: torch.Tensor | None = None
    output_error_moment: torch.Tensor | None = None

    @classmethod
    def empty(cls, width: int, device: torch.device, gram: bool) -> "InputStatistics":
        """Return statistics of zero tokens."""
        return cls(
            0,
            torch.zeros(width, device=device),
            torch.zeros(width, width, device=device) if gram else None,
        )

    @property
    def sums(self) -> list[torch.Tensor]:
        """The sums that make up the statistics; call `update_` after changing them."""
        sums = [self.squares if self.gram is None else self.gram, self.output_error_moment]
        return [each for each in sums if each is not None]

    def update_(self) -> None:
        """Recompute the squares from the sum of products, if there is one."""
        if self.gram is not None:
            self.squares = self.gram.diagonal().clone()

    def merge_(self, other: "InputStatistics") -> None:
        """Add statistics of the same kind, collected on other tokens."""
        self.tokens += other.tokens
        for own, others in zip(self.sums, other.sums, strict=True):
            own += others
        self.update_()

    def add_(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add inputs, `[tokens, in]`, with token weights, `[tokens]`; `None` gives all weight 1."""
        inputs = inputs.float()
        weighted = inputs if weights is None else inputs * weights.unsqueeze(1)
        self.tokens += len(inputs)
        if self.gram is None:
            self.squares += (weighted * inputs).sum(dim=0)
        else:
            self.gram.addmm_(weighted.T, inputs)
            self.update_()
