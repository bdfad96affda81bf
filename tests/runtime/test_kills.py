"""The campaign of killed runs, in short."""

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks its processes")
def test_killed_runs_resume_to_the_same_bytes() -> None:
    script = ROOT / "benchmarks" / "kills.py"
    result = subprocess.run(
        [sys.executable, script, "--kills", "16"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" 2 kills, resumed to the end") == 8
    assert result.stdout.count(" 0 faults") == 8
