"""Loads and changes weights that accelerate has offloaded to the CPU or to disk.

If a model is larger than its devices (`device_map="auto"`), offloaded parameters are on the meta
device, and the `AlignDevicesHook` of their module has a map of names to values. Nothing here
changes a model that is in memory.
"""

import ctypes
import errno
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.models.internals import offloading_hook
from optimum_cap.models.sites import Matrix, is_transposed


def is_offloaded(model: nn.Module) -> bool:
    """Return whether any weights of `model` are offloaded."""
    return any(offloading_hook(module) is not None for module in model.modules())


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device for the inputs of `model`, even if its first weights are offloaded."""
    if model.device.type == "meta":
        for module in model.modules():
            if (hook := offloading_hook(module)) is not None:
                return torch.device(hook.execution_device)
    return model.device


@contextmanager
def onloaded(module: nn.Module, besides: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Keep offloaded weights in memory, so that each is loaded only once.

    Args:
        module: The module whose weights to load.
        besides: Modules inside it whose weights stay offloaded.
    """
    left_out = {child for other in besides for child in other.modules()}
    with ExitStack() as stack:
        if is_offloaded(module):
            stack.callback(_return_freed_memory)
        for child in module.modules():
            if child not in left_out and (hook := offloading_hook(child)) is not None:
                hook.pre_forward(child)
                hook.offload = False
                stack.callback(_offload_again, child, hook)
        yield


def _offload_again(module: nn.Module, hook: AlignDevicesHook) -> None:
    hook.offload = True
    hook.post_forward(module, None)


def _return_freed_memory() -> None:
    """Return freed memory to the system, if the C library (glibc) supports it.

    By default it keeps blocks of up to 32 MB, so every layer would leave some more megabytes.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def stored_parameter(model: nn.Module, name: str) -> torch.Tensor:
    """Return the read-only values of a parameter, loaded if it is offloaded.

    Args:
        model: The model.
        name: As in `model.named_parameters()`.
    """
    module, attribute = _owner(model, name)
    hook = offloading_hook(module)
    if hook is None:
        return getattr(module, attribute).data
    return hook.weights_map[attribute].to(hook.execution_device)


def weights(model: PreTrainedModel, matrix: Matrix) -> torch.Tensor:
    """Return the read-only weights of a matrix, `[out, in]`, loaded if they are offloaded."""
    weight = matrix.of(stored_parameter(model, matrix.parameter))
    return weight.T if is_transposed(model, matrix) else weight


def writable_weights(model: PreTrainedModel, matrix: Matrix) -> torch.Tensor:
    """Return the weights of a matrix as a view `[out, in]` to change in place.

    For weights on disk, this is a memory-mapped view of a copy, which the model uses from then on.
    The copy is deleted with the model. The files the model was loaded from are never changed.

    Raises:
        OSError: There is not enough disk space for the copy.
    """
    module, name = _owner(model, matrix.parameter)
    hook = offloading_hook(module)
    stored = getattr(module, name).data if hook is None else _writable(hook, name)
    weight = matrix.of(stored)
    return weight.T if is_transposed(model, matrix) else weight


def _owner(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    owner, _, name = parameter.rpartition(".")
    return model.get_submodule(owner), name


def _writable(hook: AlignDevicesHook, name: str) -> torch.Tensor:
    values, key = hook.weights_map, name
    while isinstance(values, PrefixedDataset):
        values, key = values.dataset, f"{values.prefix}{key}"
    if not isinstance(values, OffloadedWeightsLoader) or key in values.state_dict:
        return values[key]
    file = _folder_of_copies(values) / f"{key}.safetensors"
    weight = values[key]
    if not file.exists():
        _save_copy(file, key, weight)
        values.index[key] = {
            "safetensors_file": str(file),
            "weight_name": key,
            "dtype": str(weight.dtype).removeprefix("torch."),
        }
        _return_freed_memory()
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")  # after the header and its length
    data = np.memmap(file, dtype=np.uint8, mode="r+", offset=start)
    return torch.from_numpy(data).view(weight.dtype).view(weight.shape)


def _folder_of_copies(values: OffloadedWeightsLoader) -> Path:
    """Return the folder for copies of one model's weights, in its offload folder if it has one."""
    if not hasattr(values, "folder_of_copies"):
        values.folder_of_copies = tempfile.mkdtemp(prefix="pruned-", dir=values.save_folder)
        weakref.finalize(values, shutil.rmtree, values.folder_of_copies, ignore_errors=True)
    return Path(values.folder_of_copies)


def _save_copy(file: Path, key: str, weight: torch.Tensor) -> None:
    try:
        save_file({key: weight.contiguous()}, file)
    except (OSError, SafetensorError) as error:
        file.unlink(missing_ok=True)
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"could not store the pruned {key} in {file.parent} ({error}), so the model is only "
            "partly pruned: free disk space, or choose another offload_folder, and load it again",
        ) from error


def check_in_memory(model: PreTrainedModel, alternative: str) -> None:
    """Check that all weights are in memory, as a backward pass needs them.

    Args:
        model: The model.
        alternative: A setting that needs only one layer at a time, for the error message.

    Raises:
        ValueError: Weights of the model are offloaded.
    """
    if is_offloaded(model):
        raise ValueError(
            "a backward pass needs all weights in memory at once, but some weights of this model "
            f"are offloaded: use {alternative}, which needs one layer at a time, or load the model "
            "with a device_map that keeps all weights in memory"
        )
