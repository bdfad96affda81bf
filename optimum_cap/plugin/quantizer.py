"""The quantization method `"cap"`: prunes a dense model after loading, or decodes a pruned one.

This module must not import `transformers.modeling_utils`, because it is imported while that module
is being loaded.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import transformers
from packaging.version import Version
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file, logging

from optimum_cap.config import CAPConfig
from optimum_cap.formats import coded, is_coded, unpack
from optimum_cap.plugin.decoding import DenseCopyNeeded
from optimum_cap.version import NEWEST_TRANSFORMERS, __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_cap.checkpoint import PruningRecord

logger = logging.get_logger(__name__)

hub_arguments: ContextVar[dict[str, Any]] = ContextVar("hub_arguments")
"""Arguments of the current `from_pretrained` that select files, also for tokenizer and record."""
parallel_arguments: ContextVar[list[str]] = ContextVar("parallel_arguments")
"""Names of the arguments of the current `from_pretrained` that split matrices over devices."""

_SPLITS_PACKED = "5.23"  # the first release with ConversionOps.supports_many_to_many
_PARAMETER_NAMES = (".weight", ".bias")


def register() -> None:
    """Register the quantization method with transformers. Idempotent."""
    if "cap" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("cap")(CAPConfig)
        register_quantizer("cap")(CAPQuantizer)


@contextmanager
def _explaining_newer_transformers() -> Iterator[None]:
    """Explain errors that may be due to a newer transformers than this package is tested with."""
    try:
        yield
    except (AttributeError, ImportError, KeyError, TypeError) as error:
        if Version(transformers.__version__) <= Version(NEWEST_TRANSFORMERS):
            raise
        raise RuntimeError(
            f"optimum-cap {__version__} failed with transformers {transformers.__version__} "
            f"({type(error).__name__}: {error}), but is tested with transformers up to "
            f"{NEWEST_TRANSFORMERS}: upgrade optimum-cap, or install "
            f"transformers=={NEWEST_TRANSFORMERS}"
        ) from error


class CAPQuantizer(HfQuantizer):
    """Prunes a dense model after loading it, or decodes a checkpoint while loading it.

    In both cases it detaches itself at the end, because a pruned model is an ordinary float model.
    """

    quantization_config: CAPConfig
    serialized_names: ClassVar[dict[str, list[str]]] = {
        "weight": ["weight", "weight_mask", "weight_shape"]
    }

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.errors: list[str] = []
        self.saved: SavedRecord | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the method needs no other packages."""

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> "PreTrainedModel":
        parallel = parallel_arguments.get([])
        if (
            parallel
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
        ):
            if self.pre_quantized:
                raise DenseCopyNeeded
            raise ValueError(
                f"cannot prune a model whose matrices are split over devices "
                f"({', '.join(parallel)}): use one process, save with checkpoint_format='dense', "
                "and load that checkpoint in parallel"
            )
        if self.pre_quantized:
            self.saved = read_saved_record(model.name_or_path)
            if checkpoint_files:
                files = [Path(file) for file in checkpoint_files]
                check_before_loading(model.name_or_path, files, self.saved)
        else:
            _check_head(model, self.quantization_config)
        return model

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": Unpack}

    @_explaining_newer_transformers()
    def update_weight_conversions(
        self, weight_conversions: list[Any], model: "PreTrainedModel"
    ) -> list[Any]:
        """Make weight converters that match whole modules also apply to packed weights.

        transformers adds the unpacking to converters that match `...weight`. A converter that
        matches a module, such as `query_key_value` (the fused projection of sarvam_moe), applies to
        its weight and bias, so a copy that matches only the weight is inserted before it. A
        renaming of a weight to a parameter with another name (the experts of Granite) becomes a
        converter, because only converters can unpack.
        """
        if not self.pre_quantized:
            return super().update_weight_conversions(weight_conversions, model)
        twins = [
            each
            for conversion in weight_conversions
            for each in (
                *_converter_of_weights(conversion),
                _unpacking_renaming(conversion, self) or conversion,
            )
        ]
        try:
            return super().update_weight_conversions(twins, model)
        except ValueError as error:
            if Version(transformers.__version__) >= Version(_SPLITS_PACKED):
                raise
            raise ValueError(
                f"{type(model).__name__} splits matrices while loading, which transformers "
                f"{transformers.__version__} does not support for packed ones: upgrade to "
                f"transformers {_SPLITS_PACKED}, or convert the checkpoint with `optimum-cli cap "
                "convert --format dense`"
            ) from error

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Return the dtype to cast a tensor to while reading.

        Masks, shapes and coded weights keep their dtype: decoded weights are cast.
        """
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, Unpack):
                operation.dtype = dtype
        name = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        return dtype if name.startswith(("F", "BF", "torch.float", "torch.bfloat")) else None

    @_explaining_newer_transformers()
    def postprocess_model(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        """Detach from the model, then prune it or attach its record."""
        if self.errors:
            raise ValueError("; ".join(self.errors))
        # Private attribute, because no public one has the conversions used in loading, which saving
        # reverts. Since 5.24 they are removed together with the quantizer.
        conversions = getattr(model, "_weight_conversions", None)
        self.remove_quantization_config(model)
        from transformers import PreTrainedModel

        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                # Private: transformers' `is_quantized` and `dequantize` leave these attributes.
                module.__dict__.pop("is_quantized", None)
                module.config.__dict__.pop("_is_quantized", None)
                module.config.__dict__.pop("quantization_config", None)
        if self.pre_quantized:
            if conversions is not None:
                model._weight_conversions = _without_unpacking(conversions)
            if self.saved is not None:
                attach_saved_record(model, self.saved)
        else:
            from optimum_cap.pruner import CAPPruner

            config = self.quantization_config
            tokenizer = config.tokenizer or model.name_or_path
            if isinstance(tokenizer, str) and config.method.needs_data:
                tokenizer = _load_tokenizer(
                    tokenizer, type(model).__name__, of_model=not config.tokenizer
                )
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


def _check_head(model: "PreTrainedModel", config: CAPConfig) -> None:
    """Check before loading weights that the model can predict tokens if the config needs it.

    Raises:
        ValueError: It has no LM head, or a randomly initialised one because a classifier was saved;
            or it is not decoder-only.
    """
    from optimum_cap.models import classifier_class, decoder_layer_names, has_lm_head, model_task

    decoder_layer_names(model)
    kind = type(model).__name__
    if not has_lm_head(model):
        config.check_without_lm_head(kind)
        return
    class_name = classifier_class(model.config)
    needs_lm_head = config.method.needs_lm_head or config.answers == "model"
    if class_name is not None and needs_lm_head:
        task = model_task(class_name)
        assert task is not None
        raise ValueError(
            f"{model.name_or_path} is a {class_name}, so {kind} has an LM head of random weights, "
            f"whose predictions say nothing about the model: load it with {task.auto_class}"
        )


def _converter_of_weights(conversion: Any) -> list[Any]:
    """Return a copy, matching only weights, of a converter that matches modules, else nothing."""
    if not isinstance(conversion, WeightConverter):
        return []
    # Private attributes: the public patterns are already processed and would be processed again.
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


def _unpacking_renaming(conversion: Any, quantizer: CAPQuantizer) -> Any:
    """Return a converter that unpacks the weights of a renaming; `None` for other conversions."""
    if not isinstance(conversion, WeightRenaming):
        return None
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    if len(sources) != 1 or not sources[0].endswith(".weight") or targets[0].endswith("weight"):
        return None
    names = [sources[0], f"{sources[0]}_mask", f"{sources[0]}_shape"]
    return WeightConverter(names, targets[0], operations=[UnpackRenamed(quantizer)])


class Unpack(ConversionOps):
    """Loading step that unpacks or decodes weights, before experts are merged.

    Attributes:
        dtype: Dtype of decoded weights; `None` keeps the stored dtype.
    """

    # A packed weight consists of three tensors, and the next step may split it into several
    # weights.
    supports_many_to_many = True

    def __init__(self, hf_quantizer: CAPQuantizer) -> None:
        self.hf_quantizer = hf_quantizer
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Unpack":
        # transformers copies the step for every weight; all copies report to the same quantizer.
        return Unpack(self.hf_quantizer)

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "weight", **kwargs: Any
    ) -> dict[str, Any]:
        """Unpack the weights of every source pattern.

        A list contains one tensor per expert, sorted by name; some experts may be dense and have no
        mask. `check_parts` has checked by name that a weight has a mask only if it has one
        dimension, so masks and shapes, also sorted by name, correspond to these weights in order.
        """
        unpacked: dict[str, Any] = {}
        for pattern, weights in input_dict.items():
            if not pattern.endswith(("weight_mask", "weight_shape")):
                masks = input_dict.get(f"{pattern}_mask", [])
                shapes = input_dict.get(f"{pattern}_shape", [])
                unpacked[pattern] = self._unpack_all(weights, masks, shapes, full_layer_name)
        if list(unpacked) == ["weight"]:
            return {full_layer_name: unpacked["weight"]}
        return unpacked

    def _unpack_all(
        self,
        weights: list[torch.Tensor],
        masks: list[torch.Tensor],
        shapes: list[torch.Tensor],
        name: str,
    ) -> list[torch.Tensor]:
        """Return the weights, decoding those that are coded or packed (one-dimensional)."""
        weights = [self._decode(each, name) if is_coded(each) else each for each in weights]
        if not masks:
            return weights
        packed = [index for index, weight in enumerate(weights) if weight.ndim == 1]
        if not len(packed) == len(masks) == len(shapes):
            self.hf_quantizer.errors.append(
                f"{name} is damaged: {len(packed)} of its matrices have one dimension, as packed "
                f"ones do, but {len(masks)} have a mask: download or copy the checkpoint again"
            )
            for index in packed:  # as in `_unpack`
                weights[index] = weights[index].new_full(shapes[0].tolist(), torch.nan)
            return weights
        for index, mask, shape in zip(packed, masks, shapes, strict=True):
            weights[index] = self._unpack(weights[index], mask, shape, name)
        return weights

    def _unpack(
        self, values: torch.Tensor, mask: torch.Tensor, shape: torch.Tensor, name: str
    ) -> torch.Tensor:
        try:
            return unpack(values, mask, shape, name)
        except ValueError as error:
            # transformers would report an error raised here as a table of tracebacks. Instead,
            # loading continues with NaNs, and `postprocess_model` raises the error.
            self.hf_quantizer.errors.append(str(error))
            return values.new_full(shape.tolist(), torch.nan)

    def _decode(self, stream: torch.Tensor, name: str) -> torch.Tensor:
        try:
            return coded.decode(stream, name).to(self.dtype)
        except ValueError as error:  # as in `_unpack`; the head was checked before loading
            self.hf_quantizer.errors.append(str(error))
            head = coded.read_head(stream, name)
            return torch.full(head.shape, torch.nan, dtype=self.dtype or head.dtype)


class UnpackRenamed(Unpack):
    """Loading step that unpacks a weight whose parameter has a different name."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "UnpackRenamed":
        return UnpackRenamed(self.hf_quantizer)

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "weight", **kwargs: Any
    ) -> dict[str, Any]:
        """Unpack the weight of the only source pattern."""
        [weights] = super().convert(input_dict, full_layer_name, **kwargs).values()
        return {full_layer_name: weights}


def _without_unpacking(conversions: list[Any]) -> list[Any]:
    """Remove unpacking from the conversions that saving reverts, since it saves dense tensors."""
    remaining = []
    for conversion in conversions:
        operations = getattr(conversion, "operations", None)
        if operations and isinstance(operations[0], UnpackRenamed):
            source, *_ = conversion._original_source_patterns
            conversion = WeightRenaming(source, conversion._original_target_patterns[0])
        elif operations and isinstance(operations[0], Unpack):
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
        remaining.append(conversion)
    return remaining


def find_record(name: str, **changes: Any) -> Path | None:
    """Return the pruning record next to the weights of a checkpoint, if it has one.

    Args:
        name: Folder or repository of the checkpoint.
        **changes: Arguments of `cached_file` that override those of the current `from_pretrained`.
    """
    from optimum_cap.checkpoint import RECORD_NAME

    hub = {**hub_arguments.get({}), **changes}
    hub.pop("trust_remote_code", None)
    file = cached_file(name, RECORD_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    return None if file is None else Path(file)


class SavedRecord(NamedTuple):
    """The pruning record of a checkpoint that is being loaded, and its location."""

    folder: Path
    record: "PruningRecord"
    digests: dict[str, Any]
    checkpoint_format: str


def read_saved_record(name: str) -> SavedRecord | None:
    """Read the pruning record next to the weights of a checkpoint, if it has one.

    Args:
        name: Folder or repository of the checkpoint.

    Raises:
        ValueError: The record is damaged, or has a newer version.
    """
    from optimum_cap.checkpoint import read_record

    file = find_record(name)
    if file is None:
        return None
    record, files = read_record(file, name)
    return SavedRecord(file.parent, record, files["digests"], files["checkpoint_format"])


def check_before_loading(name: str, files: list[Path], saved: SavedRecord | None) -> None:
    """Check the files of a packed or coded checkpoint against its record.

    Args:
        name: Folder or repository of the checkpoint.
        files: The files to load.
        saved: Its record, if it has one.

    Raises:
        ValueError: A file is damaged or has changed since the model was saved.
    """
    from optimum_cap.checkpoint import RECORD_NAME, check_loaded, validate_shards

    if saved is not None:
        check_loaded(files, saved.digests, saved.checkpoint_format)
        return
    # A packed or coded checkpoint is self-contained.
    logger.warning(
        f"{name} has no {RECORD_NAME}, so the weights cannot be checked and the model has no "
        "pruning record: download or copy the checkpoint again, unless it was removed on purpose"
    )
    validate_shards([file for file in files if file.suffix == ".safetensors"])


def attach_saved_record(model: "PreTrainedModel", saved: SavedRecord) -> None:
    """Attach the record of the checkpoint `model` was loaded from, so that saving keeps it."""
    from optimum_cap.checkpoint import attach, warn_of_changed_settings

    warn_of_changed_settings(saved.folder, saved.digests)
    attach(model, saved.record, checkpoint=model.name_or_path)


def _load_tokenizer(name: str, class_name: str, of_model: bool) -> Any:
    """Load the tokenizer of the model that is being loaded, or another one by name."""
    from optimum_cap.data import load_tokenizer_of
    from optimum_cap.models import sees_images

    hub = dict(hub_arguments.get({}))
    if not of_model:
        # They locate the model's files.
        hub.pop("revision", None)
        hub.pop("subfolder", None)
    return load_tokenizer_of(name, sees_images(class_name), **hub)
