"""Runs `optimum-cli cap` in the process of a test."""

import sys
from collections.abc import Sequence

import pytest
from optimum.commands import optimum_cli

from optimum_cap.commands.base import CAPSubcommand


def run_cap(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: Sequence[object]
) -> tuple[int, str, str]:
    """Return exit status, stdout, and stderr without the opening lines of a command."""
    monkeypatch.setattr(CAPSubcommand, "announce", lambda self: None)
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "cap", *map(str, arguments)])
    capfd.readouterr()
    status: int | str | None = 0
    try:
        optimum_cli.main()
    except SystemExit as done:
        status = done.code
    return int(status or 0), *capfd.readouterr()
