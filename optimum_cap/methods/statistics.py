"""What a criterion may know about the inputs of a matrix."""

from dataclasses import dataclass

import torch


@dataclass
class InputStatistics:
    """Second moments of the input of a matrix, summed over the calibration tokens that reach it.

    Padding does not count. Of a mixture of experts, an expert's matrices see the tokens that are
    routed to it. The sums may give each token a weight.

    Attributes:
        tokens: Number of tokens, whatever they weigh.
        squares: Sum of x_i^2, float32 `[in]`.
        gram: Sum of x_i x_j, float32 `[in, in]`; `None` where it was not asked for.
        output_error_moment: Sum of e_i x_j, where e is what the outputs of this matrix lack of
            those of the dense model, float32 `[out, in]`; `None` where the two are not compared.
    """

    tokens: int
    squares: torch.Tensor
    gram: torch.Tensor | None = None
    output_error_moment: torch.Tensor | None = None

    @classmethod
    def empty(cls, width: int, device: torch.device, gram: bool) -> "InputStatistics":
        """Statistics of no tokens yet."""
        return cls(
            0,
            torch.zeros(width, device=device),
            torch.zeros(width, width, device=device) if gram else None,
        )

    def add_(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens, `[tokens, in]`, each with a weight, `[tokens]`."""
        inputs = inputs.float()
        weighted = inputs if weights is None else inputs * weights.unsqueeze(1)
        self.tokens += len(inputs)
        if self.gram is None:
            self.squares += (weighted * inputs).sum(dim=0)
        else:
            self.gram.addmm_(weighted.T, inputs)
            self.squares = self.gram.diagonal().clone()
