"""The argument `pruning_config` of `from_pretrained`, and pruning records of loaded models."""

import functools
import os
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file, is_peft_available
from transformers.utils.hub import resolve_revision

from optimum_cap.config import CAPConfig
from optimum_cap.plugin.decoding import DenseCopyNeeded, is_to_be_quantized, load_dense_copy
from optimum_cap.plugin.quantizer import (
    attach_saved_record,
    find_record,
    hub_arguments,
    parallel_arguments,
    read_saved_record,
)

# Arguments of from_pretrained that select the files to load; they also apply to the tokenizer and
# the pruning record.
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
    """Add the argument `pruning_config` to `from_pretrained`. Idempotent."""
    if hasattr(PreTrainedModel.from_pretrained, "__wrapped__"):
        return
    for owner, wrap in (
        (PreTrainedModel, wrap_model_from_pretrained),
        (AutoConfig, wrap_config_from_pretrained),
    ):
        stock = owner.__dict__["from_pretrained"].__func__
        owner.from_pretrained = classmethod(wrap(stock))


def wrap_model_from_pretrained(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `PreTrainedModel.from_pretrained`, which the Auto classes call as well.

    The wrapper passes `pruning_config` on as `quantization_config`, and attaches the pruning record
    to models loaded from a dense CAP checkpoint, for which transformers creates no quantizer.
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
            _check_no_adapter(pretrained_model_name_or_path, hub, kwargs)
            _check_not_pruned(pretrained_model_name_or_path, hub, kwargs, by_keyword)

        def load_decoded() -> Any:
            return load_dense_copy(
                lambda folder, **others: cls.from_pretrained(folder, *args, **others),
                pretrained_model_name_or_path,
                hub,
                kwargs,
            )

        if is_to_be_quantized(pretrained_model_name_or_path, hub, kwargs):
            return load_decoded()
        if "trust_remote_code" in kwargs:
            hub["trust_remote_code"] = kwargs["trust_remote_code"]
        reset = hub_arguments.set(hub)
        parallel = [name for name in _PARALLEL_ARGUMENTS if kwargs.get(name) is not None]
        reset_parallel = parallel_arguments.set(parallel)
        try:
            variant = (kwargs.get("variant"), kwargs.get("use_safetensors") is not False)
            # Without a name, the model was created from a config and weights in memory.
            has_files = pretrained_model_name_or_path is not None
            try:
                loaded = stock(cls, pretrained_model_name_or_path, *args, **kwargs)
            except DenseCopyNeeded:
                return load_decoded()
            except Exception as error:
                _explain(error, pretrained_model_name_or_path, hub, variant)
                raise
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            is_pruned = getattr(model, "pruning_record", None) is not None
            if has_files and getattr(model.config, "pruning_config", None) and not is_pruned:
                _check_and_attach_record(model, variant)
            return loaded
        finally:
            hub_arguments.reset(reset)
            parallel_arguments.reset(reset_parallel)

    return from_pretrained


def _check_and_attach_record(model: PreTrainedModel, variant: tuple[str | None, bool]) -> None:
    """Check the files that a dense CAP checkpoint was loaded from, and attach its record.

    Raises:
        ValueError: The record or a file is damaged, or has changed since the model was saved.
    """
    from optimum_cap.checkpoint import check_loaded_folder

    saved = read_saved_record(model.name_or_path)
    if saved is not None:
        check_loaded_folder(saved.folder, saved.digests, saved.checkpoint_format, *variant)
        attach_saved_record(model, saved)


def _explain(
    error: Exception,
    name: Any,
    hub: dict[str, Any],
    variant: tuple[str | None, bool] = (None, True),
) -> None:
    """Raise a `ValueError` if damage to the files of a CAP checkpoint explains `error`.

    Args:
        error: The error raised while loading.
        name: Name or path of the checkpoint.
        hub: Keywords that select the files on the Hub.
        variant: The argument `variant`, and whether safetensors files may be loaded.
    """
    if name is None:
        return
    # Only from the cache, because `error` may mean that the network is unreachable.
    offline = {**hub, "local_files_only": True}
    damage = _damage(name, offline, variant)
    if damage is not None and str(damage) != str(error):
        raise damage from error


def _damage(name: Any, hub: dict[str, Any], variant: tuple[str | None, bool]) -> ValueError | None:
    """Return what is wrong with the files of a CAP checkpoint, if anything."""
    from optimum_cap.checkpoint import check_loaded_folder, check_settings, read_record

    try:
        record_file = find_record(str(name), **hub)
    except (OSError, ValueError):  # neither a folder nor a repository
        return None
    if record_file is None:
        return None
    try:
        saved = read_record(record_file, str(name))[1]
        folder = record_file.parent
        check_settings(folder, saved["digests"])
        check_loaded_folder(folder, saved["digests"], saved["checkpoint_format"], *variant)
    except ValueError as error:
        return error
    return None


def wrap_config_from_pretrained(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `AutoConfig.from_pretrained`, which would consume `pruning_config`.

    It consumes every argument that is a key of `config.json`, and the `config.json` of a pruned
    model has the key `pruning_config`. The Auto classes and `pipeline` call it, regardless of the
    order in which they and this package were imported.
    """

    @functools.wraps(stock)
    def from_pretrained(cls: type[AutoConfig], *args: Any, **kwargs: Any) -> Any:
        pruning_config = kwargs.pop("pruning_config", None)
        try:
            loaded = stock(cls, *args, **kwargs)
        except Exception as error:
            name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
            _explain(error, name, hub)
            raise
        if pruning_config is not None and isinstance(loaded, tuple):  # (config, model arguments)
            loaded[1]["pruning_config"] = pruning_config
        return loaded

    return from_pretrained


def _route_pruning_config(kwargs: dict[str, Any]) -> None:
    """Replace `pruning_config` with `quantization_config`, which transformers supports."""
    pruning_config = kwargs.pop("pruning_config", None)
    if pruning_config is None:
        return
    if isinstance(pruning_config, dict):
        pruning_config = CAPConfig.from_dict(pruning_config)
    if not isinstance(pruning_config, CAPConfig):
        raise TypeError(
            f"pruning_config must be a CAPConfig or a dictionary of its fields, got "
            f"{type(pruning_config).__name__}"
        )
    if kwargs.get("quantization_config") is not None:
        raise ValueError(
            "pruning_config and quantization_config cannot be combined: prune first, save with "
            "checkpoint_format='dense', and quantize the saved model when loading it"
        )
    if kwargs.get("gguf_file") is not None:
        raise ValueError(
            "pruning_config and gguf_file cannot be combined: load the model with "
            "quantization_config=GgufConfig(dequantize=True), then call "
            "CAPPruner(config).prune(model, tokenizer)"
        )
    kwargs["quantization_config"] = pruning_config


def _check_no_adapter(name: Any, hub: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Check that no PEFT adapter would be loaded onto the pruned model.

    Saving would then write only the adapter, which would be loaded on the dense base model.

    Args:
        name: Name or path of the checkpoint.
        hub: Keywords that select the files on the Hub.
        kwargs: Keywords of `from_pretrained`.

    Raises:
        ValueError: `name` is or contains an adapter.
    """
    if name is None or not is_peft_available():  # then transformers loads no adapter either
        return
    adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")  # from AutoModel
    if adapter is None and find_adapter_config_file(name, **hub) is not None:
        adapter = name
    if adapter is not None:
        raise ValueError(
            f"{os.fspath(adapter)} has a PEFT adapter, which would not be saved with the pruned "
            "model: merge it first (AutoPeftModelForCausalLM.from_pretrained(...)"
            ".merge_and_unload().save_pretrained(folder)), and prune the merged model"
        )


def _check_not_pruned(
    name: Any, hub: dict[str, Any], kwargs: dict[str, Any], by_keyword: bool
) -> None:
    """Check that the checkpoint is dense if pruning is requested.

    Programs such as lm-eval read `quantization_config` from `config.json` and pass it back. This
    is not a request to prune, so a config equal to the checkpoint's is dropped.

    Args:
        name: Name or path of the checkpoint.
        hub: Keywords that select the files on the Hub.
        kwargs: Keywords of `from_pretrained`, with a `CAPConfig` as `quantization_config`.
        by_keyword: Whether the caller passed it as `pruning_config`.

    Raises:
        ValueError: The checkpoint is already pruned.
    """
    values, _ = PreTrainedConfig.get_config_dict(name, **hub)
    if (pruned := values.get("pruning_config")) is None:
        return
    saved = values.get("quantization_config")
    passed = kwargs["quantization_config"].to_dict()
    if not by_keyword and saved is not None and passed == CAPConfig.from_dict(saved).to_dict():
        del kwargs["quantization_config"]
        return
    raise ValueError(
        f"{name} is already pruned to sparsity {pruned.get('sparsity')}: load it without "
        "pruning_config, or prune its dense base model instead (CAPPruner prunes a loaded "
        "model further)"
    )
