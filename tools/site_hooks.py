"""Hooks of the documentation site: pages from outside docs/, links to there, and the flags.

mkdocs calls the functions `on_...` (`hooks` in mkdocs.yml). The pages are written for GitHub; these
functions change what the site needs otherwise:

- CONTRIBUTING.md and CHANGELOG.md become pages.
- Links that leave docs/ lead to such a page, or to the file on GitHub.
- A comment `<!-- flags: COMMAND -->` is replaced by the flags of `optimum-cli cap COMMAND`.
- What stands between `<!-- GitHub -->` and `<!-- /GitHub -->` is left out.
- Names of pages in docstrings and help texts become links.
"""

import argparse
import posixpath
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from optimum_cap.commands.cap import CAPCommand

ROOT = Path(__file__).resolve().parents[1]

# File of the repository -> page of the site.
OUTSIDE_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

_FENCE = re.compile(r"^(?P<fence> *```).*?^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")
_GITHUB_ONLY = re.compile(r"<!-- GitHub -->.*?<!-- /GitHub -->\n*", re.DOTALL)
_FLAGS = re.compile(r"^<!-- flags: (?P<command>[\w-]+) -->$", re.MULTILINE)
_NAMED_PAGE = re.compile(r"<code>docs/(?P<page>[\w/]+\.md)</code>")
# What Markdown would read as markup, outside of `code`.
_MARKUP = re.compile(r"(`[^`]*`)|([\\*_<>\[\]{}])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in OUTSIDE_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the flags of the commands into a page, and mend its links."""
    origins = {page_uri: source for source, page_uri in OUTSIDE_PAGES.items()}
    uri = page.file.src_uri
    origin = origins.get(uri, f"docs/{uri}")
    if uri in origins:
        page.edit_url = f"{config.repo_url}/edit/main/{origin}"
    markdown = _GITHUB_ONLY.sub("", markdown)
    markdown = _FLAGS.sub(lambda found: flags(found["command"]), markdown)
    return outside_fences(
        markdown, lambda text: _LINK.sub(lambda link: site_link(link[0], origin, uri), text)
    )


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn names of pages in docstrings, such as `docs/recipe.md`, into links."""

    def link(name: re.Match[str]) -> str:
        file = files.get_file_from_path(name["page"])
        return f'<a href="{file.url_relative_to(page.file)}">{name[0]}</a>' if file else name[0]

    return _NAMED_PAGE.sub(link, html)


def outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    """Apply `change` to everything in a page but its code blocks."""
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def site_link(link: str, origin: str, page: str) -> str:
    """Return a link for the site that leads where a link in the repository leads.

    Args:
        link: A link, such as `../README.md#install`.
        origin: The file that it is in, relative to the repository.
        page: The page made of that file, relative to docs/.
    """
    path, _, anchor = link.partition("#")
    if not path or re.match(r"\w+:", path):
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
    suffix = f"#{anchor}" if anchor else ""
    inside = OUTSIDE_PAGES.get(target, target.removeprefix("docs/"))
    if target in OUTSIDE_PAGES or target.startswith("docs/"):
        return posixpath.relpath(inside, posixpath.dirname(page) or ".") + suffix
    if not (ROOT / target).exists():
        return link  # which mkdocs reports
    kind = "tree" if (ROOT / target).is_dir() else "blob"
    return f"https://github.com/optimum-cap/optimum-cap/{kind}/main/{target}{suffix}"


@cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command, made as `optimum-cli` makes it."""
    top = argparse.ArgumentParser("optimum-cli").add_subparsers()
    return dict(CAPCommand(top).subparsers.choices)


def flags(command: str) -> str:
    """Return usage, arguments and flags of a command as Markdown."""
    if command not in parsers():
        raise PluginError(
            f"there is no command {command!r}, expected one of {', '.join(parsers())}: correct "
            f"the comment <!-- flags: {command} -->"
        )
    parser = parsers()[command]
    formatter = argparse.HelpFormatter(parser.prog, width=96)
    blocks = [f"```text\n{parser.format_usage().removeprefix('usage: ').strip()}\n```"]
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
        ]
        if actions:
            title = (group.title or "flags").replace("positional ", "")
            title = "flags" if title == "options" else title
            blocks.append(f"**{title[:1].upper()}{title[1:]}**")
            if group.description:
                blocks.append(as_text(group.description))
            blocks += [entry(action, formatter) for action in actions]
    examples = [line.strip() for line in (parser.epilog or "").splitlines() if line[:1] == " "]
    if examples:
        blocks.insert(1, "```bash\n" + "\n".join(examples) + "\n```")
    return "\n\n".join(blocks)


def entry(action: argparse.Action, formatter: argparse.HelpFormatter) -> str:
    """Return an argument as an entry of a definition list."""
    metavar = formatter._get_default_metavar_for_optional(action)
    if not action.option_strings:
        names = [formatter._metavar_formatter(action, action.dest)(1)[0]]
    elif action.nargs == 0:
        names = list(action.option_strings)
    else:
        value = formatter._format_args(action, metavar)
        names = [*action.option_strings[:-1], f"{action.option_strings[-1]} {value}"]
    text = as_text(formatter._expand_help(action)) if action.help else ""
    return f"{', '.join(f'`{name}`' for name in names)}\n:   {text or 'No description.'}"


def as_text(help_text: str) -> str:
    """Return a help text as Markdown, in which names of pages are links."""
    text = _MARKUP.sub(lambda found: found[1] or f"\\{found[2]}", help_text)
    return re.sub(
        r"docs/((?:\w|\\_)+)\.md",
        lambda found: f"[{found[0]}](../{found[1].replace(chr(92), '')}.md)",
        text,
    )
