"""Plugs CAP into transformers: the quantization method "cap" and the keyword `pruning_config`."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.hub import resolve_revision

from optimum_cap.config import CAPConfig

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
_hub_arguments: ContextVar[dict[str, Any]] = ContextVar("hub_arguments")
_PARALLEL_ARGUMENTS = ("tp_plan", "tp_size", "distributed_config", "device_mesh")
_parallel: ContextVar[list[str]] = ContextVar("parallel")


def register() -> None:
    """Register with transformers; a second call changes nothing."""
    if "cap" in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config("cap")(CAPConfig)
    register_quantizer("cap")(CAPQuantizer)
    for owner, wrap in (
        (PreTrainedModel, _prunes_and_keeps_the_record),
        (AutoConfig, _hands_on_the_pruning_config),
    ):
        stock = owner.__dict__["from_pretrained"].__func__
        owner.from_pretrained = classmethod(wrap(stock))


def _prunes_and_keeps_the_record(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `PreTrainedModel.from_pretrained`, where the Auto classes end as well.

    It routes `pruning_config` to the native hook, and gives models that are loaded from a dense CAP
    checkpoint, of which the native hook hears nothing, their record.
    """

    @functools.wraps(stock)
    def from_pretrained(
        cls: type[PreTrainedModel], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _route_pruning_config(kwargs)
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
        where = {name: hub[name] for name in _REVISION_ARGUMENTS if name in hub}
        hub["revision"] = resolve_revision(pretrained_model_name_or_path, **where)
        if isinstance(kwargs.get("quantization_config"), CAPConfig):
            _check_not_pruned(pretrained_model_name_or_path, hub)
        if "trust_remote_code" in kwargs:
            hub["trust_remote_code"] = kwargs["trust_remote_code"]
        reset = _hub_arguments.set(hub)
        parallel = [name for name in _PARALLEL_ARGUMENTS if kwargs.get(name) is not None]
        reset_parallel = _parallel.set(parallel)
        try:
            loaded = stock(cls, pretrained_model_name_or_path, *args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            is_pruned = getattr(model, "pruning_record", None) is not None
            # Without a name, the model was made of a config and weights in memory.
            has_files = pretrained_model_name_or_path is not None
            if has_files and getattr(model.config, "pruning_config", None) and not is_pruned:
                _attach_saved_record(model)
            return loaded
        finally:
            _hub_arguments.reset(reset)
            _parallel.reset(reset_parallel)

    return from_pretrained


def _hands_on_the_pruning_config(stock: Callable[..., Any]) -> Callable[..., Any]:
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


def _check_not_pruned(name: Any, hub: dict[str, Any]) -> None:
    values, _ = PreTrainedConfig.get_config_dict(name, **hub)
    if (pruned := values.get("pruning_config")) is not None:
        raise ValueError(
            f"{name} is already pruned to sparsity {pruned.get('sparsity')}: load it without "
            "pruning_config, or prune its dense base model instead (CAPPruner prunes a loaded "
            "model further)"
        )


class CAPQuantizer(HfQuantizer):
    """Prunes after loading a dense model, or unpacks while loading a packed one.

    Either way it detaches itself at the end: a pruned model is an ordinary float model.
    """

    quantization_config: CAPConfig
    serialized_names = {"weight": ["weight", "weight_mask", "weight_shape"]}  # noqa: RUF012

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.errors: list[str] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond this package is needed."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        parallel = _parallel.get([])
        if (
            parallel
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
        ):
            what = "load a packed checkpoint" if self.pre_quantized else "prune a model"
            raise ValueError(
                f"cannot {what} whose matrices are split over devices ({', '.join(parallel)}): do "
                "it on one process, save with checkpoint_format='dense' (or `optimum-cli cap "
                "convert --format dense`), and load that in parallel"
            )
        if self.pre_quantized and checkpoint_files:
            from optimum_cap.checkpoint import validate_shards

            files = [Path(file) for file in checkpoint_files]
            validate_shards([file for file in files if file.suffix == ".safetensors"])
        return model

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": Unpack}

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Cast values while they are read, as for any model; masks and shapes keep their dtype."""
        name = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        return dtype if name.startswith(("F", "BF", "torch.float", "torch.bfloat")) else None

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Detach from the model, then prune it or give it its record."""
        if self.errors:
            raise ValueError("; ".join(self.errors))
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.__dict__.pop("is_quantized", None)
                module.config.__dict__.pop("_is_quantized", None)
                module.config.__dict__.pop("quantization_config", None)
        if self.pre_quantized:
            _forget_unpacking(model)
            _attach_saved_record(model)
        else:
            from optimum_cap.pruner import CAPPruner

            config = self.quantization_config
            tokenizer = config.tokenizer or model.name_or_path
            if isinstance(tokenizer, str) and config.method.needs_data:
                tokenizer = _load_tokenizer(tokenizer)
            commit = getattr(_hub_arguments.get({}).get("revision"), "resolved", None)
            CAPPruner(config).prune(model, tokenizer, base_revision=commit)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class Unpack(ConversionOps):
    """Loading step that puts packed weights together, before experts are merged."""

    def __init__(self, hf_quantizer: CAPQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "Unpack":
        # transformers copies the step for every weight; all report to the one quantizer.
        return Unpack(self.hf_quantizer)

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "weight", **kwargs: Any
    ) -> dict[str, Any]:
        """Unpack the weights of every source; masks and shapes belong to the packed ones in order.

        A list holds one tensor per expert. Among them a dense one has no mask: it is told by its
        two dimensions.
        """
        unpacked: dict[str, Any] = {}
        for pattern, weights in input_dict.items():
            if pattern.endswith(("weight_mask", "weight_shape")):
                continue
            masks = iter(input_dict.get(f"{pattern}_mask", []))
            shapes = iter(input_dict.get(f"{pattern}_shape", []))
            unpacked[pattern] = [
                weight
                if weight.ndim > 1 or (mask := next(masks, None)) is None
                else self._unpack(weight, mask, next(shapes), full_layer_name)
                for weight in weights
            ]
        if list(unpacked) == ["weight"]:
            return {full_layer_name: unpacked["weight"]}
        return unpacked

    def _unpack(
        self, values: torch.Tensor, mask: torch.Tensor, shape: torch.Tensor, name: str
    ) -> torch.Tensor:
        from optimum_cap.formats import unpack

        try:
            return unpack(values, mask, shape, name)
        except ValueError as error:
            # Raised here, it would end in a table of tracebacks. Loading goes on with NaNs, and
            # `postprocess_model` raises it before anybody gets the model.
            self.hf_quantizer.errors.append(str(error))
            return values.new_full(shape.tolist(), torch.nan)


def _forget_unpacking(model: PreTrainedModel) -> None:
    """Take the unpacking out of the conversions that saving reverts: it saves dense tensors."""
    kept = []
    for conversion in model._weight_conversions:
        operations = getattr(conversion, "operations", None)
        if operations and isinstance(operations[0], Unpack):
            if len(operations) == 1:
                continue
            sources = [
                source
                for source in conversion._original_source_patterns
                if not source.endswith(("weight_mask", "weight_shape"))
            ]
            targets = conversion._original_target_patterns
            conversion = WeightConverter.copy(
                conversion, sources, targets, operations=operations[1:]
            )
        kept.append(conversion)
    model._weight_conversions = kept


def _attach_saved_record(model: PreTrainedModel) -> None:
    """Attach the record that lies beside the weights, so that saving again keeps it."""
    from optimum_cap.checkpoint import RECORD_NAME, attach, read_record

    hub = dict(_hub_arguments.get({}))
    hub.pop("trust_remote_code", None)
    file = cached_file(
        model.name_or_path, RECORD_NAME, _raise_exceptions_for_missing_entries=False, **hub
    )
    if file is not None:
        attach(model, read_record(Path(file), model.name_or_path)[0])


def _load_tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, **_hub_arguments.get({}))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer could be loaded from {name!r}, and calibration needs one: pass "
            "CAPConfig(tokenizer=...)"
        ) from error
