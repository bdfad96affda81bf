"""The notebooks, run from top to bottom, each in a process of its own."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import EXAMPLES, ROOT

NEEDS = {"fine_tune": "peft", "prune": "optimum_cap", "quantize": "torchao"}
PRINTS = {"fine_tune": "50.00% zeros", "prune": "80.00% zeros", "quantize": "50.00% zeros"}
# What a notebook shows, where IPython is not installed.
DISPLAY = "SVG = Markdown = str\ndisplay = print\n"
BLOB = "github.com/optimum-cap/optimum-cap/blob/main/examples/notebooks"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


def cells(file: Path) -> list[str]:
    """Return the code of each cell."""
    notebook = json.loads(file.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_each_notebook_is_known() -> None:
    assert {file.stem for file in NOTEBOOKS} == set(NEEDS)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_opened_by_its_badges_and_names_no_folder(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    path = f"{BLOB}/{file.name}"
    for page in (text, (EXAMPLES / "README.md").read_text(encoding="utf-8")):
        assert f"https://colab.research.google.com/{path.replace('.com/', '/', 1)}" in page
        assert f"https://kaggle.com/kernels/welcome?src=https://{path}" in page
    assert not re.search(r"/(root|home|work|Users)/", text)


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_from_top_to_bottom(file: Path, tmp_path: Path) -> None:
    package = NEEDS[file.stem]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "code.py").write_text("\n\n".join(cells(file)))
    (tmp_path / "IPython").mkdir()
    (tmp_path / "IPython" / "__init__.py").touch()
    (tmp_path / "IPython" / "display.py").write_text(DISPLAY)
    done = subprocess.run(
        [sys.executable, "code.py"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert PRINTS[file.stem] in done.stdout
