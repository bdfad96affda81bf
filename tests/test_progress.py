"""Progress: lines in a log, numbered steps, and nothing where it is switched off."""

import time

import pytest
from helpers.pruning_runs import config
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers.utils import logging

import optimum_cap.progress
from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.progress import (
    PROGRESS,
    ProgressLines,
    numbered_steps,
    progress_bar,
    progress_mode,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as the only item of a list."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_say_what_is_done_and_what_is_left(clock: list[float]) -> None:
    lines: list[str] = []
    with ProgressLines(total=30, desc="Pruning", unit="layer", show=lines.append) as progress:
        for _ in range(30):
            clock[0] += 4
            progress.update()
    assert lines == [
        "Pruning: 3 of 30 layers (10%) in 00:12, about 01:48 left",
        "Pruning: 11 of 30 layers (37%) in 00:44, about 01:16 left",
        "Pruning: 19 of 30 layers (63%) in 01:16, about 00:44 left",
        "Pruning: 27 of 30 layers (90%) in 01:48, about 00:12 left",
        "Pruning: 30 of 30 layers (100%) in 02:00",
    ]


def test_what_was_done_before_counts_for_no_speed(clock: list[float]) -> None:
    lines: list[str] = []
    with ProgressLines(total=10, initial=5, desc="Study", show=lines.append) as progress:
        clock[0] += 20
        progress.update()
    assert lines[0] == "Study: 6 of 10 (60%) in 00:20, about 01:20 left"


def test_quick_work_has_no_lines(clock: list[float]) -> None:
    lines: list[str] = []
    assert list(ProgressLines(range(5), desc="Ranking", show=lines.append)) == [0, 1, 2, 3, 4]
    assert lines == []


def test_the_environment_and_transformers_switch_it_off(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run() -> str:
        with progress_bar(total=2, desc="Pruning", unit="layer") as progress:
            clock[0] += 20
            progress.update()
        return capfd.readouterr().err

    assert "Pruning: 1 of 2 layers (50%) in 00:20, about 00:20 left" in run()
    logging.disable_progress_bar()
    try:
        assert run() == ""
        monkeypatch.setenv(PROGRESS, "lines")
        assert "1 of 2 layers" in run()
    finally:
        logging.enable_progress_bar()
    monkeypatch.setenv(PROGRESS, "none")
    assert run() == ""


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"recipe": "causal_fast"}, ["[1/2] Estimating sensitivities", "[2/2] Pruning"]),
        (
            {"recipe": "causal", "allocation": "interventional"},
            ["[1/2] Measuring sites", "[2/2] Pruning"],
        ),
        ({"recipe": "wanda"}, ["Pruning"]),
        ({"recipe": "paper"}, ["Scoring"]),
        (
            {"recipe": "paper", "estimator": "control_variate", "exact_examples": 2},
            ["[1/2] Scoring to first order", "[2/2] Scoring"],
        ),
        (
            {"recipe": "wanda", "answers": "model", "max_new_tokens": 4},
            ["[1/2] Answering", "[2/2] Pruning"],
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_steps_of_a_run_are_numbered(
    settings: dict[str, object], steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    def recorded(*args: object, desc: str = "", **options: object) -> ProgressLines:
        shown.append(desc)
        return ProgressLines(*args, desc=desc)  # type: ignore[arg-type]

    monkeypatch.setattr(optimum_cap.progress, "ProgressLines", recorded)
    monkeypatch.setenv(PROGRESS, "none")
    CAPPruner(config(**settings)).prune(tiny_model("llama"), tiny_tokenizer())
    others = {"Tokenizing", "Hashing weights"}  # shown after five seconds, if at all
    assert list(dict.fromkeys(name for name in shown if name not in others)) == steps


def test_steps_end_with_their_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS, "none")
    lines = []
    with numbered_steps(["Measuring sites", "Pruning"]):
        lines.append(progress_bar(desc="Pruning")._what)
    lines.append(progress_bar(desc="Pruning")._what)
    assert lines == ["[2/2] Pruning", "Pruning"]


def test_a_record_is_three_lines() -> None:
    model = CAPPruner(CAPConfig(sparsity=0.5, recipe="magnitude")).prune(tiny_model("llama"))
    first, second, third = repr(model.pruning_record).splitlines()
    assert first == "PruningRecord of an unknown model"
    assert second.startswith("  recipe magnitude, pattern unstructured: ")
    assert second.endswith(" prunable weights are zero (50.00%)")
    assert third.startswith("  without calibration data; optimum-cap ")


def test_an_unknown_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS, "bar")
    with pytest.raises(ValueError, match="OPTIMUM_CAP_PROGRESS is 'bar': set it to auto, bars, li"):
        progress_bar(total=2)
    monkeypatch.setenv(PROGRESS, "")
    assert progress_mode() == "auto"
