"""Print the section of CHANGELOG.md of a release, or fail if the tag does not fit.

Usage: python .ci/release_notes.py v0.1.0
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def release_notes(tag: str, version: str, changelog: str) -> str:
    """Return the section of a release.

    Args:
        tag: Tag of the commit, such as `"v0.1.0"`.
        version: `__version__` of the package.
        changelog: Text of `CHANGELOG.md`.

    Raises:
        ValueError: If the tag is not that of the version, or the section is missing, not dated or
            empty.
    """
    if tag != f"v{version}":
        raise ValueError(
            f"the tag {tag!r} is not that of version {version}: tag the commit that sets "
            f"__version__ in optimum_cap/version.py, and name the tag v{version}"
        )
    section = re.search(
        rf"^## \[{re.escape(version)}\] - (.*)\n((?:(?!## \[).*\n?)*)", changelog, re.MULTILINE
    )
    if section is None:
        raise ValueError(f"CHANGELOG.md has no section [{version}]: add one with its changes")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", section[1]):
        raise ValueError(
            f"section [{version}] of CHANGELOG.md is dated {section[1]!r}: write the day of the "
            "release as YYYY-MM-DD"
        )
    if not section[2].strip():
        raise ValueError(f"section [{version}] of CHANGELOG.md is empty: list what has changed")
    return section[2].strip() + "\n"


def main() -> None:
    version = re.search(
        r'^__version__ = "(.+)"$',
        (ROOT / "optimum_cap" / "version.py").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert version is not None
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    try:
        print(release_notes(sys.argv[1], version[1], changelog), end="")
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
