"""Resource usage: wall-clock time, CPU time, and peak memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass
class Usage:
    """The resource usage of a piece of work.

    Attributes:
        seconds: Wall-clock time.
        cpu_seconds: CPU time of all threads of this process.
        peak_memory: Peak resident memory of this process in bytes, for any use; `None` on systems
            other than Linux.
        peak_gpu_memory: Most bytes that torch has allocated on a single GPU; `None` without a GPU.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory: int | None = None
    peak_gpu_memory: int | None = None

    def __add__(self, other: "Usage") -> "Usage":
        """Return the usage of two pieces of work in sequence."""
        return Usage(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            _larger(self.peak_memory, other.peak_memory),
            _larger(self.peak_gpu_memory, other.peak_gpu_memory),
        )


def _larger(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else max(first, second)


@contextmanager
def usage_of_block() -> Iterator[Usage]:
    """Measure the usage of a block; the yielded object has the values after the block ends."""
    usage = Usage()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    can_reset = _reset_peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    yield usage
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    usage.seconds = time.perf_counter() - start
    usage.cpu_seconds = time.process_time() - cpu_start
    usage.peak_memory = _peak() if can_reset else None
    usage.peak_gpu_memory = max(
        (torch.cuda.max_memory_allocated(gpu) for gpu in gpus), default=None
    )


def _reset_peak() -> bool:
    """Reset the peak of resident memory; return whether the system supports it.

    See `clear_refs` in https://docs.kernel.org/filesystems/proc.html.
    """
    with suppress(OSError):
        _RESET.write_text("5")
        return _peak() is not None
    return False


def _peak() -> int | None:
    """Return the peak of resident memory in bytes."""
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None
