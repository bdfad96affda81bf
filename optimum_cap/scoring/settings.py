"""Settings for measuring losses, shared by all estimators."""

from dataclasses import dataclass

from optimum_cap.runtime import ALONE, MemoryLimit, ProcessGroup
from optimum_cap.scoring.cache import ScoreCache


@dataclass(frozen=True)
class ScoringSettings:
    """Settings for measuring losses. None of them changes the result beyond rounding.

    Attributes:
        memory_budget: Bytes for activations, text such as `"4GB"`, or `"auto"` for half of the free
            memory.
        cache: Stores finished chunks and the memory budget for this model, so that an interrupted
            run resumes with the same bytes as an uninterrupted one. Estimates from one backward
            pass store only the budget.
        torch_compile: Compile the decoder layers, which saves time in long runs on a GPU
            (`docs/performance.md`). A resumed run then agrees with an uninterrupted one up to
            rounding.
        process_group: The processes that share the work. All must measure the same losses, and each
            gets all of them.
        memory_limit: The limit found by earlier runs over this model, updated by this run. `None`
            starts without one.
    """

    memory_budget: int | str = "auto"
    cache: ScoreCache | None = None
    torch_compile: bool = False
    process_group: ProcessGroup = ALONE
    memory_limit: MemoryLimit | None = None
