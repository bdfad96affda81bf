"""What the documentation site makes of links and of the parsers of the commands."""

import argparse
import sys

import pytest
from helpers.paths import ROOT

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytestmark = pytest.mark.slow  # which CI runs with the extra

sys.path.insert(0, str(ROOT / "tools"))  # scripts, no package
import site_hooks  # noqa: E402

REPOSITORY = "https://github.com/optimum-cap/optimum-cap"


@pytest.mark.parametrize(
    ("link", "origin", "expected"),
    [
        ("quality.md#cost", "docs/recipe.md", "quality.md#cost"),
        ("#cost", "docs/quality.md", "#cost"),
        ("https://arxiv.org", "docs/recipe.md", "https://arxiv.org"),
        (
            "../../README.md#results",
            "docs/guides/serve.md",
            f"{REPOSITORY}/blob/main/README.md#results",
        ),
        ("../examples", "docs/recipe.md", f"{REPOSITORY}/tree/main/examples"),
        ("../CONTRIBUTING.md#tests", "docs/README.md", "contributing.md#tests"),
        ("../missing.md", "docs/README.md", "../missing.md"),
        ("docs/concepts.md", "CONTRIBUTING.md", "concepts.md"),
        ("LICENSE", "CONTRIBUTING.md", f"{REPOSITORY}/blob/main/LICENSE"),
    ],
)
def test_links(link: str, origin: str, expected: str) -> None:
    page = site_hooks.OUTSIDE_PAGES.get(origin, origin.removeprefix("docs/"))
    assert site_hooks.site_link(link, origin, page) == expected


def test_code_blocks_keep_their_text() -> None:
    page = "a\n```bash\na\n```\na\n"
    assert site_hooks.outside_fences(page, lambda text: text.upper()) == "A\n```bash\na\n```\nA\n"


def test_flags_stand_in_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    epilog = "examples:\n  optimum-cli cap x DIR\n\ndocumentation: https://x"
    usage = "%(prog)s MODEL [options]"
    parser = argparse.ArgumentParser("optimum-cli cap x", usage=usage, epilog=epilog)
    parser.add_argument("model", help="the model")
    group = parser.add_argument_group("what to prune")
    group.add_argument("-n", "--number", default=4, help="of <MODEL>s (default: %(default)s)")
    group.add_argument("--hidden", help=argparse.SUPPRESS)
    monkeypatch.setattr(site_hooks, "parsers", lambda: {"x": parser})
    assert site_hooks.flags("x") == (
        "```text\noptimum-cli cap x MODEL [options]\n```\n\n"
        "```bash\noptimum-cli cap x DIR\n```\n\n"
        "**Arguments**\n\n`model`\n:   the model\n\n"
        "**What to prune**\n\n`-n`, `--number NUMBER`\n:   of \\<MODEL\\>s (default: 4)"
    )
    with pytest.raises(site_hooks.PluginError, match="no command 'y', expected one of x"):
        site_hooks.flags("y")
