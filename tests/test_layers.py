"""The structure of the package: who may import whom, and who may touch private parts of others."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "optimum_cap"

# Lower lines may import only higher ones; folders of one line do not import each other.
LEVELS = (
    ("version", "text", "formats", "methods"),
    ("config",),
    ("data",),
    ("models",),
    ("runtime",),
    ("checkpoint",),
    ("scoring",),
    ("pruning", "evaluation"),
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
