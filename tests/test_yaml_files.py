"""Files of settings in YAML."""

from pathlib import Path
from typing import Any

import pytest

from optimum_cap.yaml_files import read_yaml


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a: 2:4\nb: 1e-4\nc: 012\nd: 0x1F\ne: 0o17\nf: -.5\ng: 5.", None),
        ("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}),
        # A merged mapping is merged again before it is read itself.
        (
            "a: &a {x: 1}\nb: [[&b {<<: *a, x: 2}]]\nc: {<<: *b}",
            {"a": {"x": 1}, "b": [[{"x": 2}]], "c": {"x": 2}},
        ),
    ],
)
def test_numbers_and_merged_keys(tmp_path: Path, text: str, values: dict[str, Any] | None) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    numbers = {"a": "2:4", "b": 1e-4, "c": 12, "d": 31, "e": 15, "f": -0.5, "g": 5.0}
    assert read_yaml(file, "file") == (values or numbers)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "b: {a: 1, a: 2}",
        "? [1]\n: 2",
        "a: 2024-13-01",
        "a: !!int x",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: " + "[" * 3000,
    ],
)
def test_what_cannot_be_read_names_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"file\.yaml is not valid YAML"):
        read_yaml(file, "file")


def test_a_file_with_names_and_values_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("# sparsity: 0.5")
    with pytest.raises(ValueError, match="got nothing: write lines `name: value`"):
        read_yaml(file, "settings file")
    with pytest.raises(ValueError, match=r"the settings file .* is a folder: name a file"):
        read_yaml(tmp_path, "settings file")
    with pytest.raises(FileNotFoundError, match=r"the study file .* does not exist"):
        read_yaml(tmp_path / "none.yaml", "study file")
