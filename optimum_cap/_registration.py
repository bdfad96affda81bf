"""Registers the plugin with transformers at the moment transformers loads its modelling code."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

# The module that defines `PreTrainedModel`: every `from_pretrained` needs it, `--help` does not.
_TRIGGER = "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Register now if transformers' modelling code is loaded, otherwise as soon as it is.

    Idempotent: a second call changes nothing.
    """
    if _TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


def _register() -> None:
    from optimum_cap.integration import register

    register()


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds only the trigger module, with its own loader, and adds the registration after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        # Removed before anything else: the ordinary finders do the work, and only once.
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenRegister(spec.loader)
        return spec


class _LoaderThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The genuine loader goes back in place: nothing later sees that we were here.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
