"""Multiple processes, memory limits, resuming interrupted runs, digests and atomic files."""

from optimum_cap.runtime.digests import VERSIONED, digest_of, examples_digest, machine, model_digest
from optimum_cap.runtime.distributed import (
    ALONE,
    LANES,
    ProcessGroup,
    check_same_inputs,
    lane_of,
)
from optimum_cap.runtime.files import (
    JsonFiles,
    TensorFiles,
    sync,
    was_left_behind,
    write_atomically,
)
from optimum_cap.runtime.memory import (
    MemoryLimit,
    budget_bytes,
    each_in_memory,
    halves,
    is_out_of_memory,
    keep_freed_memory,
)
from optimum_cap.runtime.resume import default_folder, resume_hint_on_stop
from optimum_cap.runtime.usage import Usage, usage_of_block

__all__ = [
    "ALONE",
    "LANES",
    "VERSIONED",
    "JsonFiles",
    "MemoryLimit",
    "ProcessGroup",
    "TensorFiles",
    "Usage",
    "budget_bytes",
    "check_same_inputs",
    "default_folder",
    "digest_of",
    "each_in_memory",
    "examples_digest",
    "halves",
    "is_out_of_memory",
    "keep_freed_memory",
    "lane_of",
    "machine",
    "model_digest",
    "resume_hint_on_stop",
    "sync",
    "usage_of_block",
    "was_left_behind",
    "write_atomically",
]
