"""Progress of work that takes a while: a bar in a terminal or notebook, lines in a log."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

PROGRESS = "OPTIMUM_CAP_PROGRESS"
"""Environment variable that sets how progress is shown."""

_MODES = ("auto", "bars", "lines", "none")  # one line every half a minute

_FIRST_LINE = 10.0  # seconds after which the first line is printed
_NEXT_LINE = 30.0  # seconds between two lines

# The steps of the run in progress, by the names of their bars.
_steps: ContextVar[tuple[str, ...]] = ContextVar("steps", default=())


@contextmanager
def numbered_steps(names: Sequence[str]) -> Iterator[None]:
    """Number the bars of a run, as in `[2/3] Pruning`.

    Args:
        names: The descriptions of the bars, in order. Other bars are shown without a number.
    """
    token = _steps.set(tuple(names))
    try:
        yield
    finally:
        _steps.reset(token)


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return a progress display with the interface of `tqdm.tqdm`.

    It is a `tqdm` bar where one can be drawn, and lines on stderr elsewhere. Nothing is shown if
    progress bars are disabled in transformers or huggingface_hub.

    Args:
        iterable: What to iterate over, if the display does that.
        **options: Those of `tqdm`: `total`, `desc`, `unit`, `initial`, `delay`, `leave`,
            `unit_scale`, `disable`.
    """
    from transformers.utils import logging

    name, steps = options.get("desc") or "", _steps.get()
    if name in steps and len(steps) > 1:
        options["desc"] = f"[{steps.index(name) + 1}/{len(steps)}] {name}"
    mode = progress_mode()
    if options.get("disable"):
        mode = "none"
    elif mode == "auto":
        if not logging.is_progress_bar_enabled():
            mode = "none"
        elif not (sys.stderr.isatty() or _draws_widgets()):
            mode = "lines"
    if mode in ("auto", "bars"):
        return logging.tqdm(iterable, **options)
    return ProgressLines(iterable, show=_print_line if mode == "lines" else None, **options)


def progress_mode() -> str:
    """Return how to show progress, as set in the environment.

    Raises:
        ValueError: The setting is unknown.
    """
    mode = os.environ.get(PROGRESS, "auto") or "auto"
    if mode not in _MODES:
        raise ValueError(f"{PROGRESS} is {mode!r}: set it to {', '.join(_MODES[:-1])} or none")
    return mode


class ProgressLines:
    """Prints a line every half minute, with the part of the interface of `tqdm` that we use.

    Args:
        iterable: What to iterate over.
        total: Number of items.
        desc: What is done.
        unit: Name of an item; not shown if it is the default of `tqdm` or scaled.
        initial: Number of items that were done before.
        show: Takes each line; `None` shows nothing.
        **others: Options that have no effect here.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        *,
        total: float | None = None,
        desc: str = "",
        unit: str = "it",
        initial: float = 0,
        show: Callable[[str], None] | None = None,
        **others: Any,
    ) -> None:
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        self.total = total
        self.n = initial
        self._iterable = iterable
        self._what = desc
        self._unit = "" if unit == "it" or others.get("unit_scale") else f" {unit}s"
        self._show = show
        self._initial = initial
        self._start = self._shown = time.monotonic()
        self._has_shown = False
        self._count_shown = initial

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._iterable or ():
                yield item
                self.update()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, count: float = 1) -> None:
        """Count finished items, and print a line if one is due."""
        self.n += count
        now = time.monotonic()
        if now - self._shown >= (_NEXT_LINE if self._has_shown else _FIRST_LINE):
            self._print(now)

    def set_postfix_str(self, text: str) -> None:
        """Ignore a text that only bars show."""

    def set_postfix(self, **values: Any) -> None:
        """Ignore values that only bars show."""

    def close(self) -> None:
        """Print a last line, if there were others."""
        if self._has_shown and self.n != self._count_shown:
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        self._shown, self._has_shown, self._count_shown = now, True, self.n
        if self._show is None:
            return
        elapsed, done = now - self._start, self.n - self._initial
        count = f"{self.n:.0f}{self._unit}"
        left = ""
        if self.total:
            share = f" ({self.n / self.total:.0%})"
            count = f"{self.n:.0f} of {self.total:.0f}{self._unit}{share}"
            if done > 0 and self.n < self.total:
                seconds = elapsed / done * (self.total - self.n)
                left = f", about {_clock(seconds)} left"
        self._show(f"{self._what}: {count} in {_clock(elapsed)}{left}")


def _clock(seconds: float) -> str:
    from tqdm import tqdm

    return str(tqdm.format_interval(seconds))


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _draws_widgets() -> bool:
    """Return whether bars are widgets of a notebook, which need no terminal."""
    from tqdm.auto import tqdm

    return any("notebook" in each.__module__ for each in tqdm.__mro__)
