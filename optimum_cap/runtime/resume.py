"""Messages for interrupted runs: where finished results are stored, and how to resume."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from huggingface_hub import constants
from transformers.utils import logging

from optimum_cap.runtime.files import PrivateFiles

logger = logging.get_logger(__name__)


def default_folder() -> Path:
    """Return the resume folder of the command line: `optimum_cap/resume` in the Hugging Face home.

    It contains finished chunks of scoring, sensitivities, answers of evaluations and, until the
    model is saved, pruned layers.
    """
    return Path(constants.HF_HOME) / "optimum_cap" / "resume"


class Resumable(Protocol):
    """Stores finished results of a run.

    Attributes:
        files: Where it stores them.
    """

    @property
    def files(self) -> PrivateFiles: ...


def resume_hint(store: Resumable | None) -> str:
    """Return a message about the stored results of an interrupted run and how to resume.

    Args:
        store: Stores finished results, if anything does.
    """
    if store is None:
        return "no resume_dir was set, so the run must start over"
    stored = "only some finished results are" if store.files.failed else "finished results are"
    return f"{stored} stored in {store.files.folder}; run the same command again to resume"


@contextmanager
def resume_hint_on_stop(status: Callable[[], str], store: Resumable | None) -> Iterator[None]:
    """Add `resume_hint` to the error if the run is interrupted or loses another process.

    Args:
        status: Returns the interrupted step and its progress.
        store: Stores finished results, if anything does.
    """
    try:
        yield
    except KeyboardInterrupt:
        logger.warning(f"{status()}: {resume_hint(store)}")
        raise
    except ConnectionError as error:
        raise ConnectionError(f"{error}: {resume_hint(store)}") from error
