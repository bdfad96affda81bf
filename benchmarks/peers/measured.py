"""Seconds and peak memory of a piece of work. Runs in either environment, so it imports little."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def measured(file: Path, device: str = "cpu") -> Iterator[None]:
    """Write what the block took to `file`: seconds, and peak resident bytes of the process.

    The peak counts from here on (Linux), whatever loading the model took before. On a GPU also the
    peak of what torch allocated there.
    """
    if device == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    on_device = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    status = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    file.write_text(
        json.dumps({"seconds": seconds, "peak": int(peak) * 1024, "on_device": on_device})
    )
