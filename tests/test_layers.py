"""The structure of the package: who may import whom, and who may touch private parts of others."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "optimum_cap"

# Lower lines may import only higher ones; folders of one line do not import each other.
LEVELS = (
    ("version", "text", "progress", "yaml_files", "formats", "methods"),
    ("config",),
    ("data",),
    ("models",),
    ("runtime",),
    ("checkpoint", "scoring"),
    ("pruning", "evaluation"),
    ("generation", "training", "quantization", "publishing"),
    ("pruner",),
    ("plugin", "study"),
    ("estimation",),
    ("commands",),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imports_of(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Yield the path of each import of this package, without the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optimum_cap"):
            path = tuple((node.module or "").split(".")[1:])
            yield from [path] if path else [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("optimum_cap."):
                    yield tuple(alias.name.split(".")[1:])


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_up_and_into_no_other_folder(module: Path) -> None:
    own = module.parts[0].removesuffix(".py")
    if own == "__init__":
        return  # gathers what users import
    for path in imports_of(ast.parse((PACKAGE / module).read_text())):
        if path[0] == own or path[0] not in LEVEL_OF:  # a public name such as __version__
            continue
        assert LEVEL_OF[path[0]] < LEVEL_OF[own], f"{module} imports {'.'.join(path)}, below it"
        assert len(path) == 1, f"{module} imports from inside {path[0]}: {'.'.join(path)}"


def test_every_module_and_folder_has_a_level() -> None:
    tops = {module.parts[0].removesuffix(".py") for module in MODULES}
    assert tops - {"__init__"} == set(LEVEL_OF)
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    assert len(LEVELS) <= 12


# Private attributes and modules of other libraries, each with a comment that says which public way
# is missing.
TOUCH_PRIVATE_PARTS = {
    "models/internals.py",
    "models/experts.py",
    "models/compilation.py",
    "plugin/quantizer.py",
    "plugin/registration.py",
    "training/recovery.py",
    "evaluation/harness.py",
}


def own_names() -> set[str]:
    """Return every name that this package defines or sets as an attribute of its own objects."""
    names = set()
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_parts(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Yield private attributes and modules that are not of this package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value) and name.value not in own:
                yield name.value
        elif isinstance(node, ast.ImportFrom | ast.Import):
            paths = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            paths += [alias.name for alias in node.names]
            yield from (path for path in paths if any(map(is_private, path.split("."))))


def test_private_parts_of_other_libraries_are_touched_in_few_modules() -> None:
    own, found = own_names(), {}
    for module in MODULES:
        if parts := sorted(set(private_parts(ast.parse((PACKAGE / module).read_text()), own))):
            found[module.as_posix()] = parts
    assert set(found) == TOUCH_PRIVATE_PARTS, found
