"""Files that no other test reads: workflows, issue forms and the citation."""

import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.paths import ROOT
from packaging.specifiers import SpecifierSet

from optimum_cap.version import __version__

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(GITHUB.glob("ISSUE_TEMPLATE/*_*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = [
    line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)
]


def parsed(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


def python_versions(workflow: dict[str, Any]) -> Iterator[str]:
    """Yield each version of Python that a workflow sets up."""
    for job in workflow["jobs"].values():
        yield from job.get("strategy", {}).get("matrix", {}).get("python", [])
        for step in job["steps"]:
            version = step.get("with", {}).get("python-version", "")
            if version and not version.startswith("${{"):
                yield version


def test_the_expected_files_are_there() -> None:
    names = {file.stem for file in WORKFLOWS}
    assert names == {"ci", "coverage", "docs", "release"}
    assert {file.stem for file in FORMS} == {"bug_report", "feature_request"}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow(file: Path) -> None:
    workflow = parsed(file)
    assert True in workflow  # YAML 1.1 reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}  # jobs ask for more where they need it
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        # Major versions, or the branch that the action's own documentation names.
        assert re.search(r"@(v\d+|release/v1)$", step.get("uses", "@v1")), step
        for script in re.findall(r"\.ci/[\w.]+", step.get("run", "")):
            assert (ROOT / script).is_file(), script
        for extras in re.findall(r"-e '\.\[([\w,]+)\]'", step.get("run", "")):
            assert set(extras.split(",")) <= {*PROJECT["optional-dependencies"], "docs"}
    assert set(python_versions(workflow)) <= set(PYTHONS)


def test_ci_runs_all_checks_on_the_python_of_the_constraints() -> None:
    workflow = parsed(GITHUB / "workflows" / "ci.yml")
    (job,) = (job for job in workflow["jobs"].values() if {"run": ".ci/run"} in job["steps"])
    assert list(python_versions({"jobs": {"job": job}})) == ["3.11"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_the_wheel_is_tested_on_the_oldest_and_the_newest_python() -> None:
    workflow = parsed(GITHUB / "workflows" / "ci.yml")
    assert workflow["jobs"]["wheel"]["strategy"]["matrix"]["python"] == [PYTHONS[0], PYTHONS[-1]]
    allowed = SpecifierSet(PROJECT["requires-python"])
    minors = [int(version.partition(".")[2]) for version in PYTHONS]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert f"3.{minors[0]}.0" in allowed
    assert f"3.{minors[0] - 1}.99" not in allowed


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_an_issue_form(file: Path) -> None:
    """GitHub shows an empty page for a form that lacks one of these."""
    form = parsed(file)
    assert {"name", "description", "body"} <= set(form)
    names = [part["id"] for part in form["body"]]
    assert len(names) == len(set(names))
    for part in form["body"]:
        assert part["type"] in ("input", "textarea", "dropdown", "checkboxes")
        assert part["attributes"]["label"]
        # A block of code cannot be a form's own Markdown.
        assert part["type"] == "textarea" or "render" not in part["attributes"]
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_links_of_the_issue_chooser_lead_to_files() -> None:
    links = [link["url"] for link in parsed(GITHUB / "ISSUE_TEMPLATE/config.yml")["contact_links"]]
    assert links
    for link in links:
        repository, _, path = link.partition("/blob/main/")
        assert repository == PROJECT["urls"]["Repository"]
        assert (ROOT / path).is_file(), path


def test_the_citation_is_of_this_version() -> None:
    citation = parsed(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert str(citation["version"]) == __version__
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    (paper,) = citation["references"]
    assert paper["url"].rpartition("/")[2] in (ROOT / "README.md").read_text(encoding="utf-8")


CHANGELOG = """# Changelog

## [1.1.0] - unreleased

## [1.0.0] - 2026-12-24

### Added

- A thing.

## [0.9.0] - 2026-01-01

- Another thing.
"""


def test_release_notes_are_the_section_of_the_version() -> None:
    release_notes = runpy.run_path(str(ROOT / ".ci" / "release_notes.py"))["release_notes"]
    assert release_notes("v1.0.0", "1.0.0", CHANGELOG) == "### Added\n\n- A thing.\n"
    assert release_notes("v0.9.0", "0.9.0", CHANGELOG) == "- Another thing.\n"
    for tag, version, message in (
        ("v1.0.1", "1.0.0", r"the tag 'v1\.0\.1' is not that of version 1\.0\.0"),
        ("1.0.0", "1.0.0", r"the tag '1\.0\.0' is not .* name the tag v1\.0\.0"),
        ("v1.1.0", "1.1.0", r"\[1\.1\.0\] of CHANGELOG\.md is dated 'unreleased'"),
        ("v2.0.0", "2.0.0", r"CHANGELOG\.md has no section \[2\.0\.0\]"),
        ("v3.0.0", "3.0.0", r"section \[3\.0\.0\] of CHANGELOG\.md is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            release_notes(tag, version, CHANGELOG + "\n## [3.0.0] - 2027-01-01\n")


def test_the_changelog_has_a_section_of_this_version() -> None:
    assert f"\n## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
