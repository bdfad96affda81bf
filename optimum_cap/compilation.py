"""Decoder layers through `torch.compile`, which fuses what stands between their matrix products.

Layers of one form are one program, whose inputs are their weights: it is compiled once, not for
each layer. Tensors may have any number of rows and tokens. Where a layer cannot be compiled as one
piece, the run says so instead of going on with less.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

LayerCall = Callable[[nn.Module, torch.Tensor, Any, dict[str, Any]], Any]

# Round where the layer itself does, and choose kernels by rules instead of by timing them.
_OPTIONS = ("emulate_precision_casts", "deterministic")


def call_layer(layer: nn.Module, hidden: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a layer returns for hidden states `[rows, tokens, hidden]` and its other arguments."""
    return layer(hidden, *args, **kwargs)


def call_compiled(layer: nn.Module, hidden: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do the same through `torch.compile`.

    Raises:
        ValueError: The layer cannot be compiled, or nothing can on this machine.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        return _program()(layer, hidden, args, kwargs)
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch_compile: {type(layer).__name__} cannot be compiled here "
            f"({type(error).__name__}: {reason}): leave torch_compile out"
        ) from error


@cache
def _program() -> LayerCall:
    from torch._inductor import config

    # Some are not known to older releases of torch.
    options: dict[str, Any] = {name: True for name in _OPTIONS if hasattr(config, name)}
    return torch.compile(call_layer, dynamic=True, fullgraph=True, options=options)
