"""Links between the pages of the documentation, and to them from code, lead somewhere."""

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

import optimum_cap
from optimum_cap.commands.cap import CAPCommand

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
# Each is about one folder of the package. The folder `checkpoint` exports much that only other
# folders need, and the page `pruning` is about what the package itself exports.
REFERENCES = sorted(
    page
    for page in ROOT.glob("docs/reference/*.md")
    if page.stem not in ("checkpoint", "command_line", "pruning")
)
SOURCES = sorted([*ROOT.glob("optimum_cap/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub derives them from its headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        plain = re.sub(r"\]\([^)]*\)|[`*\[\]]", "", heading)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def check(link: str, page: Path, folder: Path) -> None:
    path, _, anchor = link.partition("#")
    target = (folder / path).resolve() if path else page
    assert target.exists(), f"{page.relative_to(ROOT)} links to {link}, which does not exist"
    if anchor and target.suffix == ".md":
        assert anchor in anchors(target), f"{page.relative_to(ROOT)}: {link} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith(("http", "mailto:")):
            check(link, page, page.parent)


def test_links_from_code() -> None:
    assert SOURCES
    for source in SOURCES:
        for link in re.findall(r"\b(?:docs|examples)/[\w/.-]+\.md(?:#[\w-]+)?", source.read_text()):
            check(link, source, ROOT)


class NavLoader(yaml.SafeLoader):
    """Reads mkdocs.yml without what its tags refer to."""


NavLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def nav_pages(entry: object) -> Iterator[str]:
    """Yield the pages in a part of the navigation."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, list | dict):
        for each in entry.values() if isinstance(entry, dict) else entry:
            yield from nav_pages(each)


def test_every_page_is_in_the_index_and_in_the_navigation() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), NavLoader)["nav"]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert pages
    for page in pages - {"README.md"}:
        assert f"({page})" in index, page
    # The last two are not in docs/: tools/site_hooks.py adds them.
    assert sorted(nav_pages(nav)) == sorted([*pages, "contributing.md", "changelog.md"])


def test_the_reference_has_all_commands() -> None:
    page = (ROOT / "docs" / "reference" / "command_line.md").read_text()
    names = {command.name for command in CAPCommand.SUBCOMMANDS}
    assert set(re.findall(r"^<!-- flags: (.*) -->$", page, re.MULTILINE)) == names
    assert names <= anchors(ROOT / "docs" / "reference" / "command_line.md")


@pytest.mark.parametrize("page", REFERENCES, ids=lambda page: page.stem)
def test_the_reference_has_all_that_a_package_exports(page: Path) -> None:
    """Apart from constants, and from checks that only the commands need."""
    package = importlib.import_module(f"optimum_cap.{page.stem}")
    exported = {
        name
        for name in package.__all__
        if inspect.isclass(getattr(package, name)) or inspect.isfunction(getattr(package, name))
    }
    listed = set(
        re.findall(rf"^::: optimum_cap\.{page.stem}\.(\w+)$", page.read_text(), re.MULTILINE)
    )
    assert listed == {name for name in exported if not name.startswith("check_")}


def test_the_reference_has_all_that_users_import() -> None:
    page = (ROOT / "docs" / "reference" / "pruning.md").read_text()
    listed = set(re.findall(r"^::: optimum_cap\.(\w+)$", page, re.MULTILINE))
    assert listed == set(optimum_cap.__all__) - {"__version__"}
