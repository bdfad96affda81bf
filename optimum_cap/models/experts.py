"""What a module of experts computes, expert by expert.

Such a module (`experts` in transformers' mixtures) takes the tokens `[tokens, hidden]`, the experts
chosen for each, int64 `[tokens, k]`, and their weights, `[tokens, k]`. It returns the sum of the
weighted outputs of the chosen experts.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.models.architectures import Site


def experts_of(model: PreTrainedModel, site: Site) -> nn.Module:
    """Return the module of an expert's site.

    Raises:
        ValueError: It computes its experts in another way than `gated` and a product with
            `down_proj`.
    """
    module = model.get_submodule(site.block)
    others = ("has_bias", "is_transposed", "has_post_expert_norm")
    if not all(
        hasattr(module, name) for name in ("_apply_gate", "gate_up_proj", "down_proj")
    ) or any(getattr(module, name, False) for name in others):
        raise ValueError(
            f"the experts of {type(model).__name__} ({type(module).__name__}) cannot be scored: "
            "masking needs gate_up_proj and down_proj [experts, out, in] without biases or a norm "
            "behind them: score heads only (scored_units='heads')"
        )
    return module


def routing(module: str, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the chosen experts and their weights, from what a module got beside the tokens.

    Args:
        module: Its path.
        args: The positional arguments after the tokens.

    Raises:
        ValueError: It got something else.
    """
    if len(args) != 2 or not all(isinstance(arg, torch.Tensor) and arg.ndim == 2 for arg in args):
        raise ValueError(
            f"the model gives {module} something else than the chosen experts and their weights "
            "[tokens, k], so its experts cannot be looked at one by one: score heads only "
            "(scored_units='heads'), and prune with target 'local' and another allocation than "
            "'fisher'"
        )
    chosen, weights = args
    return chosen, weights


def gated(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return what an expert's down_proj gets for tokens `[tokens, hidden]`: `[tokens, width]`."""
    projected = nn.functional.linear(hidden, experts.gate_up_proj[expert])
    # Private: activations differ between architectures, and nothing public applies one alone.
    activated: torch.Tensor = experts._apply_gate(projected)
    return activated


def routed(chosen: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens reach an expert, and its place among the chosen ones of each: `[n]`."""
    tokens, slots = (chosen == expert).nonzero(as_tuple=True)
    return tokens, slots
