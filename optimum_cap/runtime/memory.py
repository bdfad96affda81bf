"""Measures free memory, and continues with smaller batches when it runs out."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.config import parse_size
from optimum_cap.data import Batch
from optimum_cap.models import device_of
from optimum_cap.runtime.distributed import processes_here

logger = logging.get_logger(__name__)

_Result = TypeVar("_Result")
# By controller: folder, limit file, usage file, name of the reclaimable part.
_CONTROL_GROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}
_LARGEST_KEPT = 32 * 2**20 - 2**16  # leaves space for the header of the block
# Errors that accelerate does not recognise, from CUDA and cuBLAS outside torch's allocator and C++.
_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")


def budget_bytes(memory_budget: int | str, model: PreTrainedModel) -> int:
    """Return the memory budget for activations in bytes; `"auto"` is half of the free memory.

    For a model on several GPUs, the one with the least free memory counts.
    """
    if memory_budget != "auto":
        return parse_size(memory_budget, "memory_budget")
    devices = {device_of(model), *(parameter.device for parameter in model.parameters())}
    if gpus := [device for device in devices if device.type == "cuda"]:
        return min(map(_free_on, gpus)) // 2
    free = min(psutil.virtual_memory().available, left_to_this_group())
    return int(free) // 2 // processes_here()


def _free_on(device: torch.device) -> int:
    """Return the free bytes of a GPU, including those that torch has reserved for new tensors."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def left_to_this_group(
    groups: Path = Path("/sys/fs/cgroup"), memberships: Path = Path("/proc/self/cgroup")
) -> float:
    """Return the bytes left by the control groups of this process (its container or job).

    See https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files, and for version 1
    https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.

    Args:
        groups: Folder where the groups are mounted.
        memberships: File that lists the groups of this process.

    Returns:
        The bytes; infinity if there is no limit.
    """
    left = math.inf
    for line in memberships.read_text().splitlines() if memberships.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if (version := _CONTROL_GROUPS.get(controllers)) is None:
            continue
        mount, limit, used, inactive = version
        root = groups / mount
        folder = root / name.strip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                # Not all systems have all files; without them, only a limit is missed.
                with suppress(OSError, KeyError, ValueError):
                    left = min(left, _left_to(group, limit, used, inactive))
    return left


def _left_to(group: Path, limit: str, used: str, inactive: str) -> float:
    allowed = (group / limit).read_text().strip()
    if allowed == "max":
        return math.inf
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    # The kernel frees inactive pages of files on demand.
    taken = int((group / used).read_text()) - int(stat[inactive])
    return max(0, int(allowed) - taken)


@dataclass
class MemoryLimit:
    """How much fits into memory, determined by running out of it.

    Attributes:
        tokens: Number of tokens of masked streams per step; `None` until memory runs out.
    """

    tokens: int | None = None


def each_in_memory(
    batches: Iterable[Batch], compute: Callable[[Batch], _Result]
) -> Iterator[tuple[Batch, _Result]]:
    """Yield batches with their results, halving the remaining batches when memory runs out."""
    remaining = deque(batches)
    while remaining:
        batch = remaining.popleft()
        try:
            result = compute(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch.positions) == 1 or not is_out_of_memory(error):
                raise
        else:
            yield batch, result
            continue
        # After the handler, because the error keeps the tensors of the attempt in memory until it
        # ends.
        logger.warning_once("memory ran out: continuing with smaller batches")
        clear_device_cache(garbage_collection=True)
        remaining = deque(half for large in (batch, *remaining) for half in halves(large))


def halves(batch: Batch) -> list[Batch]:
    """Split a batch into two halves; a batch of a single example stays whole."""
    middle = len(batch.positions) // 2
    return [
        replace(
            batch,
            positions=batch.positions[part],
            input_ids=batch.input_ids[part],
            real=batch.real[part],
            scored=batch.scored[part],
        )
        for part in (slice(middle), slice(middle, None))
        if batch.positions[part]
    ]


def keep_freed_memory() -> None:
    """Make the C library (glibc) keep freed blocks of up to 32 MB for new tensors.

    Blocks above a threshold are returned to the system when freed, and new ones are paged in, which
    took 4 % of the time of a scoring run. The threshold is the largest block below 32 MB that the
    process has freed so far (mallopt(3), M_MMAP_THRESHOLD); it never decreases.
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8, device="cpu")


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that CPU or GPU memory ran out."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    recognised = any(message in str(error) for message in _OUT_OF_MEMORY)
    return isinstance(error, RuntimeError) and (recognised or should_reduce_batch_size(error))
