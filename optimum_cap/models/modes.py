"""Context managers that change the state of a model and restore it on exit."""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import nn

from optimum_cap.models.internals import offloading_hook


@contextmanager
def without_parameter_grads(model: nn.Module) -> Iterator[None]:
    """Disable the gradients of all parameters, so that a backward pass skips them."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def float32_on_cpu(model: nn.Module) -> Iterator[dict[str, torch.dtype]]:
    """Compute in float32 on the CPU: convert half-precision weights on entry, and back on exit.

    Many CPUs multiply bfloat16 matrices hundreds of times slower than float32 ones. The conversion
    is lossless, so the weights are restored bit for bit. Offloaded weights are converted each time
    they are loaded.

    Yields:
        The original dtypes of the converted tensors, by name.
    """
    stored_dtypes = dict(_narrow_on_cpu(model))
    try:
        for name in stored_dtypes:
            tensor = attrgetter(name)(model)
            tensor.data = tensor.data.float()
        yield stored_dtypes
    finally:
        # By name, because accelerate creates new tensors for offloaded weights each time.
        for name, dtype in stored_dtypes.items():
            tensor = attrgetter(name)(model)
            tensor.data = tensor.data.to(dtype)


def _narrow_on_cpu(model: nn.Module) -> Iterator[tuple[str, torch.dtype]]:
    """Yield names and dtypes of the half-precision parameters and buffers used on the CPU."""
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
    """Switch to evaluation mode without gradients; restore the mode of each module on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
