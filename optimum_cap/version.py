"""Version of this package, the transformers release it is tested with, and how to install it."""

__version__ = "0.1.0"

NEWEST_TRANSFORMERS = "5.24.0"
"""Newest transformers release that this version is tested with."""

_REPOSITORY = "git+https://github.com/optimum-cap/optimum-cap"


def install_command(extra: str | None = None) -> str:
    """Return the pip command that installs this package, with an optional extra such as `"eval"`.

    The package is not on a package index, so the requirement names the repository.
    """
    name = f"optimum-cap[{extra}]" if extra else "optimum-cap"
    return f'pip install "{name} @ {_REPOSITORY}"'
