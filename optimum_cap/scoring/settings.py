"""How losses are measured: the settings that all estimators share."""

from dataclasses import dataclass

from optimum_cap.runtime import ALONE, MemoryLimit, ProcessGroup
from optimum_cap.scoring.cache import ScoreCache


@dataclass(frozen=True)
class ScoringSettings:
    """How losses are measured. None of these settings changes what is measured.

    Attributes:
        memory_budget: Bytes for activations, text such as `"4GB"`, or `"auto"` for half of the free
            memory.
        cache: Stores finished chunks and the memory budget of this model, so that an interrupted
            run resumes with the same bytes as one that was not interrupted. Estimates that need one
            backward pass store the budget alone.
        torch_compile: Compile the decoder layers, which saves time in long runs on a GPU
            (`docs/performance.md`). A resumed run then agrees with an undisturbed one up to
            rounding.
        process_group: The processes that share the work. All of them have to measure the same, and
            each gets all losses.
        memory_limit: What earlier runs over this model found out about its memory; the run adds to
            it. `None` starts afresh.
    """

    memory_budget: int | str = "auto"
    cache: ScoreCache | None = None
    torch_compile: bool = False
    process_group: ProcessGroup = ALONE
    memory_limit: MemoryLimit | None = None
