"""Bring the tables of a page up to date: each follows a comment with the script that prints it.

    python examples/studies/refresh.py docs/quality.md

A comment is a line such as `<!-- table: means.py runs/ablation/results.csv 0.7 -->`, with a script
of this folder; the table is all lines that begin with `|` after it. A table that would lose lines,
of a study that has not ended, say, leaves the page as it is.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

_TABLE = re.compile(r"^(<!-- table: (.+) -->\n\n)((?:\|.*\n)*)", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page

    def printed(match: re.Match[str]) -> str:
        script, *arguments = shlex.split(match[2])
        command = [sys.executable, str(Path(__file__).parent / script), *arguments]
        table = subprocess.run(command, check=True, text=True, capture_output=True).stdout
        if (new := table.count("\n")) < (old := match[3].count("\n")):
            parser.error(
                f"{match[2]} prints {new} lines, {page} has {old}: end the study, or delete the "
                "table first"
            )
        return match[1] + table

    text, tables = _TABLE.subn(printed, page.read_text(encoding="utf-8"))
    if not tables:
        parser.error(f"{page} has no comment such as <!-- table: means.py RESULTS 0.7 -->")
    page.write_text(text, encoding="utf-8")
    print(f"{tables} tables of {page} brought up to date")


if __name__ == "__main__":
    main()
