"""Where things are."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
# Data sets and models beside the repository; tests that need them are skipped where it is missing.
SHARED = ROOT.parent / "shared"
