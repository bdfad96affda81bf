"""Training of pruned models that keeps their zeros, with any optimizer and with LoRA.

Ordinary fine-tuning fills the zeros of a pruned model. `KeepSparsity` keeps them with transformers'
`Trainer` and trainers built on it (TRL), `keep_sparsity` in your own training loop.
`SparseLoraConfig` trains adapters that merge into exactly as sparse a model as the base model, and
`merge_and_keep_sparsity` merges any other adapter and drops updates that would fill zeros.
`recover` trains a pruned model for a few minutes to reproduce the dense model's predictions.
"""

import importlib
from typing import TYPE_CHECKING, Any

from optimum_cap.training.sparsity import SparsityKeeper, keep_sparsity

if TYPE_CHECKING:
    from optimum_cap.training.callback import KeepSparsity
    from optimum_cap.training.merging import merge_and_keep_sparsity
    from optimum_cap.training.recovery import check_recovery_settings, recover
    from optimum_cap.training.sparse_lora import SparseLoraConfig, masked_variant

__all__ = [
    "KeepSparsity",
    "SparseLoraConfig",
    "SparsityKeeper",
    "check_recovery_settings",
    "keep_sparsity",
    "masked_variant",
    "merge_and_keep_sparsity",
    "recover",
]

# Imported lazily, because each needs transformers' Trainer, or peft, which is optional.
_MODULES = {
    "KeepSparsity": "callback",
    "SparseLoraConfig": "sparse_lora",
    "check_recovery_settings": "recovery",
    "masked_variant": "sparse_lora",
    "merge_and_keep_sparsity": "merging",
    "recover": "recovery",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
