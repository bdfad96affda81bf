"""How losses are measured: the settings that all estimators share."""

from dataclasses import dataclass

from optimum_cap.runtime import ALONE, MemoryLimit, ProcessGroup
from optimum_cap.scoring.cache import ScoreCache


@dataclass(frozen=True)
class ScoringSettings:
    """Settings of how losses are measured. None of them changes the result beyond rounding.

    Attributes:
        memory_budget: Bytes for activations, text such as `"4GB"`, or `"auto"` for half of the free
            memory.
        cache: Stores finished chunks and the memory budget of this model, so that an interrupted
            run resumes and gives the same bytes as an uninterrupted one. Estimates from one
            backward pass store only the budget.
        torch_compile: Compile the decoder layers, which saves time in long runs on a GPU
            (`docs/performance.md`). A resumed run then agrees with an uninterrupted one up to
            rounding.
        process_group: The processes that share the work. All of them must measure the same losses,
            and each gets all of them.
        memory_limit: The limit that earlier runs over this model found; the run updates it. `None`
            starts without one.
    """

    memory_budget: int | str = "auto"
    cache: ScoreCache | None = None
    torch_compile: bool = False
    process_group: ProcessGroup = ALONE
    memory_limit: MemoryLimit | None = None
