__version__ = "0.1.0"

NEWEST_TRANSFORMERS = "5.24.0"
"""Newest release of transformers that this version is tested with."""
