"""The argument `pruning_config` of transformers' `pipeline`.

This module is imported after `transformers.pipelines` is loaded, and must not import it earlier.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import transformers


def register() -> None:
    """Add the argument `pruning_config` to `pipeline`. Idempotent."""
    from transformers import pipelines

    stock = pipelines.pipeline
    if hasattr(stock, "__wrapped__"):
        return
    pipelines.pipeline = wrap_pipeline(stock)
    if transformers.__dict__.get("pipeline") is stock:  # it was already imported from there
        transformers.pipeline = pipelines.pipeline
    pipelines.Pipeline.__init__ = wrap_init(pipelines.Pipeline.__init__)


def wrap_pipeline(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `pipeline`, which would drop `pruning_config` and run the dense model.

    The wrapper moves it to `model_kwargs`, the arguments of `from_pretrained`.
    """

    @functools.wraps(stock)
    def pipeline(task: Any = None, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        model_kwargs = dict(kwargs.get("model_kwargs") or {})
        if "pruning_config" in kwargs:
            model_kwargs["pruning_config"] = kwargs.pop("pruning_config")
            kwargs["model_kwargs"] = model_kwargs
        loads_model = model is None or isinstance(model, str | os.PathLike)
        if model_kwargs.get("pruning_config") is not None and not loads_model:
            raise ValueError(
                f"pruning_config prunes a model that pipeline loads by name, got a loaded "
                f"{type(model).__name__}: prune it first with CAPPruner(config).prune(model, "
                "tokenizer)"
            )
        return stock(task, model, *args, **kwargs)

    return pipeline


def wrap_init(stock: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Pipeline.__init__`, for code that imported `pipeline` before this package."""

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("pruning_config") is not None:
            raise TypeError(
                "this pipeline takes no pruning_config: import optimum_cap before you import "
                "pipeline from transformers, or pass model_kwargs={'pruning_config': config}"
            )
        stock(self, *args, **kwargs)

    return init
