"""What `memory_budget="auto"` finds, with the limits of containers and jobs."""

import math
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from transformers import PreTrainedModel

from optimum_cap.runtime import memory
from optimum_cap.runtime.memory import budget_bytes, left_to_this_group

GB = 10**9


def write_group(folder: Path, limit: str | int, used: int, inactive: int, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\n")


def test_no_group_limits_nothing(tmp_path: Path) -> None:
    assert left_to_this_group(tmp_path, tmp_path / "missing") == math.inf
    own = tmp_path / "cgroup"
    own.write_text("0::/\n")
    assert left_to_this_group(tmp_path, own) == math.inf
    write_group(tmp_path, "max", 3 * GB, 0)
    assert left_to_this_group(tmp_path, own) == math.inf


def test_the_tightest_group_decides(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("3:cpuset:/elsewhere\n0::/job/step\n")
    write_group(tmp_path / "groups", "max", 9 * GB, 0)
    write_group(tmp_path / "groups" / "job", 8 * GB, 7 * GB, 2 * GB)
    assert left_to_this_group(tmp_path / "groups", own) == 3 * GB
    write_group(tmp_path / "groups" / "job" / "step", 2 * GB, 1 * GB, 0)
    assert left_to_this_group(tmp_path / "groups", own) == 1 * GB
    write_group(tmp_path / "groups" / "job" / "step", 2 * GB, 3 * GB, 0)
    assert left_to_this_group(tmp_path / "groups", own) == 0


def test_groups_of_version_1(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/job\n1:cpu:/\n0::/\n")
    write_group(tmp_path / "memory", 2**63 - 4096, 9 * GB, 0, version=1)
    write_group(tmp_path / "memory" / "job", 4 * GB, 3 * GB, 1 * GB, version=1)
    assert left_to_this_group(tmp_path, own) == 2 * GB


def test_a_group_that_does_not_show_all_is_passed_over(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/job\n")
    write_group(tmp_path, 5 * GB, 1 * GB, 0)
    write_group(tmp_path / "job", 2 * GB, 1 * GB, 0)
    (tmp_path / "job" / "memory.stat").write_text("anon 5\n")
    assert left_to_this_group(tmp_path, own) == 4 * GB
    (tmp_path / "job" / "memory.stat").unlink()
    assert left_to_this_group(tmp_path, own) == 4 * GB


def test_auto_is_half_of_what_is_free_and_allowed(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GB))
    for left, expected in ((math.inf, 4 * GB), (2 * GB, GB)):
        monkeypatch.setattr(memory, "left_to_this_group", lambda left=left: left)
        assert budget_bytes("auto", llama) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert budget_bytes("auto", llama) == GB // 4
    assert budget_bytes("3GB", llama) == 3 * GB
