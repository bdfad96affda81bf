"""The quantization method `"cap"`: prunes a dense model after loading, unpacks a packed one.

This module must not import `transformers.modeling_utils`: it is loaded while that one is.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file

from optimum_cap.config import CAPConfig
from optimum_cap.version import NEWEST_TRANSFORMERS, __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

hub_arguments: ContextVar[dict[str, Any]] = ContextVar("hub_arguments")
"""Where the running `from_pretrained` takes files from, the tokenizer and the record among them."""
parallel_arguments: ContextVar[list[str]] = ContextVar("parallel_arguments")
"""Names of the arguments of the running `from_pretrained` that split matrices over devices."""

_SPLITS_PACKED = "5.23"  # the first one with ConversionOps.supports_many_to_many
_PARAMETER_NAMES = (".weight", ".bias")


def register() -> None:
    """Register the method with transformers; a second call changes nothing."""
    if "cap" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("cap")(CAPConfig)
        register_quantizer("cap")(CAPQuantizer)


@contextmanager
def _explaining_newer_transformers() -> Iterator[None]:
    """Name the release that works where a newer one than we know lacks something."""
    try:
        yield
    except (AttributeError, ImportError, KeyError, TypeError) as error:
        if Version(transformers.__version__) <= Version(NEWEST_TRANSFORMERS):
            raise
        raise RuntimeError(
            f"optimum-cap {__version__} failed with transformers {transformers.__version__} "
            f"({type(error).__name__}: {error}), which is newer than {NEWEST_TRANSFORMERS}, the "
            "newest release that it is tested with: upgrade optimum-cap, or install "
            f"transformers=={NEWEST_TRANSFORMERS}"
        ) from error


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
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> "PreTrainedModel":
        parallel = parallel_arguments.get([])
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

    @_explaining_newer_transformers()
    def update_weight_conversions(
        self, weight_conversions: list[Any], model: "PreTrainedModel"
    ) -> list[Any]:
        """Let converters of whole modules see packed weights too.

        transformers adds the unpacking to converters of `...weight`. One of `query_key_value` (the
        fused projection of sarvam_moe) means its weight and its bias, so it gets a twin for the
        weight alone, which is asked first.
        """
        if not self.pre_quantized:
            return super().update_weight_conversions(weight_conversions, model)
        twins = [
            each
            for conversion in weight_conversions
            for each in (*_converter_of_weights(conversion), conversion)
        ]
        try:
            return super().update_weight_conversions(twins, model)
        except ValueError as error:
            if Version(transformers.__version__) >= Version(_SPLITS_PACKED):
                raise
            raise ValueError(
                f"{type(model).__name__} splits matrices while it is loaded, and transformers "
                f"{transformers.__version__} cannot do that to packed ones: upgrade to "
                f"transformers {_SPLITS_PACKED}, or convert the checkpoint with `optimum-cli cap "
                "convert --format dense`"
            ) from error

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Cast values while they are read, as for any model; masks and shapes keep their dtype."""
        name = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        return dtype if name.startswith(("F", "BF", "torch.float", "torch.bfloat")) else None

    @_explaining_newer_transformers()
    def postprocess_model(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        """Detach from the model, then prune it or give it its record."""
        if self.errors:
            raise ValueError("; ".join(self.errors))
        # Private, because no public way tells which conversions loading used, and saving reverts
        # them. Since 5.24 they go with the quantizer.
        conversions = getattr(model, "_weight_conversions", None)
        self.remove_quantization_config(model)
        from transformers import PreTrainedModel

        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                # Private: `is_quantized` and `dequantize` of transformers leave this mark behind.
                module.__dict__.pop("is_quantized", None)
                module.config.__dict__.pop("_is_quantized", None)
                module.config.__dict__.pop("quantization_config", None)
        if self.pre_quantized:
            if conversions is not None:
                model._weight_conversions = _without_unpacking(conversions)
            attach_saved_record(model)
        else:
            from optimum_cap.pruner import CAPPruner

            config = self.quantization_config
            tokenizer = config.tokenizer or model.name_or_path
            if isinstance(tokenizer, str) and config.method.needs_data:
                tokenizer = _load_tokenizer(tokenizer)
            commit = getattr(hub_arguments.get({}).get("revision"), "resolved", None)
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


def _converter_of_weights(conversion: Any) -> list[Any]:
    """Return the twin, for weights alone, of a converter that names modules; nothing of others."""
    if not isinstance(conversion, WeightConverter):
        return []
    # Private: the public patterns are those after processing, which `copy` would process again.
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    names_modules = all(
        re.search(r"\w$", name) and not name.endswith(_PARAMETER_NAMES)
        for name in sources + targets
    )
    if not names_modules:
        return []
    return [
        conversion.copy(
            [f"{source}.weight" for source in sources],
            [f"{target}.weight" for target in targets],
            operations=list(conversion.operations),
        )
    ]


class Unpack(ConversionOps):
    """Loading step that puts packed weights together, before experts are merged."""

    # One packed weight is three tensors, and the next step may split it into several weights.
    supports_many_to_many = True

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


def _without_unpacking(conversions: list[Any]) -> list[Any]:
    """Take the unpacking out of the conversions that saving reverts: it saves dense tensors."""
    kept = []
    for conversion in conversions:
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
    return kept


def attach_saved_record(model: "PreTrainedModel") -> None:
    """Attach the record that lies beside the weights, so that saving again keeps it."""
    from optimum_cap.checkpoint import RECORD_NAME, attach, read_record

    hub = dict(hub_arguments.get({}))
    hub.pop("trust_remote_code", None)
    file = cached_file(
        model.name_or_path, RECORD_NAME, _raise_exceptions_for_missing_entries=False, **hub
    )
    if file is not None:
        attach(model, read_record(Path(file), model.name_or_path)[0])


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **hub_arguments.get({}))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer could be loaded from {name!r}, and calibration needs one: pass "
            "CAPConfig(tokenizer=...)"
        ) from error
