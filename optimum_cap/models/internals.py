"""Private attributes of torch, transformers and accelerate, read in one place.

Each function says which public API is missing. Other modules that may use private attributes:
`experts` and `compilation` here, `plugin/quantizer.py`, `plugin/registration.py` and
`evaluation/harness.py`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn
from transformers import PreTrainedModel


def accelerate_hook(module: nn.Module) -> Any:
    """Return accelerate's hook on `module`, or `None`.

    accelerate adds and removes hooks publicly (`add_hook_to_module`), but has no getter.
    """
    return getattr(module, "_hf_hook", None)


def offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    """Return the hook that loads the weights of `module` itself; `None` if not offloaded."""
    hook = accelerate_hook(module)
    return hook if isinstance(hook, AlignDevicesHook) and hook.offload else None


def own_tensors(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters and the buffers of `module` itself, as mutable dictionaries.

    torch lists them publicly, but cannot replace them with tensors of another device or type.
    """
    return module._parameters, module._buffers


def replace_content(module: nn.Module, other: nn.Module, keep: Iterable[str]) -> None:
    """Replace the parameters, buffers, submodules and public attributes of a module by another's.

    torch has no public way to replace all of them, in particular those of the module itself.

    Args:
        module: The module, which is changed.
        other: A module of the same class.
        keep: Attributes of `module` to keep.
    """
    inner = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
    for name, value in vars(other).items():
        if name in inner or not (name.startswith("_") or name in keep or name == "training"):
            vars(module)[name] = value


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the forward pre-hooks of `module`, then its forward hooks.

    torch registers and removes hooks publicly, but does not list them.
    """
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def implementations(model: PreTrainedModel) -> dict[str, str | None]:
    """Return the attention and experts implementations that `model` uses.

    transformers sets them publicly (`set_attn_implementation`), but has no getter.
    """
    return {
        "attention": model.config._attn_implementation,
        "experts": getattr(model.config, "_experts_implementation", None),
    }


def module_before_compilation(module: Any) -> Any:
    """Return the module that `torch.compile` wrapped, or `module` itself.

    torch has no public way back from an `OptimizedModule`, and no public name of that class.
    """
    is_compiled = isinstance(module, torch._dynamo.OptimizedModule)
    return module._orig_mod if is_compiled else module


def wrapped_layers(model: nn.Module) -> list[str]:
    """Return the names of layers inside `model` that `torch.compile` wrapped.

    Such a layer changes the names of its parameters: `layers.0._orig_mod.mlp...`.
    """
    return [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, torch._dynamo.OptimizedModule)
    ]


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether `add_adapter` or `load_adapter` added adapters to `model`.

    `active_adapters` raises an error if there are none or if peft is not installed.
    """
    return bool(getattr(model, "_hf_peft_config_loaded", False))
