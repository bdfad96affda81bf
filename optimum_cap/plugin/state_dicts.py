"""Support for accelerate's `load_checkpoint_in_model` and `load_checkpoint_and_dispatch`.

This module is imported after `accelerate.utils.modeling` has been loaded.
"""

import functools
from collections.abc import Callable
from typing import Any


def register() -> None:
    """Wrap accelerate's function for reading a weight file. Idempotent."""
    from accelerate.utils import modeling

    if not hasattr(modeling.load_state_dict, "__wrapped__"):
        modeling.load_state_dict = wrap_load_state_dict(modeling.load_state_dict)


def wrap_load_state_dict(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `load_state_dict(file)`, so that it decodes packed and coded weights."""

    @functools.wraps(stock)
    def load_state_dict(*args: Any, **kwargs: Any) -> Any:
        from optimum_cap.formats import decode_state_dict

        return decode_state_dict(stock(*args, **kwargs))

    return load_state_dict
