"""The built wheel holds what it should and works where only the wheel is installed."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# All that a build may need; the tests, examples and benchmarks must not be among what it packs.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "optimum", "optimum_cap", "tests", "examples")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves its traces next to the sources."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "out", cwd=folder)
    (built,) = (folder / "out").glob("*.whl")
    return built


def test_wheel_contains_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "optimum_cap/__init__.py",
        "optimum_cap/py.typed",
        "optimum_cap/commands/prune.py",
        "optimum/commands/register/register_cap.py",
    } <= set(names)
    # optimum is shared by many distributions: a file of ours there would break the others.
    assert [name for name in names if name.startswith("optimum/")] == [
        "optimum/commands/register/register_cap.py"
    ]
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"optimum", "optimum_cap"}


def test_namespace_packages_have_no_init_file() -> None:
    assert not list((ROOT / "optimum").rglob("__init__.py"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    options = ["--disable-pip-version-check", "-q", "--no-deps", "--no-index"]
    run(*pip, "install", *options, wheel, cwd=folder)
    # The dependencies come from the running environment. Its own .pth files, such as that of an
    # editable installation of this package, are not followed from here.
    (own,) = folder.glob("lib/python*/site-packages")
    outer = sysconfig.get_path("purelib")
    (own / "dependencies.pth").write_text(f"{outer}\n")
    return folder


def test_installed_wheel_extends_optimum_cli(environment: Path, tmp_path: Path) -> None:
    python = environment / "bin" / "python"
    found = run(python, "-c", "import optimum_cap; print(optimum_cap.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(environment)
    # The genuine executable, run by the new environment's interpreter.
    cli = Path(sysconfig.get_path("scripts")) / "optimum-cli"
    text = run(python, cli, "cap", "--help", cwd=tmp_path)
    assert all(command in text for command in ("prune", "inspect", "convert", "eval", "compare"))
    where = "import optimum_cap.commands.cap as c; print(c.__file__)"
    assert Path(run(python, "-c", where, cwd=tmp_path).strip()).is_relative_to(environment)


@pytest.mark.slow
def test_installed_wheel_prunes_and_loads(environment: Path, tmp_path: Path) -> None:
    done = run(environment / "bin" / "python", ROOT / ".ci" / "wheel_smoke.py", cwd=tmp_path)
    assert str(environment) in done
