"""Logs of questions and a model's answers, as JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimum_cap.runtime import write_atomically

_SUFFIX = ".jsonl"


def check_sample_log(path: str | Path) -> None:
    """Check that samples can be logged to `path`.

    Raises:
        ValueError: It is a file but not a JSON lines file, or its folder is inside a file.
        FileNotFoundError: The folder of the file does not exist.
    """
    path = Path(path)
    if path.suffix != _SUFFIX:
        if file := next((each for each in (path, *path.parents) if each.is_file()), None):
            raise ValueError(
                f"log_samples {path} is neither a file that ends in {_SUFFIX} nor a folder, as "
                f"{file} is a file: name another one"
            )
    elif path.is_dir():
        raise ValueError(f"log_samples {path} is a folder that ends in {_SUFFIX}: name a file")
    elif not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"the folder {path.absolute().parent} of log_samples does not exist: create it first"
        )


class SampleLog:
    """Writes the samples task by task.

    Files are written atomically. If the evaluation is interrupted, the samples of finished tasks
    are kept.

    Args:
        path: A file that ends in `.jsonl` for all tasks, or a folder for one file per task.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._lines: list[str] = []

    def add(self, task: str, samples: Sequence[dict[str, Any]]) -> None:
        """Write the samples of a task, each on a line.

        Raises:
            OSError: The file cannot be written.
        """
        lines = [
            json.dumps({"task": task, **sample}, ensure_ascii=False, default=str)
            for sample in samples
        ]
        if self._path.suffix == _SUFFIX:
            self._lines += lines
            file, lines = self._path, self._lines
        else:
            self._path.mkdir(parents=True, exist_ok=True)
            file = self._path / f"{task.replace(':', '_').replace('/', '_')}{_SUFFIX}"
        text = "".join(line + "\n" for line in lines)
        write_atomically(file, text.encode("utf-8", "backslashreplace"))
