"""The structure of the tests: folders as in the package, helpers in one place."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.paths import ROOT, TESTS

MODULES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py"))


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield each part of the dotted name of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_no_module_imports_a_test_module(module: Path) -> None:
    test_modules = {path.stem for path in MODULES if path.name.startswith("test_")} | {"conftest"}
    imported = set(imported_names(ast.parse((TESTS / module).read_text()))) & test_modules
    assert not imported, (
        f"tests/{module} imports {', '.join(sorted(imported))}: "
        "move what tests share to a module of tests/helpers"
    )


def test_folders_are_those_of_the_package() -> None:
    folders = {module.parts[0] for module in MODULES if len(module.parts) > 1}
    packages = {path.parent.name for path in (ROOT / "optimum_cap").glob("*/__init__.py")}
    assert folders == packages | {"helpers"}


def test_names_of_test_modules_are_unique() -> None:
    """Test folders are no packages, so pytest knows a test module by its name alone."""
    names = Counter(module.name for module in MODULES if module.parts[0] != "helpers")
    assert [name for name, count in names.items() if count > 1] == []
