"""How much memory there is, and what to do when it runs out."""

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

_Found = TypeVar("_Found")
# By their controllers: folder, files of the limit and of what is used, and what of it can be freed.
_CONTROL_GROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}
_LARGEST_KEPT = 32 * 2**20 - 2**16  # with room for what the allocator adds to a block
# What accelerate does not know: CUDA and cuBLAS outside of the allocator of torch, and C++.
_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")


def budget_bytes(memory_budget: int | str, model: PreTrainedModel) -> int:
    """Return the bytes that activations may take; `"auto"` is half of what is free now.

    Of a model on several GPUs, on the one with the least.
    """
    if memory_budget != "auto":
        return parse_size(memory_budget, "memory_budget")
    devices = {device_of(model), *(parameter.device for parameter in model.parameters())}
    if gpus := [device for device in devices if device.type == "cuda"]:
        return min(map(_free_on, gpus)) // 2
    free = min(psutil.virtual_memory().available, left_to_this_group())
    return int(free) // 2 // processes_here()


def _free_on(device: torch.device) -> int:
    """Free bytes of a GPU, with what torch keeps of it for new tensors."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def left_to_this_group(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """Bytes that the control groups of this process (a container, a job) leave to it.

    See https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files, and of version 1
    https://docs.kernel.org/admin-guide/cgroup-v1/memory.html. Infinity where nothing limits it.

    Args:
        groups: Where the groups are mounted.
        own: The file that says which ones this process is in.
    """
    left = math.inf
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if (version := _CONTROL_GROUPS.get(controllers)) is None:
            continue
        mount, limit, used, inactive = version
        root = groups / mount
        folder = root / name.strip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                # Not all systems show all files, and this is advice.
                with suppress(OSError, KeyError, ValueError):
                    left = min(left, _left_to(group, limit, used, inactive))
    return left


def _left_to(group: Path, limit: str, used: str, inactive: str) -> float:
    allowed = (group / limit).read_text().strip()
    if allowed == "max":
        return math.inf
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    # Pages of files that nobody needs go when others are wanted.
    taken = int((group / used).read_text()) - int(stat[inactive])
    return max(0, int(allowed) - taken)


@dataclass
class MemoryLimit:
    """How much fits into memory, as far as is known.

    Attributes:
        tokens: Of the masked streams of one step, once memory ran out with more.
    """

    tokens: int | None = None


def each_in_memory(
    batches: Iterable[Batch], find: Callable[[Batch], _Found]
) -> Iterator[tuple[Batch, _Found]]:
    """Yield batches with what is found for each; once memory runs out, the rest in halves."""
    left = deque(batches)
    while left:
        batch = left.popleft()
        try:
            found = find(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch.positions) == 1 or not is_out_of_memory(error):
                raise
        else:
            yield batch, found
            continue
        # Out of the handler, which would keep what the failed attempt held.
        logger.warning_once("memory ran out: the rest is done in smaller batches")
        clear_device_cache(garbage_collection=True)
        left = deque(half for large in (batch, *left) for half in halves(large))


def halves(batch: Batch) -> list[Batch]:
    """Cut a batch into two; one of a single example stays whole."""
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
    """Have the C library (glibc) keep freed blocks of up to 32 MB for the next tensors.

    Blocks above a threshold go back to the system when they are freed, and new ones are paged in,
    which took 4 % of a scoring in a trial. The threshold is the largest block below 32 MB that the
    process has freed so far (mallopt(3), M_MMAP_THRESHOLD), and stays that for good.
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8, device="cpu")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on the CPU or on the GPU."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    said = any(words in str(error) for words in _OUT_OF_MEMORY)
    return isinstance(error, RuntimeError) and (said or should_reduce_batch_size(error))
