"""The notebooks, run from top to bottom, each in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import EXAMPLES, ROOT

NEEDS = {"fine_tune": "peft", "quantize": "torchao"}
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


def cells(file: Path) -> list[str]:
    """Return the code of each cell."""
    notebook = json.loads(file.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_each_notebook_is_known() -> None:
    assert {file.stem for file in NOTEBOOKS} == set(NEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_from_top_to_bottom(file: Path, tmp_path: Path) -> None:
    package = NEEDS[file.stem]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "code.py").write_text("\n\n".join(cells(file)))
    done = subprocess.run(
        [sys.executable, "code.py"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "50.00% zeros" in done.stdout
