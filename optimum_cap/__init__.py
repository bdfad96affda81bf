"""Causal Attribution Pruning (CAP) for transformers models.

Importing this package adds the keyword `pruning_config` to `from_pretrained` and registers the
quantization method `"cap"`. It imports neither torch nor transformers: the registration waits until
transformers loads its modelling code, so that `optimum-cli --help` stays fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from optimum_cap.plugin.registration import register_with_transformers
from optimum_cap.version import __version__

if TYPE_CHECKING:
    from optimum_cap import evaluation as evaluation
    from optimum_cap.config import CAPConfig
    from optimum_cap.models import register_layout
    from optimum_cap.pruner import CAPPruner
    from optimum_cap.pruning import compact

__all__ = ["CAPConfig", "CAPPruner", "__version__", "compact", "register_layout"]

register_with_transformers()


def __getattr__(name: str) -> Any:
    # Imported lazily, because each of them imports transformers and torch.
    if name == "CAPConfig":
        from optimum_cap.config import CAPConfig

        return CAPConfig
    if name == "CAPPruner":
        from optimum_cap.pruner import CAPPruner

        return CAPPruner
    if name == "compact":
        from optimum_cap.pruning import compact

        return compact
    if name == "register_layout":
        from optimum_cap.models import register_layout

        return register_layout
    if name == "evaluation":
        return importlib.import_module("optimum_cap.evaluation")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
