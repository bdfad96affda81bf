"""PEFT adapters that are trained on a pruned model record it, not its dense base model.

This module is imported when `peft` has been loaded, and must not import it before.
"""

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel


def register() -> None:
    """Make `PeftModel.save_pretrained` record pruned base models. Idempotent."""
    from peft import PeftModel

    if not hasattr(PeftModel.save_pretrained, "__wrapped__"):
        wrapped = wrap_save_pretrained(PeftModel.save_pretrained)
        PeftModel.save_pretrained = wrapped  # type: ignore[method-assign]


def wrap_save_pretrained(stock: Callable[..., None]) -> Callable[..., None]:
    """Wrap `PeftModel.save_pretrained`; models that were not pruned are saved as before."""

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
