"""PEFT adapters and pruning: adapters record a pruned base model, and are not lost with one.

This module is imported after `peft` has been loaded, and must not import it earlier.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel


def register() -> None:
    """Wrap the functions of PEFT that save and load adapters. Idempotent."""
    from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel
    from peft.config import PeftConfigMixin
    from peft.tuners.lora import LoraLayer

    if hasattr(PeftModel.save_pretrained, "__wrapped__"):
        return
    saving = wrap_save_pretrained(PeftModel.save_pretrained)
    PeftModel.save_pretrained = saving  # type: ignore[method-assign]
    auto_classes: tuple[Any, ...] = (AutoPeftModel, AutoPeftModelForCausalLM)
    for auto_class in auto_classes:
        loading = wrap_from_pretrained(auto_class.from_pretrained.__func__)
        auto_class.from_pretrained = classmethod(loading)
    configs: Any = PeftConfigMixin
    configs.from_peft_type = classmethod(wrap_from_peft_type(configs.from_peft_type.__func__))
    layers: Any = LoraLayer
    layers.resolve_lora_variant = wrap_resolve_lora_variant(LoraLayer.resolve_lora_variant)


def wrap_save_pretrained(stock: Callable[..., None]) -> Callable[..., None]:
    """Wrap `PeftModel.save_pretrained`; models that are not pruned are saved as usual."""

    @functools.wraps(stock)
    def save_pretrained(
        self: "PeftModel", save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        model = self.get_base_model()
        if getattr(model, "pruning_record", None) is not None:
            from optimum_cap.checkpoint import name_base_of_adapters

            name_base_of_adapters(model, self.peft_config.values(), save_directory)
        stock(self, save_directory, *args, **kwargs)

    return save_pretrained


def wrap_from_pretrained(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `from_pretrained` of PEFT's Auto classes, which would prune only the base model.

    Saving would then write only the adapter, which would be loaded on the dense base model.
    """

    @functools.wraps(stock)
    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("pruning_config") is not None:
            raise ValueError(
                f"pruning_config would prune only the base model of the adapter {os.fspath(name)}: "
                "merge it first (load it without pruning_config, then merge_and_unload()), and "
                "prune the merged model with CAPPruner(config).prune(model, tokenizer)"
            )
        return stock(cls, name, *args, **kwargs)

    return from_pretrained


def wrap_from_peft_type(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `from_peft_type`, which creates configs of saved adapters, for `SparseLoraConfig`s.

    Sparse adapters are saved with `peft_type` LORA, so PEFT would create a LoRA config.
    """

    @functools.wraps(stock)
    def from_peft_type(cls: Any, **kwargs: Any) -> Any:
        keep_sparsity = kwargs.pop("keep_sparsity", None)
        config = stock(cls, **kwargs)
        if keep_sparsity is None:
            return config
        from optimum_cap.training import SparseLoraConfig

        names = [each.name for each in dataclasses.fields(config) if each.init]
        values = {name: getattr(config, name) for name in names}
        return SparseLoraConfig(**{**values, "keep_sparsity": keep_sparsity})

    return from_peft_type


def wrap_resolve_lora_variant(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `LoraLayer.resolve_lora_variant`, which chooses the variant of a layer's adapters.

    A layer may have adapters with and without a mask.
    """

    @functools.wraps(stock)
    def resolve_lora_variant(self: Any, *, config: Any, **kwargs: Any) -> Any:
        variant = stock(self, config=config, **kwargs)
        if not getattr(config, "keep_sparsity", False):
            return variant
        from optimum_cap.training import masked_variant

        return masked_variant(self, variant)

    return resolve_lora_variant
