"""Finds the modules of a decoder layer that add their output to the residual stream unchanged."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import nn

from optimum_cap.models import hidden_states_of, recorded_calls, repack_output, replaced_forward

_ROUNDING = 4  # times the machine epsilon: the largest difference that counts as equal


def modules_that_join(
    modules: Mapping[str, nn.Module],
    hidden: torch.Tensor,
    run: Callable[[torch.Tensor], torch.Tensor],
) -> set[str]:
    """Return which modules of a layer add their output to the residual stream unchanged.

    A known change is added to the input of the layer and then to the output of each module. If the
    output of the layer changes by the same amount, nothing lies between the module and the stream.

    Args:
        modules: The candidate modules, by name.
        hidden: Input of the layer, `[examples, tokens, hidden]`.
        run: Runs the layer.

    Returns:
        Their names; empty if the layer does not add its input to its output.
    """
    with recorded_calls(dict(modules)) as calls:
        output = run(hidden)
    hidden = hidden.to(output.device)
    random = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    change = random.to(hidden) * output.std()

    def joins(changed: str | None) -> bool:
        with ExitStack() as stack:
            for name, module in modules.items():
                fixed = hidden_states_of(calls[name].output)
                if name == changed:
                    fixed = fixed + change.view_as(fixed)
                fixed = repack_output(calls[name].output, fixed)
                stack.enter_context(
                    replaced_forward(module, lambda *args, fixed=fixed, **kwargs: fixed)
                )
            start = hidden if changed else hidden + change
            difference = run(start) - output - change
        size = float(output.abs().mean() + change.abs().mean())
        return float(difference.abs().mean()) <= _ROUNDING * torch.finfo(output.dtype).eps * size

    return {name for name in modules if joins(name)} if joins(None) else set()
