"""Computes an experts module expert by expert.

An experts module (`experts` in the mixture models of transformers) holds the weights of all experts
in three-dimensional parameters. It takes tokens `[tokens, hidden]`, the experts that each is routed
to, int64 `[tokens, k]`, and their routing weights, `[tokens, k]`, and returns the weighted sum of
the outputs of these experts. The module of Llama 4 takes the tokens of all experts concatenated,
`[experts * tokens, hidden]`, zero where a token is not routed to the expert.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

OUTPUT = "down_proj"
"""Name of the output projections of experts."""

_INPUTS = ("gate_up_proj", "up_proj")
_TRIED_TOKENS = 4


@dataclass(frozen=True)
class ExpertsLayout:
    """How an experts module stores and runs its experts.

    Attributes:
        input_proj: Name of the parameter that multiplies the tokens first.
        count: Number of experts.
        hidden: Width of the tokens.
        width: Number of inputs of each output projection.
        rows: Number of outputs of each input projection.
        transposed: Whether the matrices are stored as `[in, out]`.
        all_tokens: Whether the module takes the concatenated tokens of all experts.
    """

    input_proj: str
    count: int
    hidden: int
    width: int
    rows: int
    transposed: bool
    all_tokens: bool


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def experts_layout(module: nn.Module) -> ExpertsLayout | None:
    """Return how an experts module stores its experts; `None` if it is not an experts module."""
    output = getattr(module, OUTPUT, None)
    input_proj = next((name for name in _INPUTS if getattr(module, name, None) is not None), "")
    weight = getattr(module, input_proj, None) if input_proj else None
    gates = getattr(module, "gate_proj", None)
    if gates is not None or not all(
        isinstance(each, nn.Parameter) and each.ndim == 3 for each in (output, weight)
    ):
        return None
    assert isinstance(output, nn.Parameter)
    assert isinstance(weight, nn.Parameter)
    # They are not square in both orientations: gated input projections have twice as many outputs
    # as the output projection has inputs.
    factor = 2 if input_proj == "gate_up_proj" else 1
    fits = [
        weight.shape[2 if transposed else 1] == factor * output.shape[1 if transposed else 2]
        and weight.shape[1 if transposed else 2] == output.shape[2 if transposed else 1]
        for transposed in (False, True)
    ]
    transposed = fits[1] if sum(fits) == 1 else bool(getattr(module, "is_transposed", False))
    kind: Any = type(module)
    arguments = len(_signature(kind).parameters) - 1
    if not any(fits) or arguments not in (1, 3):
        return None
    return ExpertsLayout(
        input_proj,
        output.shape[0],  # input projections may have more (LongCat's experts without weights)
        output.shape[2 if transposed else 1],
        output.shape[1 if transposed else 2],
        weight.shape[2 if transposed else 1],
        transposed,
        all_tokens=arguments == 1,
    )


@dataclass(frozen=True)
class ExpertsCall:
    """The arguments of one call of an experts module.

    Attributes:
        hidden: The tokens, `[tokens, hidden]`, or `[experts, tokens, hidden]` if each expert has
            its own tokens.
        chosen: Experts that each token is routed to, int64 `[tokens, k]`; the number of experts
            stands for none.
        weights: Their routing weights, `[tokens, k]`; 1 if the tokens are already weighted.
    """

    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor

    def inputs(self, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        """Return the inputs of an expert for some tokens, `[tokens, hidden]`."""
        return (self.hidden if self.hidden.ndim == 2 else self.hidden[expert])[tokens]


def experts_call(
    module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ExpertsCall:
    """Return the arguments of a call of an experts module.

    Args:
        module: The experts module.
        path: Its path, for the error message.
        args: The positional arguments.
        kwargs: The keyword arguments.

    Raises:
        ValueError: The arguments are not those of an experts module.
    """
    layout = experts_layout(module)
    kind: Any = type(module)
    arguments = _signature(kind).bind_partial(module, *args, **kwargs).arguments
    hidden, *others = list(arguments.values())[1:]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if layout is not None and layout.all_tokens and not others:
        hidden = hidden.view(layout.count, -1, hidden.shape[-1])
        routed_here = (hidden != 0).any(dim=-1).T
        ones = torch.ones(routed_here.shape, dtype=hidden.dtype, device=hidden.device)
        experts = torch.arange(layout.count, device=hidden.device).expand_as(routed_here)
        return ExpertsCall(hidden, experts.where(routed_here, layout.count), ones)
    if (
        len(others) != 2
        or not all(
            isinstance(arg, torch.Tensor) and arg.ndim == 2 and len(arg) == len(hidden)
            for arg in others
        )
        or (others[0].is_floating_point() or not others[1].is_floating_point())
    ):
        raise ValueError(
            f"the model gives {path} something other than the chosen experts and their weights "
            "[tokens, k], so its experts cannot run one by one: leave them dense "
            f"(modules_to_leave_dense=[{path.rpartition('.')[2]!r}]), or choose criterion "
            "'magnitude'"
        )
    return ExpertsCall(hidden, *others)


def gate(module: Any, projected: torch.Tensor) -> torch.Tensor:
    """Return the inputs of output projections from the outputs of input projections."""
    if getattr(module, "has_gate", True) and hasattr(module, "_apply_gate"):
        # Private method: the activation differs between architectures, and no public method applies
        # it.
        activated: torch.Tensor = module._apply_gate(projected)
        return activated
    if not hasattr(module, "gate_up_proj"):
        activated = module.act_fn(projected)
        return activated
    gates, values = projected.chunk(2, dim=-1)
    activated = module.act_fn(gates) * values
    return activated


def gated(module: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return the input of an expert's output projection, `[tokens, width]`.

    Args:
        module: The experts module.
        expert: The expert.
        hidden: The tokens, `[tokens, hidden]`.
    """
    layout = experts_layout(module)
    assert layout is not None
    return gate(module, _product(module, layout.input_proj, layout.transposed, expert, hidden))


def expert_output(module: Any, expert: int, activated: torch.Tensor) -> torch.Tensor:
    """Return the output of an expert, without its routing weight, `[tokens, hidden]`.

    Args:
        module: The experts module.
        expert: The expert.
        activated: The input of its output projection, `[tokens, width]`.
    """
    layout = experts_layout(module)
    assert layout is not None
    output = _product(module, OUTPUT, layout.transposed, expert, activated)
    if getattr(module, "has_post_expert_norm", False):
        normalised: torch.Tensor = module.post_expert_norm(output)
        return normalised
    return output


def _product(
    module: nn.Module, name: str, transposed: bool, expert: int, hidden: torch.Tensor
) -> torch.Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias", None)
    return nn.functional.linear(
        hidden, weight.T if transposed else weight, None if bias is None else bias[expert]
    )


def computes_experts(module: nn.Module) -> bool:
    """Return whether an experts module computes the same as `gated` and `expert_output`.

    The check runs one of its experts on a few tokens.
    """
    layout = experts_layout(module)
    assert layout is not None
    weight = getattr(module, OUTPUT)
    count = layout.count * _TRIED_TOKENS if layout.all_tokens else _TRIED_TOKENS
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, layout.hidden, generator=generator).to(weight)
    # The other chosen experts have zero weight.
    chosen = torch.arange(min(2, layout.count), device=weight.device).expand(count, -1)
    weights = (chosen == 0).to(weight.dtype)
    with torch.no_grad():
        found = module(hidden) if layout.all_tokens else module(hidden, chosen, weights)
        hidden = hidden[:_TRIED_TOKENS]  # those of the first expert
        expected = expert_output(module, 0, gated(module, 0, hidden))
    difference = float((found[:_TRIED_TOKENS] - expected).float().norm())
    scale = float(expected.float().norm())
    # Rounding errors of three products, about 0.5 % in bfloat16.
    tolerated = max(4 * torch.finfo(weight.dtype).eps, 64 * torch.finfo(torch.float32).eps)
    return difference <= tolerated * scale


def have_own_tokens(module: nn.Module) -> bool:
    """Return whether an experts module takes the concatenated tokens of all experts."""
    layout = experts_layout(module)
    return layout is not None and layout.all_tokens


def routed(chosen: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens routed to an expert, and its position among each token's `k` choices."""
    tokens, slots = (chosen == expert).nonzero(as_tuple=True)
    return tokens, slots
