"""The versions of the libraries that a pruning run depends on, for its record."""

import importlib.metadata

_LIBRARIES = ("optimum-cap", "safetensors", "tokenizers", "torch", "transformers")


def versions() -> dict[str, str]:
    """Return the version of each library."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}
