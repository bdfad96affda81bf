"""Finished chunks of a scoring on disk, so that a run that was stopped goes on where it was.

A chunk lies under a digest of all that its bytes follow from: weights and config of the model, the
batch, the units, the versions and the machine. Nothing is ever compared or updated, so a changed
input cannot meet an old chunk, and two runs that share a folder write the same bytes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from huggingface_hub import constants
from transformers.utils import logging

from optimum_cap.runtime.files import TensorFiles

logger = logging.get_logger(__name__)


def default_folder() -> Path:
    """Where the command line keeps chunks: `optimum_cap/scores` in the Hugging Face home."""
    return Path(constants.HF_HOME) / "optimum_cap" / "scores"


class Resumable(Protocol):
    """What keeps finished parts of a run."""

    files: "TensorFiles"


def resume_hint(kept: "Resumable | None") -> str:
    """Say what is left of a run that was stopped, and how to go on.

    Args:
        kept: Where finished parts are kept, if anywhere.
    """
    if kept is None:
        return "without a resume_dir nothing is kept, and it has to begin anew"
    what = "not all that is done" if kept.files.failed else "what is done"
    return f"{what} is kept in {kept.files.folder}; run the same again to go on from there"


@contextmanager
def resume_hint_on_stop(doing: Callable[[], str], kept: Resumable | None) -> Iterator[None]:
    """Say how to go on where a run is interrupted, or loses another process.

    Args:
        doing: What is stopped, and how far it is.
        kept: Where finished parts are kept, if anywhere.
    """
    try:
        yield
    except KeyboardInterrupt:
        logger.warning(f"{doing()}: {resume_hint(kept)}")
        raise
    except ConnectionError as error:
        raise ConnectionError(f"{error}: {resume_hint(kept)}") from error
