"""States that a model is put into for a while, and comes back from as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import nn

from optimum_cap.models.offload import offloading_hook


@contextmanager
def without_parameter_grads(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient: the backward pass stays as short as it can be."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def float32_on_cpu(model: nn.Module) -> Iterator[dict[str, torch.dtype]]:
    """Compute in float32 on the CPU: half-precision weights are widened, and narrowed again.

    Many CPUs multiply bfloat16 matrices hundreds of times slower than float32 ones. Widening and
    narrowing again is exact, so the weights come back bit for bit. Offloaded weights are widened
    each time they are brought in.

    Yields:
        The dtypes of what is widened, by name.
    """
    own = dict(_narrow_on_cpu(model))
    try:
        for name in own:
            tensor = attrgetter(name)(model)
            tensor.data = tensor.data.float()
        yield own
    finally:
        # By name: of what is offloaded, accelerate makes a new tensor each time.
        for name, dtype in own.items():
            tensor = attrgetter(name)(model)
            tensor.data = tensor.data.to(dtype)


def _narrow_on_cpu(model: nn.Module) -> Iterator[tuple[str, torch.dtype]]:
    """Names and dtypes of the half-precision parameters and buffers that are used on the CPU."""
    for path, module in model.named_modules():
        hook = offloading_hook(module)
        for name, tensor in (
            *module.named_parameters(path, recurse=False),
            *module.named_buffers(path, recurse=False),
        ):
            device = tensor.device
            if device.type == "meta" and hook is not None:
                device = torch.device(hook.execution_device)
            if device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16):
                yield name, tensor.dtype


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off and gradients out; each module gets its training flag back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
