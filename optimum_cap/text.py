"""Formatting of sizes, lists, tables and unknown text, and suggestions for wrong names."""

import difflib
import os
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any


def enumeration(words: Sequence[str], conjunction: str = "and") -> str:
    """Return words as an enumeration, such as `"a, b and c"`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def did_you_mean(name: Any, known: Iterable[str], count: int = 1) -> str:
    """Return the end of an error message that suggests up to `count` known names near `name`.

    Returns:
        Text such as `" (did you mean 'wanda'?)"`; empty if no name is close.
    """
    near = difflib.get_close_matches(str(name), sorted(known), count)
    return f" (did you mean {enumeration([repr(each) for each in near], 'or')}?)" if near else ""


def aligned(rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Return rows of cells as a table whose columns are aligned.

    Args:
        rows: The rows, each with the same number of cells.
        left: How many of the first columns are aligned left; the others are aligned right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def labelled(rows: Iterable[tuple[str, str]], width: int = 80) -> str:
    """Return labels with their values, which wrap into their own column beyond `width` columns.

    Args:
        rows: Label and value of each row; an empty label continues the one above.
        width: Number of columns; text without spaces may exceed it.
    """
    lines = []
    for label, value in rows:
        start = f"{label:{_LABEL}} "
        lines += textwrap.wrap(
            value,
            width,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_long_words=False,
            break_on_hyphens=False,
        ) or [start.rstrip()]
    return "\n".join(lines)


_LABEL = 13  # columns


def format_size(size: int) -> str:
    """Return a number of bytes in a readable unit, such as `"12.3 MB"`."""
    if size < 1000:
        return f"{size} bytes"
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def format_duration(seconds: float) -> str:
    """Return a time in seconds in a readable unit, such as `"3.1 min"`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"


def printable(text: str) -> str:
    r"""Return text with its control characters escaped, such as `\x1b`, for one line of output.

    Files may come from untrusted sources, and a terminal would obey control characters in them.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def printable_values(values: Any) -> Any:
    """Return JSON values with the control characters of all strings and keys escaped."""
    if isinstance(values, str):
        return printable(values)
    if isinstance(values, dict):
        return {printable(str(key)): printable_values(value) for key, value in values.items()}
    if isinstance(values, list):
        return [printable_values(value) for value in values]
    return values


def public_name(name_or_path: str) -> str | None:
    """Return a Hub id unchanged, `./name` for any local folder, or `None` for an empty name.

    A folder in the Hub cache gets the id of its repository. Published text must not reveal where
    folders are on this computer.
    """
    if not name_or_path:
        return None
    parts = name_or_path.rstrip("/\\").replace("\\", "/").split("/")
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/", 1)
    is_local = os.path.exists(name_or_path) or len(parts) > 2 or parts[0] in (".", "..", "~")
    if not is_local and not os.path.isabs(name_or_path):
        return name_or_path
    return f"./{os.path.basename(os.path.abspath(name_or_path))}"
