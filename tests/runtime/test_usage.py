"""Seconds and memory of a piece of work."""

import sys
import time
from pathlib import Path

import pytest
import torch

from optimum_cap.runtime import usage
from optimum_cap.runtime.usage import Usage, usage_of_block


def test_waiting_takes_no_cpu_time() -> None:
    with usage_of_block() as waiting:
        time.sleep(0.3)
    assert 0.3 <= waiting.seconds < 3
    assert waiting.cpu_seconds < 0.2
    with usage_of_block() as working:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
    assert working.cpu_seconds >= 0.3
    assert working.peak_gpu_memory is None


def peak_with(megabytes: int) -> float:
    """Return the peak in MB of a block that allocates a tensor and frees it again."""
    with usage_of_block() as measured:
        torch.ones(megabytes * 10**6, dtype=torch.uint8)
    assert measured.peak_memory is not None
    return measured.peak_memory / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is measured on Linux")
def test_the_peak_is_that_of_the_block() -> None:
    idle, small, large, after = map(peak_with, (0, 40, 400, 0))
    assert 30 < small - idle < 60
    assert 380 < large - idle < 450
    assert abs(after - idle) < 30


def test_where_the_system_cannot_tell_there_is_no_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "_RESET", tmp_path / "nowhere" / "clear_refs")
    with usage_of_block() as found:
        pass
    assert found.peak_memory is None
    assert found.seconds > 0


def test_usage_adds_up() -> None:
    assert Usage(1, 2, 30, None) + Usage(3, 4, 20, None) == Usage(4, 6, 30, None)
    assert Usage(1, 2, 30, 5) + Usage(3, 4, None, 7) == Usage(4, 6, None, 7)
