"""What the package exports exists, is sorted and is documented."""

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import optimum_cap

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(optimum_cap.__path__, "optimum_cap.")
)


def public_definitions(module: ModuleType) -> dict[str, object]:
    """Return the public functions and classes that `module` itself defines."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }


def test_exports_are_sorted_and_importable() -> None:
    assert optimum_cap.__all__ == sorted(optimum_cap.__all__)
    for name in optimum_cap.__all__:
        assert getattr(optimum_cap, name) is not None
    assert set(optimum_cap.__all__) <= set(dir(optimum_cap))


def test_unknown_export_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'CAPPrunner'"):
        _ = optimum_cap.CAPPrunner


@pytest.mark.parametrize("name", MODULES)
def test_every_module_function_and_class_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__ or name == "optimum_cap.version"
    undocumented = [
        f"{name}.{found}"
        for found, value in public_definitions(module).items()
        # A class inherits no docstring, and a dataclass without one gets its signature instead.
        if not value.__doc__ or value.__doc__.startswith(f"{found}(")
    ]
    assert not undocumented
