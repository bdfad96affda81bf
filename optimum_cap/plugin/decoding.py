"""Dense copies of packed and coded checkpoints, where these cannot be decoded while loading.

Quantizers of transformers read the weights of a checkpoint themselves, and so does tensor
parallelism. A packed or coded checkpoint is therefore decoded to a temporary folder first, which is
deleted once the model is loaded.
"""

import copy
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from optimum_cap.text import format_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

# Arguments of from_pretrained that locate files in a repository; they do not apply to folders.
_PLACES = ("revision", "subfolder", "code_revision", "_commit_hash")


def is_to_be_quantized(name: Any, hub: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a packed or coded checkpoint should be quantized while loading.

    Args:
        name: Name or path of the checkpoint.
        hub: Keywords that select the files on the Hub.
        kwargs: Keywords of `from_pretrained`.
    """
    quantization = kwargs.get("quantization_config")
    if name is None or quantization is None or _method(quantization) == "cap":
        return False
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        saved = getattr(config, "quantization_config", None)
    else:
        saved = PreTrainedConfig.get_config_dict(name, **hub)[0].get("quantization_config")
    return saved is not None and _method(saved) == "cap"


def _method(quantization: Any) -> str | None:
    if isinstance(quantization, dict):
        return quantization.get("quant_method")
    return getattr(quantization, "quant_method", None)


class DenseCopyNeeded(Exception):  # noqa: N818 - no error, but a way out of `from_pretrained`
    """Raised while loading a packed or coded checkpoint whose matrices should be split."""


def load_dense_copy(
    load: Callable[..., Any], name: Any, hub: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    """Decode a packed or coded checkpoint to a temporary folder, and load that.

    If several processes load it together (`torch.distributed` is initialised), one process per
    machine decodes it.

    Args:
        load: The class's `from_pretrained`, which takes the folder and `kwargs`.
        name: Name or path of the checkpoint.
        hub: Keywords that select the files on the Hub.
        kwargs: Other arguments of `from_pretrained`.

    Returns:
        The result of `load`. The model has the name of the checkpoint, not of the folder.

    Raises:
        OSError: There is not enough space for the copy.
        ValueError: The checkpoint is damaged.
    """
    from optimum_cap.checkpoint import set_checkpoint

    name = os.fspath(name)
    together = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    decodes = not together or int(os.environ.get("LOCAL_RANK", torch.distributed.get_rank())) == 0
    parent: str | None = None
    error: Exception | None = None
    try:
        if decodes:
            parent = tempfile.mkdtemp(prefix="optimum-cap-dense-")
            try:
                _decode(name, hub, parent)
            except Exception as failure:
                error = failure
        folder = _folder_of_machine(parent, error) if together else parent
        if error is not None:
            raise error
        assert folder is not None
        kwargs = {key: value for key, value in kwargs.items() if key not in _PLACES}
        if isinstance(kwargs.get("config"), PreTrainedConfig):
            kwargs["config"] = copy.deepcopy(kwargs["config"])
            kwargs["config"].__dict__.pop("quantization_config", None)
        loaded = load(os.path.join(folder, "model"), **kwargs)
        model: PreTrainedModel = loaded[0] if isinstance(loaded, tuple) else loaded
        set_checkpoint(model, name)
        if together:
            torch.distributed.barrier()  # before the files are deleted
    except BaseException:
        if parent is not None:
            shutil.rmtree(parent, ignore_errors=True)
        raise
    if any(parameter.is_meta for parameter in model.parameters()) and parent is not None:
        # Offloaded weights are read from the copy every time they are used.
        weakref.finalize(model, shutil.rmtree, parent, ignore_errors=True)
    elif parent is not None:
        shutil.rmtree(parent, ignore_errors=True)
    return loaded


def _decode(name: str, hub: dict[str, Any], parent: str) -> None:
    """Write the dense copy of a checkpoint to the folder `model` in `parent`."""
    from optimum_cap.checkpoint import convert_checkpoint, inspect_checkpoint

    where: dict[str, Any] = {
        key: hub[key] for key in ("revision", "token", "cache_dir") if key in hub
    }
    where["subfolder"] = hub.get("subfolder") or ""
    size = inspect_checkpoint(name, **where).dense_bytes
    free = shutil.disk_usage(parent).free
    if free < size:
        raise OSError(
            f"{name} is decoded before it is loaded in this way, which takes {format_size(size)} "
            f"in {parent}, where {format_size(free)} are free: set TMPDIR to a larger disk"
        )
    logger.warning(
        f"{name} is decoded to {parent} first ({format_size(size)}, deleted afterwards), because "
        "transformers reads the weights itself when it quantizes or splits them; `optimum-cli cap "
        "convert --format dense` saves this step"
    )
    convert_checkpoint(name, Path(parent) / "model", "dense", **where)


def _folder_of_machine(parent: str | None, error: Exception | None) -> str:
    """Return the folder that a process on this machine decoded to, or raise its error."""
    results: list[Any] = [None] * torch.distributed.get_world_size()
    problem = None if error is None else f"{type(error).__name__}: {error}"
    torch.distributed.all_gather_object(results, (socket.gethostname(), parent, problem))
    problems = [each for _, _, each in results if each is not None]
    if problems and error is None:
        raise ValueError(f"another process could not decode the checkpoint: {problems[0]}")
    [folder] = [
        folder for host, folder, _ in results if host == socket.gethostname() and folder is not None
    ]
    assert isinstance(folder, str)
    return folder
