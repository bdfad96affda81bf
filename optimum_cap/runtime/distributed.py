"""Several processes work together: each measures a share, and all get all that is measured.

`accelerate launch` or `torchrun` starts them; accelerate sets up torch.distributed, with gloo on
CPUs and nccl on GPUs, and carries what they tell each other. Every process holds the whole model.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import (
    broadcast_object_list,
    gather_object,
    get_int_from_env,
    parse_flag_from_env,
)
from transformers import PreTrainedModel
from transformers.utils import logging

from optimum_cap.data import CalibrationExample
from optimum_cap.runtime.digests import digest_of, examples_digest, sample_digest

T = TypeVar("T")

# A process whose share takes longer lets the others wait, which is no fault; one that dies breaks
# the connection at once.
_PATIENCE = timedelta(hours=6)
# Set by torchrun and accelerate launch, and by what starts MPI programs.
_WORLD_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one run, each with its rank.

    Attributes:
        rank: Of this process; the first one, 0, writes what there is to write.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "ProcessGroup":
        """The processes that were launched together; this one alone if it was not launched so.

        Raises:
            RuntimeError: The program has set up accelerate for a single process.
        """
        launched = get_int_from_env(_WORLD_SIZES, 1)
        if launched == 1:
            return cls()
        # Without a GPU, accelerate connects processes only if it is told to use the CPU.
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
        state = PartialState(cpu=cpu, timeout=_PATIENCE)
        if state.num_processes != launched:
            raise RuntimeError(
                f"{launched} processes were launched, but accelerate was set up for "
                f"{state.num_processes} before: on CPUs, set it up with PartialState(cpu=True)"
            )
        return cls(state.process_index, state.num_processes)

    def broadcast(self, value: T) -> T:
        """Return the value of the first process to all.

        Raises:
            ConnectionError: As `all_gather`.
        """
        if self.size == 1:
            return value
        return self._together(lambda: broadcast_object_list([value])[0])

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, to all.

        Raises:
            ConnectionError: Another process has stopped, or cannot be reached.
        """
        if self.size == 1:
            return [value]
        return self._together(lambda: gather_object([value]))

    def check_consistent(self, digest: Callable[[], str], what: str) -> None:
        """Check that all processes were given the same, by a digest of it.

        Raises:
            ValueError: They were not.
            ConnectionError: As `all_gather`.
        """
        if self.size == 1:
            return
        digests = self.all_gather(digest())
        others = [str(rank) for rank, own in enumerate(digests) if own != digests[0]]
        if others:
            raise ValueError(
                f"process {', '.join(others)} of {self.size} was given another {what} than "
                "process 0: start all of them with the same model, revision and data files"
            )

    def share(self, costs: list[int]) -> list[int]:
        """Return which of the things with these costs are this process's: consecutive ones.

        A thing goes to the process in whose part of the total cost its middle lies.
        """
        total, ends = sum(costs), accumulate(costs)
        ranks = [
            (2 * end - cost) * self.size // (2 * total)
            for end, cost in zip(ends, costs, strict=True)
        ]
        return [index for index, rank in enumerate(ranks) if rank == self.rank]

    def placement(self, device_map: Any) -> Any:
        """Return where to load the model: of several processes, each has a device of its own."""
        return PartialState().device if self.size > 1 and device_map == "auto" else device_map

    def silence_other_ranks(self) -> None:
        """Let only the first process write logs and progress."""
        if self.rank:
            logging.set_verbosity_error()
            logging.disable_progress_bar()

    def shutdown(self) -> None:
        """Close the connections at the end of a program."""
        if self.size > 1:
            PartialState().destroy_process_group()

    def _together(self, exchange: Callable[[], T]) -> T:
        try:
            return exchange()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(
                f"process {self.rank} of {self.size} has lost another one, which stopped or cannot "
                f"be reached ({reason})"
            ) from error


ALONE = ProcessGroup()
"""This process on its own."""


def processes_here() -> int:
    """Number of processes of this run on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_same_inputs(
    process_group: ProcessGroup,
    model: PreTrainedModel,
    examples: list[CalibrationExample],
    *others: Any,
) -> None:
    """Check that all processes of a group work on the same inputs.

    Args:
        process_group: The processes.
        model: The model, of which a few values are compared.
        examples: The calibration examples.
        *others: Plain values that decide what is measured.

    Raises:
        ValueError: They do not.
        ConnectionError: Another process has stopped.
    """
    process_group.check_consistent(
        lambda: digest_of(sample_digest(model), examples_digest(examples), *others),
        "model, calibration set or configuration",
    )
