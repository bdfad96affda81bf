"""The computation of an experts module, expert by expert.

An experts module (`experts` in the mixture models of transformers) takes tokens `[tokens, hidden]`,
the experts that each is routed to, int64 `[tokens, k]`, and their routing weights, `[tokens, k]`.
It returns the weighted sum of the outputs of these experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.models.architectures import Matrix, Site


def experts_of(model: PreTrainedModel, site: Site) -> nn.Module:
    """Return the experts module of an expert's site.

    Raises:
        ValueError: An expert is not computed by `gated` followed by a product with `down_proj`.
    """
    module = model.get_submodule(site.block)
    others = ("has_bias", "is_transposed", "has_post_expert_norm")
    if not all(
        hasattr(module, name) for name in ("_apply_gate", "gate_up_proj", "down_proj")
    ) or any(getattr(module, name, False) for name in others):
        raise ValueError(
            f"the experts of {type(model).__name__} ({type(module).__name__}) cannot be scored: "
            "masking needs gate_up_proj and down_proj [experts, out, in] without biases or a norm "
            "after them; score heads only (scored_units='heads')"
        )
    return module


def routing(module: str, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts that tokens are routed to and their weights, from a module's arguments.

    Args:
        module: Path of the experts module.
        args: The positional arguments after the tokens.

    Returns:
        The experts, int64 `[tokens, k]`, and their routing weights, `[tokens, k]`.

    Raises:
        ValueError: The arguments are not these.
    """
    if len(args) != 2 or not all(isinstance(arg, torch.Tensor) and arg.ndim == 2 for arg in args):
        raise ValueError(
            f"the model gives {module} something other than the chosen experts and their weights "
            "[tokens, k], so its experts cannot run one by one: score heads only "
            "(scored_units='heads'), and choose criterion 'causal_score', 'magnitude' or 'random' "
            "with an allocation that needs no inputs ('uniform' or 'global')"
        )
    chosen, weights = args
    return chosen, weights


def gated(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return the input of an expert's down_proj, `[tokens, width]`, for `[tokens, hidden]`."""
    projected = nn.functional.linear(hidden, experts.gate_up_proj[expert])
    # Private: the activation differs between architectures, and no public method applies it.
    activated: torch.Tensor = experts._apply_gate(projected)
    return activated


def routed(chosen: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens are routed to an expert, and its position in `[tokens, k]` of each."""
    tokens, slots = (chosen == expert).nonzero(as_tuple=True)
    return tokens, slots


def check_expert_input(matrix: Matrix) -> None:
    """Check that the input of an expert's matrix can be computed.

    Raises:
        ValueError: It cannot.
    """
    name = _projection(matrix)
    if name not in _INPUTS:
        raise ValueError(
            f"{matrix.name}: cannot compute the input of an expert's {name!r} (supported: "
            f"{', '.join(_INPUTS)}), so criteria that need inputs cannot prune it: leave it dense "
            "(modules_to_leave_dense), or add it to _INPUTS in optimum_cap/models/experts.py"
        )


def expert_input(experts: Any, matrix: Matrix, hidden: torch.Tensor) -> torch.Tensor:
    """Return the input of an expert's matrix for the tokens that are routed to it.

    Args:
        experts: The module of the experts.
        matrix: A matrix of one of them that `check_expert_input` accepts.
        hidden: The tokens, `[tokens, hidden]`.

    Returns:
        `[tokens, in]`.
    """
    assert matrix.expert is not None
    return _INPUTS[_projection(matrix)](experts, matrix.expert, hidden)


def _projection(matrix: Matrix) -> str:
    return matrix.parameter.rpartition(".")[2]


def _unchanged(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    return hidden


_INPUTS: dict[str, Callable[[Any, int, torch.Tensor], torch.Tensor]] = {
    "gate_up_proj": _unchanged,
    "down_proj": gated,
}
