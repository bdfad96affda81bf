"""Registers the plugin with transformers at the moment transformers loads the code that needs it.

Importing `optimum_cap` calls `register_with_transformers`, and so does torch: it loads every entry
point of the group `torch.backends` at the end of `import torch`
(https://docs.pytorch.org/docs/stable/notes/autoload.html, `TORCH_DEVICE_BACKEND_AUTOLOAD=0` turns
that off). transformers has no entry points of its own, so this is how a packed checkpoint loads
where `optimum-cap` is installed but nobody imported it.

Only the standard library is imported here; transformers is never imported on its own account.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def register_with_transformers() -> None:
    """Register now with what transformers has loaded, and with the rest as soon as it is loaded.

    Idempotent: a second call changes nothing.
    """
    waiting = {}
    for name, register in _AFTER_LOADING.items():
        module = sys.modules.get(name)
        if module is None:
            waiting[name] = register
        elif getattr(module.__spec__, "_initializing", False):
            # torch was imported, and so we were called, by this very module: wait for its end.
            # Private, because importlib tells nobody else that a module is not complete yet.
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


_AFTER_LOADING: dict[str, Callable[[], None]] = {
    # Knows the quantization methods: AutoQuantizationConfig, and from_pretrained.
    "transformers.quantizers.auto": _register_quantization_method,
    # Defines PreTrainedModel: every from_pretrained needs it, `--help` does not.
    "transformers.modeling_utils": _register_keyword,
}


class _RegisteringFinder(importlib.abc.MetaPathFinder):
    """Finds only the modules it waits for, with their own loaders, and registers after them."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self._waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        register = self._waiting.pop(fullname, None)
        if register is None:
            return None
        # The ordinary finders do the work; this one no longer answers for the module.
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenRegister(spec.loader, register)
        if not self._waiting:
            sys.meta_path.remove(self)
        return spec


class _LoaderThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, register: Callable[[], None]) -> None:
        self._loader = loader
        self._register = register

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The genuine loader goes back in place: nothing later sees that we were here.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._register()


def _register_at_first_use(module: ModuleType, register: Callable[[], None]) -> None:
    """Register when an attribute of `module` is first read after the module has been loaded."""
    genuine = type(module)

    class Registering(genuine):  # type: ignore[valid-type, misc]
        def __getattribute__(self, name: str) -> object:
            spec = genuine.__getattribute__(self, "__spec__")
            if not getattr(spec, "_initializing", False):
                module.__class__ = genuine
                register()
            return genuine.__getattribute__(self, name)

    module.__class__ = Registering
