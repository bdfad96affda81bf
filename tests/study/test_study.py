"""Studies: what is measured, what is cached, what is refused, and the table and pictures of it."""

import csv
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.paths import EXAMPLES
from helpers.tiny_models import tiny_classifier, tiny_model, tiny_tokenizer

from optimum_cap.estimation import study_hours
from optimum_cap.evaluation import evaluate
from optimum_cap.evaluation.results import mean_and_interval
from optimum_cap.pruning.matrix_pruner import MatrixPruner
from optimum_cap.scoring.estimators import ESTIMATORS, Estimator
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.study import report, study
from optimum_cap.study.report import markdown, write_report
from optimum_cap.study.study import Cell, Study, run_study

SUMS = [{"question": f"{n}+{n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(12)]


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A study of a tiny model: two recipes, two sparsities, one seed."""
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    lines = [json.dumps(row) for row in SUMS]
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text("\n".join(lines))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:6]))
    return {
        "models": [str(tmp_path / "tiny")],
        "recipes": ["paper", "wanda"],
        "sparsities": [0.2, 0.5],
        "calibration": {"sums": str(tmp_path / "rows.jsonl")},
        "tasks": ["gsm8k"],
        "data_dir": str(tmp_path / "data"),
        "num_fewshot": 0,  # the model takes 64 characters
        "settings": {"num_samples": 4},
    }


def load(values: dict[str, Any], tmp_path: Path) -> Study:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return Study.load(file)


def values_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of measured quality: seconds and memory differ from run to run."""
    return [
        row
        for row in rows
        if row["task"] != study.PRUNING and row["metric"] != "seconds_per_answer"
    ]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells that are measured from now on."""
    names: list[str] = []
    stock = study._measured
    monkeypatch.setattr(
        study, "_measured", lambda cell, *args: (names.append(str(cell)), stock(cell, *args))[1]
    )
    return names


def test_every_cell_has_its_rows(values: dict[str, Any], tmp_path: Path) -> None:
    all_rows = run_study(load(values, tmp_path), tmp_path / "out")
    rows = values_of(all_rows)
    cells = {(row["recipe"], row["sparsity"]) for row in rows}
    assert cells == {
        ("dense", 0.0),
        *((recipe, sparsity) for recipe in ("paper", "wanda") for sparsity in (0.2, 0.5)),
    }
    metrics = {"accuracy", "loss", "no_answer", "tokens", "median_tokens", "at_limit"}
    assert {row["metric"] for row in rows} == metrics
    assert len(rows) == 5 * len(metrics)
    for row in rows:
        if row["metric"] in ("accuracy", "tokens", "median_tokens", "at_limit"):
            assert row["low"] <= row["value"] <= row["high"]
    assert not any(row["error"] for row in rows)
    losses = [row for row in rows if row["metric"] == "loss"]
    assert len({row["value"] for row in losses}) == 5
    # Of 12 questions, 4 are in the calibration set.
    assert [row["n"] for row in losses] == [12, 8, 8, 8, 8]
    with (tmp_path / "out" / "results.csv").open() as file:
        saved = list(csv.DictReader(file))
    assert [row["value"] for row in saved] == [str(row["value"]) for row in all_rows]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux")
def test_every_pruned_cell_says_what_pruning_took(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells that share causal scores all include the time in which these were measured."""
    slow = Estimator(lambda *args: (time.sleep(0.5), exact_losses(*args))[1])
    monkeypatch.setitem(ESTIMATORS, "exact", slow)
    rows = run_study(load(values, tmp_path), tmp_path / "out")
    usage: dict[tuple[str, float], dict[str, float]] = {}
    for row in rows:
        if row["task"] == study.PRUNING:
            usage.setdefault((row["recipe"], row["sparsity"]), {})[row["metric"]] = row["value"]
    assert set(usage) == {(r, s) for r in ("paper", "wanda") for s in (0.2, 0.5)}
    for (recipe, _), metrics in usage.items():
        assert set(metrics) == {"seconds", "cpu_seconds", "peak_memory"}
        assert metrics["seconds"] > (0.5 if recipe == "paper" else 0)
        assert metrics["cpu_seconds"] > 0
        assert 50e6 < metrics["peak_memory"] < 100e9
    text = markdown(rows)
    assert "## tiny: pruning, CPU seconds of all threads" in text
    assert "Calibrated on sums, 1 seed(s).\n" in text
    assert " GB |" in text


@pytest.mark.slow
def test_a_study_of_losses_alone_generates_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    both = load({**values, "tasks": ["gsm8k", "gsm8k_loss"]}, tmp_path)
    rows = values_of(run_study(both, tmp_path / "both"))
    losses = [
        [row["value"] for row in rows if (row["task"], row["metric"]) == (task, "loss")]
        for task in ("gsm8k", "gsm8k_loss")
    ]
    assert len(losses[0]) == 5
    assert losses[0] == losses[1]
    assert {row["metric"] for row in rows if row["task"] == "gsm8k_loss"} == {"loss"}
    assert "## tiny: gsm8k_loss, loss on worked answers, nats per token" in markdown(rows)


def test_tasks_have_limits_of_their_own(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"tasks": ["gsm8k_loss", "wikitext2", "strategyqa_loss"], "recipes": ["magnitude"]}
    values |= {"limit": {"gsm8k_loss": 3, "strategyqa_loss": 2}, "sparsities": [0.5]}
    del values["settings"]
    for name in ("strategyqa", "wikitext-2"):
        (tmp_path / "data" / name).mkdir()
    facts = [{"question": f"is {n} odd?", "answer": n % 2 == 1, "facts": ["no"]} for n in range(4)]
    (tmp_path / "data" / "strategyqa" / "test.jsonl").write_text("\n".join(map(json.dumps, facts)))
    text = " the quick brown fox jumps over the lazy dog . \n" * 100
    (tmp_path / "data" / "wikitext-2" / "test.txt").write_text(text)
    rows = values_of(run_study(load(values, tmp_path), tmp_path / "out"))
    counts = {row["task"]: row["n"] for row in rows if row["recipe"] == "magnitude"}
    assert list(counts) == values["tasks"]
    assert counts.pop("wikitext2") > 3
    assert counts == {"gsm8k_loss": 3, "strategyqa_loss": 2}
    hours = study_hours(load(values, tmp_path), "h100").rows
    more = study_hours(load({**values, "limit": None}, tmp_path), "h100").rows
    assert 0 < hours["tiny"]["evaluation"] < more["tiny"]["evaluation"]


@pytest.mark.parametrize("step", ["pruning", pytest.param("evaluation", marks=pytest.mark.slow)])
def test_an_interrupted_cell_resumes_where_it_was(
    step: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values |= {"resume": True, "recipes": ["wanda"], "sparsities": [0.5]}
    expected = values_of(run_study(load(values, tmp_path), tmp_path / "undisturbed"))
    assert not [*(tmp_path / "undisturbed" / "unfinished").glob("*")]
    stock, pruned = MatrixPruner.pruned, []

    def counted_matrix(*args: Any) -> Any:
        pruned.append(1)
        return stock(*args)

    def stopped_in_layer_2(*args: Any) -> Any:
        if len(pruned) == 15:  # of 21
            raise KeyboardInterrupt
        return counted_matrix(*args)

    def stopped(model: Any, *args: Any, **options: Any) -> Any:
        if hasattr(model, "pruning_record"):
            raise KeyboardInterrupt
        return evaluate(model, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MatrixPruner, "pruned", counted_matrix)
        if step == "pruning":
            patch.setattr(MatrixPruner, "pruned", stopped_in_layer_2)
        else:
            patch.setattr(study, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_study(load(values, tmp_path), tmp_path / "out")
    assert [*(tmp_path / "out" / "unfinished").glob("*/*")]
    first = len(pruned)
    monkeypatch.setattr(MatrixPruner, "pruned", counted_matrix)
    rows = run_study(load(values, tmp_path), tmp_path / "out")
    assert len(pruned) - first == 21 - first // 7 * 7
    assert values_of(rows) == expected
    tasks = {row["task"] for row in rows if row["recipe"] == "wanda"}
    assert (study.PRUNING in tasks) == (step == "evaluation"), (
        "the time of an interrupted cell is not known"
    )
    assert not [*(tmp_path / "out" / "unfinished").glob("*")]


@pytest.mark.slow
def test_several_processes_measure_the_same(values: dict[str, Any], tmp_path: Path) -> None:
    one = values_of(run_study(load(values, tmp_path), tmp_path / "one"))
    two = values_of(run_study(load(values, tmp_path), tmp_path / "two", jobs=2))
    for first, second in zip(one, two, strict=True):
        assert second == {**first, "value": pytest.approx(first["value"])}
    assert len(list((tmp_path / "two" / "scores").glob("*.safetensors"))) == 1
    assert not [*(tmp_path / "two").rglob("*.part")]
    with pytest.raises(ValueError, match="jobs must be an integer of at least 1, got 0"):
        run_study(load(values, tmp_path), tmp_path / "two", jobs=0)


def killed_in_one_cell(cell: Cell, *args: Any) -> dict[str, Any]:
    """Measure a cell, in a process that one cell kills."""
    if (cell.recipe, cell.sparsity) == ("wanda", 0.2):
        os.kill(os.getpid(), signal.SIGKILL)
    return study._measured_and_written(cell, *args)


@pytest.mark.slow
def test_a_killed_process_is_the_error_of_its_cell(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(study, "_measured_and_written", killed_in_one_cell)
        rows = run_study(load(values, tmp_path), tmp_path / "out", jobs=2)
    failed = [row for row in rows if row["error"]]
    assert [(row["recipe"], row["sparsity"]) for row in failed] == [("wanda", 0.2)]
    assert "the process that measured this cell was killed" in failed[0]["error"]
    assert len({(row["recipe"], row["sparsity"]) for row in rows}) == 5
    assert not any(row["error"] for row in run_study(load(values, tmp_path), tmp_path / "out"))


def asleep(cell: Cell, file: Path, *args: Any) -> None:
    """Measure a cell that takes longer than anyone waits."""
    file.with_suffix(".asleep").touch()
    time.sleep(120)


@pytest.mark.slow
def test_an_interrupt_ends_the_processes(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal to the study alone, not to all processes of a terminal."""

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def interrupt() -> None:
        while len(list((tmp_path / "out" / "cells").glob("*.asleep"))) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(study, "_measured_and_written", asleep)
    # Not Ctrl-C itself: a shell lets what runs in its background ignore that.
    before = signal.signal(signal.SIGUSR1, interrupted)
    threading.Thread(target=interrupt, daemon=True).start()
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(120,))
    other.start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_study(load(values, tmp_path), tmp_path / "out", jobs=2)
        assert time.monotonic() - start < 100, "it waited for the cells"
        assert multiprocessing.active_children() == [other]
    finally:
        signal.signal(signal.SIGUSR1, before)
        other.terminate()
        other.join()


@pytest.mark.slow
def test_recipes_without_data_are_measured_once_for_all_seeds(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = counted(monkeypatch)
    values |= {"recipes": ["magnitude", "random"], "sparsities": [0.5], "seeds": [0, 1]}
    del values["settings"]  # those of the calibration data
    rows = run_study(load(values, tmp_path), tmp_path / "out")
    assert [name.split()[1] for name in measured] == ["dense", "magnitude", "random", "random"]
    seeds = [row["seed"] for row in rows if (row["recipe"], row["metric"]) == ("magnitude", "loss")]
    assert seeds == [0, 1]


def test_the_models_of_a_study_can_be_others(values: dict[str, Any], tmp_path: Path) -> None:
    values["models"] = {"large": "owner/large"}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values))
    (label,) = {cell.label for cell in Study.load(file, models={"small": "here"}).cells()}
    assert label == "small"


def test_presets_are_found_in_the_data_folder(values: dict[str, Any], tmp_path: Path) -> None:
    values["calibration"] = {"sums": ["gsm8k", str(tmp_path / "rows.jsonl")], "one": "gsm8k"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(FileNotFoundError, match=r"data set gsm8k: no data file; .*train"):
        Study.load(tmp_path / "study.yaml")
    other = tmp_path / "other"
    (other / "gsm8k").mkdir(parents=True)
    (other / "gsm8k" / "train.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    loaded = Study.load(tmp_path / "study.yaml", data_dir=other)
    preset = f"gsm8k={other / 'gsm8k' / 'train.jsonl'}"
    assert loaded.calibration == {"sums": [preset, values["calibration"]["sums"][1]], "one": preset}
    with pytest.raises(FileNotFoundError, match=r"the data folder .+ does not exist"):
        Study.load(tmp_path / "study.yaml", data_dir=tmp_path / "nowhere")


def test_launched_processes_are_refused(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study.ProcessGroup, "current", lambda: study.ProcessGroup(0, 2))
    with pytest.raises(ValueError, match="2 processes were launched, but a study runs in one"):
        run_study(load(values, tmp_path), tmp_path / "out")


@pytest.mark.slow
def test_scores_are_measured_once_per_calibration_set(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    counting = Estimator(lambda *args: (runs.append(1), exact_losses(*args))[1])
    monkeypatch.setitem(ESTIMATORS, "exact", counting)
    values["recipes"] = {"paper": None, "K=1": {"recipe": "paper", "subsets": 1}}
    values["recipes"]["max"] = {"recipe": "paper", "kv_combination": "max"}
    values["seeds"] = [0, 1]
    run_study(load(values, tmp_path), tmp_path / "out")
    assert len(runs) == 2


@pytest.mark.slow
def test_a_second_run_measures_only_what_is_new(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_study(load(values, tmp_path), tmp_path / "out")
    names = counted(monkeypatch)
    assert run_study(load(values, tmp_path), tmp_path / "out") == first
    values["settings"] |= {"strict": True, "memory_budget": "1GB"}  # change no result
    run_study(load(values, tmp_path), tmp_path / "out")
    assert names == []

    values["sparsities"].append(0.3)
    run_study(load(values, tmp_path), tmp_path / "out")
    assert names == ["tiny paper 0.3 sums seed 0", "tiny wanda 0.3 sums seed 0"]


def test_a_stopped_study_resumes_where_it_was(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values_of(run_study(load(values, tmp_path), tmp_path / "undisturbed"))
    stock = study._measured

    def stopped(cell: Any, *args: Any) -> Any:
        if str(cell) == "tiny wanda 0.2 sums seed 0":
            raise KeyboardInterrupt
        return stock(cell, *args)

    with monkeypatch.context() as patch:
        patch.setattr(study, "_measured", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_study(load(values, tmp_path), tmp_path / "out")
    with (tmp_path / "out" / "results.csv").open(encoding="utf-8", newline="") as lines:
        finished = {row["recipe"] for row in csv.DictReader(lines)}
    assert finished == {"dense", "paper"}, "the cells before it"
    names = counted(monkeypatch)
    assert values_of(run_study(load(values, tmp_path), tmp_path / "out")) == values_of(expected)
    assert names == ["tiny wanda 0.2 sums seed 0", "tiny wanda 0.5 sums seed 0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        "model",
        "calibration",
        "evaluation",
        "limit",
        "num_fewshot",
        "max_new_tokens",
    ],
)
def test_what_changed_is_measured_again(
    changed: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(load(values, tmp_path), tmp_path / "out")
    names = counted(monkeypatch)
    if changed == "model":
        tiny_model("llama", seed=1).save_pretrained(tmp_path / "tiny")
    elif changed == "calibration":
        lines = [json.dumps(row) for row in SUMS[3:9]]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    elif changed == "evaluation":
        lines = [json.dumps(row) for row in SUMS[1:]]
        (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text("\n".join(lines))
    elif changed == "num_fewshot":
        values["num_fewshot"] = 1
    else:
        values[changed] = 3
    run_study(load(values, tmp_path), tmp_path / "out")
    assert len(names) == (4 if changed == "calibration" else 5)


def test_a_cell_that_fails_is_recorded_and_the_rest_continue(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["recipes"] = {"4:8": {"recipe": "wanda", "pattern": "4:8"}, "wanda": None}
    values["sparsities"] = [0.5]
    loaded = load(values, tmp_path)
    rows = run_study(loaded, tmp_path / "out")
    (failed,) = [row for row in rows if row["error"]]
    assert failed["recipe"] == "4:8"
    assert "ValueError: pattern '4:8' does not fit" in failed["error"]
    assert any(row["recipe"] == "wanda" and row["value"] is not None for row in rows)
    text = markdown(rows)
    assert "- tiny 4:8 0.5 sums seed 0: ValueError: pattern '4:8' does not fit" in text
    # A failure is tried again, a result is not.
    names = counted(monkeypatch)
    run_study(loaded, tmp_path / "out")
    assert names == ["tiny 4:8 0.5 sums seed 0"]


@pytest.mark.slow
def test_a_damaged_cell_is_measured_again(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values_of(run_study(load(values, tmp_path), tmp_path / "out"))
    for file in (tmp_path / "out" / "cells").iterdir():
        file.write_text(file.read_text()[:50])
    names = counted(monkeypatch)
    assert values_of(run_study(load(values, tmp_path), tmp_path / "out")) == values_of(expected)
    assert len(names) == 5


@pytest.mark.slow
def test_table_and_pictures(values: dict[str, Any], tmp_path: Path) -> None:
    values["seeds"] = [0, 1]
    loaded = load(values, tmp_path)
    files = write_report(loaded, run_study(loaded, tmp_path / "out"), tmp_path / "out")
    assert [file.name for file in files] == [
        "results.md",
        "tiny_sums_accuracy.png",
        "tiny_sums_loss.png",
        "tiny_sums_tokens.png",
        "tiny_sums_at_limit.png",
        "tiny_sums_scores.png",
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[1:])
    text = files[0].read_text()
    assert "## tiny: gsm8k, loss on worked answers, nats per token" in text
    assert "| recipe | 20% | 50% |" in text
    assert "Calibrated on sums, 2 seed(s); dense " in text


@pytest.mark.slow
def test_the_heat_map_has_a_panel_for_each_kind_of_unit(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another recipe of the study scores heads only."""
    values["recipes"] = {
        "paper": None,
        "all": {"recipe": "paper", "scored_units": "all", "mlp_unit_size": 8},
    }
    values["sparsities"] = [0.5]
    loaded = load(values, tmp_path)
    rows = run_study(loaded, tmp_path / "out")
    drawn, own = [], report._score_panels

    def panels(scores: list[dict[str, Any]]) -> dict[str, Any]:
        drawn.append(own(scores))
        return drawn[-1]

    monkeypatch.setattr(report, "_score_panels", panels)
    files = write_report(loaded, rows, tmp_path / "out")
    assert "tiny_sums_scores.png" in [file.name for file in files]
    (found,) = drawn
    assert {kind: values.shape for kind, values in found.items()} == {
        "attention": (3, 4),
        "mlp": (3, 3),
    }
    # Heads and all units are measured apart, each once.
    losses = sorted(file.name for file in (tmp_path / "out" / "scores").glob("*.safetensors"))
    assert len(losses) == 2


def test_panels_leave_gaps_where_layers_differ() -> None:
    scores = [
        {"layer": layer, "kind": kind, "score": value}
        for layer, kind, value in (
            (0, "attention", 1.0),
            (0, "mlp", 2.0),
            (1, "attention", None),
            (1, "expert", 3.0),
            (1, "expert", 4.0),
        )
    ]
    found = {kind: panel.tolist() for kind, panel in report._score_panels(scores).items()}
    assert str(found) == str(
        {
            "attention": [[1.0], [math.nan]],
            "mlp": [[2.0], [math.nan]],
            "expert": [[math.nan, math.nan], [3.0, 4.0]],
        }
    )


def test_the_table_shows_means_over_seeds_with_their_interval() -> None:
    def row(recipe: str, sparsity: float, seed: int | None, value: float) -> dict[str, Any]:
        return {
            **dict.fromkeys(study._COLUMNS),
            "model": "m",
            "recipe": recipe,
            "sparsity": sparsity,
            "calibration": None if recipe == "dense" else "c",
            "seed": seed,
            "task": "t",
            "metric": "accuracy",
            "value": value,
        }

    rows = [row("dense", 0.0, None, 0.9)]
    rows += [row("paper", 0.2, seed, value) for seed, value in enumerate((0.7, 0.8, 0.9))]
    text = markdown(rows)
    assert "3 seed(s); dense 90.0%." in text
    assert "| paper | 80.0% ± 24.8 |" in text  # 4.303 * 0.1 / sqrt(3)


def test_mean_and_interval() -> None:
    assert mean_and_interval([0.5]) == (0.5, None)
    mean, half = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "x"}, r"unknown key\(s\) model in .*; known: models, recipes"),
        ({"recipes": None}, "has no values for recipes"),
        ({"recipes": ["magic"]}, "unknown recipe 'magic' in the study: choose from causal"),
        ({"recipes": {"a": {"sparsity": 0.3}}}, "must be fields of CAPConfig other than sparsity"),
        ({"recipes": {"a": {"magic": 1}}}, "recipe 'paper|a' of the study: .*magic"),
        ({"recipes": {"dense": None}}, "label 'dense' is reserved"),
        ({"sparsities": 0.5}, r"sparsities of the study must be a list, got 0\.5"),
        ({"sparsities": [0.5, 0.5]}, "has a duplicate value"),
        ({"sparsities": [1.5]}, "sparsity must be a number strictly between 0 and 1"),
        ({"models": ["a/x", "b/x"]}, "different last path components"),
        ({"tasks": ["magic"]}, "unknown task 'magic': choose from"),
        ({"resume": "yes"}, "resume of .* must be true or false, got 'yes'"),
        ({"limit": 0}, "limit must be an integer of at least 1, got 0"),
        ({"limit": {"gsm8k": 0}}, "limit must be an integer of at least 1, got 0"),
        ({"limit": {"wikitext2": 3}}, "limit of the study names 'wikitext2', but the tasks are gs"),
        ({"limit": {"magic": 3}}, "unknown task 'magic': choose from"),
        (
            {"settings": {"scores": "a"}},
            "settings of .* contain scores, which the study sets",
        ),
        ({"settings": {"num_samples": 0}}, "num_samples must be an integer of at least 1"),
    ],
)
def test_a_bad_study_is_refused_before_anything_is_measured(
    changes: dict[str, Any], message: str, values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load({**values, **changes}, tmp_path)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just text"])
def test_what_is_no_study_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        Study.load(tmp_path / "bad.yaml")


def test_the_examples_are_valid(empty_presets: Path) -> None:
    files = sorted(EXAMPLES.glob("*/*.yaml"))
    assert {file.parent.name for file in files} == {"studies", "real_models"}
    for file in files:
        assert list(Study.load(file, data_dir=empty_presets).cells())


@pytest.mark.slow
def test_the_command_dry_runs_and_measures(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    values = {**values, "recipes": ["wanda"], "settings": {"num_samples": 4}}
    file.write_text(yaml.safe_dump(values))
    command = [str(Path(sys.executable).with_name("optimum-cli")), "cap", "study", str(file)]
    dry = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True)
    assert dry.stdout.splitlines()[-1] == "3 cells"
    bad = subprocess.run([*command, "--models", "tiny"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert "--models takes LABEL=NAME" in bad.stderr
    output = tmp_path / "out"
    subprocess.run(
        [*command, "-o", str(output), "--jobs", "2"], capture_output=True, text=True, check=True
    )
    assert (output / "results.md").read_text().startswith("# Results")


def test_settings_apply_to_the_recipes_that_use_them(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["settings"] = {"num_samples": 4, "subsets": 2}
    values["recipes"] = ["paper", "wanda", "magnitude"]
    configs = {cell.recipe: cell.config() for cell in load(values, tmp_path).cells()}
    assert (configs["paper"].num_samples, configs["paper"].subsets) == (4, 2)
    assert (configs["wanda"].num_samples, configs["wanda"].subsets) == (4, 3)
    assert configs["magnitude"].num_samples == 128


def test_a_setting_at_its_default_is_no_error(values: dict[str, Any], tmp_path: Path) -> None:
    values["settings"] = {"num_samples": 4, "subsets": 3}
    values["recipes"] = ["wanda"]
    assert load(values, tmp_path).settings["subsets"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"owl_bound": 0.2}}, "setting 'owl_bound' .* has no effect with any recipe"),
        (
            {"recipes": {"w": {"recipe": "wanda", "subsets": 2}}},
            "recipe 'w' of the study: subsets 2 has no effect with recipe 'wanda'",
        ),
        (
            {"recipes": {"w": {"recipe": "wanda", "patern": "2:4"}}},
            r"recipe 'w' of the study: CAPConfig has no field 'patern' \(did you mean 'pat",
        ),
        ({"sparsites": [0.5]}, r"unknown key\(s\) sparsites .* \(did you mean 'sparsities'\?\)"),
    ],
)
def test_settings_without_an_effect_are_refused(
    changes: dict[str, Any], message: str, values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(values | changes, tmp_path)


def test_a_classifier_is_not_measured_with_a_new_head(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_classifier("llama").save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(study, "_evaluated", lambda *a, **k: pytest.fail("evaluated"))
    rows = run_study(load({**values, "recipes": ["wanda"]}, tmp_path), tmp_path / "out")
    errors = {row["error"] for row in rows if row["error"]}
    assert len(errors) == 1
    assert "is a LlamaForSequenceClassification, which has no LM head" in errors.pop()
