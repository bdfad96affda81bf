"""Multiple processes share one run: each measures a share, and all get all results.

`accelerate launch` or `torchrun` starts them. accelerate sets up torch.distributed, with gloo on
CPUs and nccl on GPUs, and exchanges objects. Every process holds the whole model.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
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
from optimum_cap.progress import PROGRESS
from optimum_cap.runtime.digests import digest_of, examples_digest, sample_digest

T = TypeVar("T")

# Other processes wait for one whose share takes longer; a process that dies breaks the connection
# immediately.
_PATIENCE = timedelta(hours=6)
# Set by torchrun and accelerate launch, and by MPI launchers.
_WORLD_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one run, each with its rank.

    Attributes:
        rank: Rank of this process; only rank 0 writes files.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "ProcessGroup":
        """Return the processes that were launched together, or this process alone.

        Raises:
            RuntimeError: The program has set up accelerate for a different number of processes.
        """
        launched = get_int_from_env(_WORLD_SIZES, 1)
        if launched == 1:
            return cls()
        # Without a GPU, accelerate connects processes only if `cpu` is set.
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
        state = PartialState(cpu=cpu, timeout=_PATIENCE)
        if state.num_processes != launched:
            raise RuntimeError(
                f"{launched} processes were launched, but accelerate was already set up for "
                f"{state.num_processes}: on CPUs, set it up with PartialState(cpu=True)"
            )
        return cls(state.process_index, state.num_processes)

    def broadcast(self, value: T) -> T:
        """Return the first process's value on all processes.

        Raises:
            ConnectionError: As `all_gather`.
        """
        if self.size == 1:
            return value
        return self._together(lambda: broadcast_object_list([value])[0])

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, on all processes.

        Raises:
            ConnectionError: Another process has stopped, or cannot be reached.
        """
        if self.size == 1:
            return [value]
        return self._together(lambda: gather_object([value]))

    def sum_(self, tensor: torch.Tensor) -> None:
        """Add up the tensors of all processes, in place on every process.

        If at most two processes have nonzero values, the sum does not depend on the order and has
        the same bytes for any number of processes.

        Raises:
            ConnectionError: As `all_gather`.
        """
        self._in_place(tensor, dist.all_reduce)

    def broadcast_(self, tensor: torch.Tensor, source: int) -> None:
        """Replace the values of a tensor with those of process `source` on every other process.

        Raises:
            ConnectionError: As `all_gather`.
        """
        # As bytes, because not every backend knows every dtype.
        self._in_place(tensor, lambda values: dist.broadcast(values.view(torch.uint8), source))

    def owns_lane(self, lane: int) -> bool:
        """Return whether this process computes one of the `LANES` of a calibration set."""
        return lane * min(self.size, LANES) // LANES == self.rank

    def deal(self, costs: Sequence[float]) -> list[int]:
        """Return the rank for each item: the process with the least work so far takes it.

        Args:
            costs: Cost of each item; the most expensive ones are assigned first.
        """
        loads = [0.0] * self.size
        ranks = [0] * len(costs)
        for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
            ranks[item] = min(range(self.size), key=loads.__getitem__)
            loads[ranks[item]] += costs[item]
        return ranks

    def check_consistent(self, digest: Callable[[], str], what: str) -> None:
        """Check that all processes were given the same inputs.

        Args:
            digest: Computes a digest of the inputs; not called for a single process.
            what: Name of the inputs, for the error message.

        Raises:
            ValueError: The digests differ.
            ConnectionError: As `all_gather`.
        """
        if self.size == 1:
            return
        digests = self.all_gather(digest())
        others = [str(rank) for rank, value in enumerate(digests) if value != digests[0]]
        if others:
            raise ValueError(
                f"process(es) {', '.join(others)} of {self.size} got a different {what} than "
                "process 0: start all of them with the same model, revision and data files"
            )

    def share(self, costs: list[int]) -> list[int]:
        """Return the indices of the consecutive items that this process takes.

        An item goes to the process whose part of the total cost contains the middle of the item.

        Args:
            costs: Cost of each item.
        """
        total, ends = sum(costs), accumulate(costs)
        ranks = [
            (2 * end - cost) * self.size // (2 * total)
            for end, cost in zip(ends, costs, strict=True)
        ]
        return [index for index, rank in enumerate(ranks) if rank == self.rank]

    def placement(self, device_map: Any) -> Any:
        """Return the device map for the model; each of several processes uses its own device."""
        return PartialState().device if self.size > 1 and device_map == "auto" else device_map

    def silence_other_ranks(self) -> None:
        """Disable logs and progress bars on all processes except the first."""
        if self.rank:
            logging.set_verbosity_error()
            logging.disable_progress_bar()
            os.environ[PROGRESS] = "none"

    def shutdown(self) -> None:
        """Close the connections at the end of a program."""
        if self.size > 1:
            PartialState().destroy_process_group()

    def _in_place(self, tensor: torch.Tensor, exchange: Callable[[torch.Tensor], Any]) -> None:
        """Exchange the values of a tensor of any layout, on any device."""
        if self.size == 1:
            return
        values = tensor.detach().to(PartialState().device).contiguous()
        self._together(lambda: exchange(values))
        if values.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(values)

    def _together(self, exchange: Callable[[], T]) -> T:
        try:
            return exchange()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(
                f"process {self.rank} of {self.size} lost the connection to another process, which "
                f"stopped or cannot be reached ({reason})"
            ) from error


LANES = 2
"""Number of parts of a calibration set whose results are added up across processes.

The sum of two numbers does not depend on their order, so a run gives the same bytes with one
process as with several. With more parts, it would depend on which ones a process adds first.
"""


def lane_of(number: int) -> int:
    """Return the lane of a batch, given its number among all batches; consecutive ones differ."""
    return number % LANES


ALONE = ProcessGroup()
"""The group that contains only this process."""


def processes_here() -> int:
    """Return the number of processes of this run that share this machine's memory."""
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
        model: The model; only a few of its values are compared.
        examples: The calibration examples.
        *others: Plain values that determine what is measured.

    Raises:
        ValueError: The processes were given different inputs.
        ConnectionError: Another process has stopped.
    """
    process_group.check_consistent(
        lambda: digest_of(sample_digest(model), examples_digest(examples), *others),
        "model, calibration set or configuration",
    )
