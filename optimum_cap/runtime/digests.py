"""Digests of models, calibration examples, plain values and the machine."""

import hashlib
import importlib.metadata
import inspect
import json
import sys
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from accelerate.utils.modeling import align_module_device
from transformers import PreTrainedModel

from optimum_cap.data import CalibrationExample
from optimum_cap.models import accelerate_hook, device_of, forward_hooks, implementations
from optimum_cap.progress import progress_bar

_VERSIONED_CODE = ("torch", "transformers")
# Entries of config.json that describe files rather than the computation, or duplicate parameters.
_NOT_COMPUTED = (
    "_name_or_path",
    "architectures",
    "dtype",
    "pruning_config",
    "quantization_config",
    "transformers_version",
)
VERSIONED = ("optimum-cap", "torch", "transformers")


def model_digest(model: PreTrainedModel) -> str:
    """Return a digest of everything a model's results depend on: class, config, stored weights."""
    config = model.config.to_dict()
    computed = {name: value for name, value in config.items() if name not in _NOT_COMPUTED}
    return digest_of(type(model).__name__, computed, weights_digest(model))


def weights_digest(model: PreTrainedModel) -> str:
    """Return a digest of all parameters and buffers; offloaded ones are loaded one by one."""
    digest = hashlib.sha256()
    modules = dict(model.named_modules())
    with progress_bar(total=len(modules), desc="Hashing weights", delay=5) as progress:
        for name, module in modules.items():
            with align_module_device(module):
                tensors = chain(
                    module.named_parameters(recurse=False), module.named_buffers(recurse=False)
                )
                for tensor_name, tensor in tensors:
                    _update(digest, f"{name}.{tensor_name}", tensor)
            progress.update()
    return digest.hexdigest()


def sample_digest(model: PreTrainedModel) -> str:
    """Return a digest of a few values of each parameter, a fast way to distinguish models."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        _update(digest, name, list(parameter.shape))
        if parameter.device.type != "meta":
            _update(digest, name, parameter.flatten()[:16])
    return digest.hexdigest()


def code_digest(model: PreTrainedModel) -> str:
    """Return a digest of the code of a model: classes, hooks and replaced forwards of its modules.

    Versions identify the code of torch and transformers. For other classes, the digest includes the
    source of their file, if there is one, so that another revision of remote code has a different
    digest.
    """
    digest = hashlib.sha256()
    files = set()
    for name, module in model.named_modules():
        kind = type(module)
        changes = forward_hooks(module)
        if "forward" in module.__dict__ and accelerate_hook(module) is None:
            changes.append(module.forward)
        named = [_name_of_code(change) for change in changes if not _is_versioned(change)]
        _update(digest, name, [_name_of_code(kind), *named])
        if not _is_versioned(kind):
            files.add(kind.__module__)
    for file in sorted(files & sys.modules.keys()):
        with suppress(OSError, TypeError):  # defined in an interactive session
            _update(digest, file, inspect.getsource(sys.modules[file]))
    return digest.hexdigest()


def _is_versioned(code: Any) -> bool:
    """Return whether torch or transformers defines the code; their hooks only record."""
    return str(getattr(code, "__module__", "")).partition(".")[0] in _VERSIONED_CODE


def _name_of_code(code: Any) -> str:
    code = code if hasattr(code, "__qualname__") else type(code)
    return f"{code.__module__}.{code.__qualname__}"


def digest_of(*parts: Any) -> str:
    """Return the SHA-256 digest of tensors, plain values, and lists and dictionaries of these."""
    digest = hashlib.sha256()
    for part in parts:
        _update(digest, "", part)
    return digest.hexdigest()


def _update(digest: Any, name: str, value: Any) -> None:
    """Add a name and a value: tensors by their bytes, containers entry by entry, others as JSON."""
    if isinstance(value, torch.Tensor):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, list):
        digest.update(f"{name} [{len(value)}]\n".encode())
        for entry in value:
            _update(digest, name, entry)
    elif isinstance(value, dict):
        digest.update(f"{name} {{{len(value)}}}\n".encode())
        for key in sorted(value, key=str):
            _update(digest, str(key), value[key])
    else:
        digest.update(f"{name} {json.dumps(value, default=str)}\n".encode())


def examples_digest(examples: list[CalibrationExample]) -> str:
    """Return a digest of the examples' tokens, scored positions and other inputs."""
    return digest_of(
        [
            [example.input_ids, example.scored, *([dict(example.inputs)] if example.inputs else [])]
            for example in examples
        ]
    )


def machine(model: PreTrainedModel) -> dict[str, Any]:
    """Return what measurements depend on other than the config, the weights and the tokens."""
    device = device_of(model)
    return {
        "code": code_digest(model),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
        **implementations(model),
        "device": device.type,
        "machine": (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            # The summation order in matrix products depends on instruction set and threads.
            else [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
        ),
        "precision": torch.get_float32_matmul_precision(),
    }
