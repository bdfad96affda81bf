"""Registers the plugin with transformers when transformers loads the modules that need it.

Importing `optimum_cap` calls `register_with_transformers`, and so does torch: at the end of
`import torch` it loads every entry point of the group `torch.backends`
(https://docs.pytorch.org/docs/stable/notes/autoload.html; `TORCH_DEVICE_BACKEND_AUTOLOAD=0`
disables this). transformers has no entry points; through torch's, packed checkpoints load even if
`optimum-cap` is installed but not imported.

This module imports only the standard library, and it never triggers the import of transformers.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def register_with_transformers() -> None:
    """Register with the loaded modules of transformers, and with others once they are loaded.

    Idempotent: a second call changes nothing.
    """
    waiting = {}
    for name, register in _AFTER_LOADING.items():
        module = sys.modules.get(name)
        if module is None:
            waiting[name] = register
        elif getattr(module.__spec__, "_initializing", False):
            # This module is importing torch, which called this function: wait until it is loaded.
            # Private attribute, because importlib has no public way to check that a module is still
            # loading.
            _register_at_first_use(module, register)
        else:
            register()
    if waiting and not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder(waiting))


def _register_quantization_method() -> None:
    from optimum_cap.plugin.quantizer import register

    register()


def _register_keyword() -> None:
    from optimum_cap.plugin.from_pretrained import register

    register()


def _register_pipeline() -> None:
    from optimum_cap.plugin.pipelines import register

    register()


def _register_state_dicts() -> None:
    from optimum_cap.plugin.state_dicts import register

    register()


def _register_adapters() -> None:
    from optimum_cap.plugin.adapters import register

    register()


_AFTER_LOADING: dict[str, Callable[[], None]] = {
    # Contains the registry of quantization methods.
    "transformers.quantizers.auto": _register_quantization_method,
    # Defines PreTrainedModel, which every from_pretrained needs, but `--help` does not.
    "transformers.modeling_utils": _register_keyword,
    "transformers.pipelines": _register_pipeline,
    "accelerate.utils.modeling": _register_state_dicts,
    "peft": _register_adapters,
}


class _RegisteringFinder(importlib.abc.MetaPathFinder):
    """Finds the modules it waits for with their own loaders, and registers once they are loaded."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self._waiting = waiting
        self._finding: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._waiting or fullname in self._finding:
            return None
        self._finding.add(fullname)  # so that the other finders find it
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenRegister(spec.loader, lambda: self._loaded(fullname))
        return spec

    def _loaded(self, fullname: str) -> None:
        # Not when its spec is found, because callers may only check whether a module is installed.
        register = self._waiting.pop(fullname, None)
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        if register is not None:
            register()


class _LoaderThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, register: Callable[[], None]) -> None:
        self._loader = loader
        self._register = register

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # for callers that request a spec without importing

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Restore the original loader, so that later code does not see this one.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._register()


def _register_at_first_use(module: ModuleType, register: Callable[[], None]) -> None:
    """Register when an attribute of `module` is first read after it has been loaded."""
    genuine = type(module)

    class Registering(genuine):  # type: ignore[valid-type, misc]
        def __getattribute__(self, name: str) -> object:
            spec = genuine.__getattribute__(self, "__spec__")
            if not getattr(spec, "_initializing", False):
                module.__class__ = genuine
                register()
            return genuine.__getattribute__(self, name)

    module.__class__ = Registering
