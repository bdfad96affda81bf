"""The keyword `pruning_config` of `from_pretrained`, and the record of models that are loaded."""

import functools
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import resolve_revision

from optimum_cap.config import CAPConfig
from optimum_cap.plugin.quantizer import attach_saved_record, hub_arguments, parallel_arguments

# What the caller of from_pretrained said about where files come from: the tokenizer and the record
# come from the same place.
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
)
_REVISION_ARGUMENTS = ("revision", "token", "local_files_only", "cache_dir")
_PARALLEL_ARGUMENTS = ("tp_plan", "tp_size", "distributed_config", "device_mesh")


def register() -> None:
    """Teach `from_pretrained` the keyword; a second call changes nothing."""
    if hasattr(PreTrainedModel.from_pretrained, "__wrapped__"):
        return
    for owner, wrap in (
        (PreTrainedModel, wrap_model_from_pretrained),
        (AutoConfig, wrap_config_from_pretrained),
    ):
        stock = owner.__dict__["from_pretrained"].__func__
        owner.from_pretrained = classmethod(wrap(stock))


def wrap_model_from_pretrained(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `PreTrainedModel.from_pretrained`, where the Auto classes end as well.

    It routes `pruning_config` to the native hook, and gives models that are loaded from a dense CAP
    checkpoint, of which the native hook hears nothing, their record.
    """

    @functools.wraps(stock)
    def from_pretrained(
        cls: type[PreTrainedModel], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        by_keyword = kwargs.get("pruning_config") is not None
        _route_pruning_config(kwargs)
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
        where = {name: hub[name] for name in _REVISION_ARGUMENTS if name in hub}
        hub["revision"] = resolve_revision(pretrained_model_name_or_path, **where)
        if isinstance(kwargs.get("quantization_config"), CAPConfig):
            _check_not_pruned(pretrained_model_name_or_path, hub, kwargs, by_keyword)
        if "trust_remote_code" in kwargs:
            hub["trust_remote_code"] = kwargs["trust_remote_code"]
        reset = hub_arguments.set(hub)
        parallel = [name for name in _PARALLEL_ARGUMENTS if kwargs.get(name) is not None]
        reset_parallel = parallel_arguments.set(parallel)
        try:
            loaded = stock(cls, pretrained_model_name_or_path, *args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            is_pruned = getattr(model, "pruning_record", None) is not None
            # Without a name, the model was made of a config and weights in memory.
            has_files = pretrained_model_name_or_path is not None
            if has_files and getattr(model.config, "pruning_config", None) and not is_pruned:
                attach_saved_record(model)
            return loaded
        finally:
            hub_arguments.reset(reset)
            parallel_arguments.reset(reset_parallel)

    return from_pretrained


def wrap_config_from_pretrained(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `AutoConfig.from_pretrained`, which would keep the keyword to itself.

    It sets every keyword that `config.json` knows, and the `config.json` of a model that is already
    pruned knows `pruning_config`. The Auto classes and `pipeline` all ask it, in whatever order
    they and this package were imported.
    """

    @functools.wraps(stock)
    def from_pretrained(cls: type[AutoConfig], *args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop("pruning_config", None)
        loaded = stock(cls, *args, **kwargs)
        if given is not None and isinstance(loaded, tuple):  # (config, keywords for the model)
            loaded[1]["pruning_config"] = given
        return loaded

    return from_pretrained


def _route_pruning_config(kwargs: dict[str, Any]) -> None:
    """Turn the keyword `pruning_config` into `quantization_config`, the native hook."""
    given = kwargs.pop("pruning_config", None)
    if given is None:
        return
    if isinstance(given, dict):
        given = CAPConfig.from_dict(given)
    if not isinstance(given, CAPConfig):
        raise TypeError(
            f"pruning_config must be a CAPConfig or a dictionary of its fields, got "
            f"{type(given).__name__}"
        )
    if kwargs.get("quantization_config") is not None:
        raise ValueError(
            "pruning_config and quantization_config cannot be given together: prune first, save "
            "with checkpoint_format='dense', and quantize the saved model when loading it"
        )
    kwargs["quantization_config"] = given


def _check_not_pruned(name: Any, hub: dict[str, Any], kwargs: dict[str, Any], asked: bool) -> None:
    """Check that the checkpoint is dense, or that it is only to be loaded.

    Programs that read the quantization method from `config.json` and hand it back (lm-eval) ask for
    no pruning: what they pass is what the checkpoint says of itself, and is dropped.

    Args:
        name: Name or path of the checkpoint.
        hub: Where it comes from.
        kwargs: Keywords of `from_pretrained`, with a `CAPConfig` as `quantization_config`.
        asked: Whether it was given as `pruning_config`.
    """
    values, _ = PreTrainedConfig.get_config_dict(name, **hub)
    if (pruned := values.get("pruning_config")) is None:
        return
    saved = values.get("quantization_config")
    given = kwargs["quantization_config"].to_dict()
    if not asked and saved is not None and given == CAPConfig.from_dict(saved).to_dict():
        del kwargs["quantization_config"]
        return
    raise ValueError(
        f"{name} is already pruned to sparsity {pruned.get('sparsity')}: load it without "
        "pruning_config, or prune its dense base model instead (CAPPruner prunes a loaded "
        "model further)"
    )
