"""Runs decoder layers with `torch.compile`, which fuses the operations between matrix products.

Layers of the same structure share one program, which takes their weights as inputs. It is compiled
once rather than per layer, and accepts any number of rows and tokens (a single row needs another
program). A layer that cannot be compiled without a graph break raises an error.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.models.internals import accelerate_hook

LayerCall = Callable[[nn.Module, torch.Tensor, Any, dict[str, Any]], Any]

OLDEST_TORCH = "2.7"  # the first version with all features used here
_MOST_PROGRAMS = 64  # for all models of the process; torch's default is 8


def call_layer(layer: nn.Module, hidden: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the output of a layer for hidden states `[rows, tokens, hidden]` and arguments."""
    return layer(hidden, *args, **kwargs)


def call_compiled(layer: nn.Module, hidden: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the same as `call_layer`, using a compiled program.

    Raises:
        ValueError: The layer cannot be compiled, or this machine cannot compile.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        return _program()(layer, hidden, args, kwargs)
    except FailOnRecompileLimitHit as error:
        raise ValueError(
            f"torch_compile: {type(layer).__name__} and layers before it needed more than "
            f"{_MOST_PROGRAMS} programs in this process: leave torch_compile out"
        ) from error
    except TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch_compile: {type(layer).__name__} cannot be compiled here "
            f"({type(error).__name__}: {reason}): leave torch_compile out"
        ) from error


@cache
def _program() -> LayerCall:
    # Round in the same places as the layer itself.
    options: dict[str, Any] = {"emulate_precision_casts": True}
    return torch.compile(call_layer, dynamic=True, fullgraph=True, options=options)


@contextmanager
def compiling() -> Iterator[None]:
    """Apply the torch settings for a run with compiled layers."""
    import torch._dynamo

    with (
        torch._dynamo.config.patch(recompile_limit=_MOST_PROGRAMS),
        warnings.catch_warnings(),
    ):
        # This warning recommends TF32 on a GPU, which would cost float32 scores most of their
        # digits.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        yield


def check_compilable(model: PreTrainedModel) -> None:
    """Check, before anything is compiled, that the layers of a model can be compiled.

    Raises:
        ValueError: torch is too old, or accelerate moves weights or inputs of the model.
    """
    if Version(torch.__version__) < Version(OLDEST_TORCH):
        raise ValueError(
            f"torch_compile needs torch {OLDEST_TORCH} or newer, got torch {torch.__version__}: "
            "upgrade torch, or leave torch_compile out"
        )
    if any(accelerate_hook(module) is not None for module in model.modules()):
        raise ValueError(
            "torch_compile needs the whole model on one device, but this model is spread over "
            "several devices or offloaded: load it with a device_map such as 'cuda:0', or leave "
            "torch_compile out"
        )
