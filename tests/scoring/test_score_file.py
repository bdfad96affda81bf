"""Scores files: written whole, checked when read, used again, refused for anything else."""

import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.calibration import ROWS
from helpers.pruning_runs import config
from helpers.tiny_models import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_cap import CAPPruner
from optimum_cap.checkpoint.conversion import inspect_checkpoint
from optimum_cap.commands.parser import CommandParser
from optimum_cap.commands.prune import PruneCommand
from optimum_cap.commands.score import ScoreCommand, score_table
from optimum_cap.data.calibration import build_calibration_set
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.view import ModelView
from optimum_cap.runtime.digests import digest_of
from optimum_cap.scoring.estimators import ESTIMATORS, Estimator
from optimum_cap.scoring.score_file import read_scores
from optimum_cap.scoring.scores import causal_scores


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A scores file of the tiny Llama."""
    file = tmp_path / "scores.safetensors"
    CAPPruner(config()).measure(tiny_model("llama"), tiny_tokenizer(), save_to=file)
    return file


@pytest.mark.parametrize(
    "changes", [{}, {"sparsity": 0.5, "subsets": 2}, {"aggregation": "mean"}, {"pattern": "heads"}]
)
def test_saved_scores_prune_like_measured_ones(
    changes: dict[str, Any], scores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = CAPPruner(config(**changes)).prune(tiny_model("llama"), tiny_tokenizer())
    monkeypatch.setitem(ESTIMATORS, "exact", Estimator(lambda *a: pytest.fail("measured again")))
    pruner = CAPPruner(config(**changes, scores=scores))
    model = pruner.prune(tiny_model("llama"), tiny_tokenizer())
    assert model.pruning_record == measured.pruning_record
    pairs = zip(model.parameters(), measured.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_standard_errors_of_an_estimate_come_back(tmp_path: Path) -> None:
    file = tmp_path / "scores.safetensors"
    settings = {"estimator": "control_variate", "exact_examples": 4}
    model = tiny_model("llama")
    CAPPruner(config(**settings)).measure(model, tiny_tokenizer(), save_to=file)
    CAPPruner(config(**settings)).prune(model, tiny_tokenizer())
    other = CAPPruner(config(**settings, scores=file)).prune(tiny_model("llama"), tiny_tokenizer())
    assert model.pruning_record == other.pruning_record
    assert model.pruning_record.config["estimator"] == "control_variate"
    assert read_scores(file).settings["exact_examples"] == 4


def test_the_same_scores_are_the_same_bytes(scores: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    CAPPruner(config()).measure(tiny_model("llama"), tiny_tokenizer(), save_to=again)
    assert scores.read_bytes() == again.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == [again.name, scores.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"of other calibration examples \(.*seed 0\) than .*seed 1\)"),
        ({"num_samples": 13}, r"num_samples 12, .* num_samples 13"),
        ({"dataset": ROWS[:40]}, r"in-memory, 81 rows.*in-memory, 40 rows"),
        ({"scored_tokens": "all"}, "of other calibration examples"),
        ({"estimator": "first_order"}, "of estimator 'exact', .* asks for 'first_order'"),
        ({"scored_units": "all"}, "of scored_units 'heads', but the config asks for 'all': use"),
    ],
)
def test_scores_of_other_settings_are_refused(
    changes: dict[str, Any], message: str, scores: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        CAPPruner(config(**changes, scores=scores)).prune(tiny_model("llama"), tiny_tokenizer())


def test_scores_of_other_units_are_refused(tmp_path: Path) -> None:
    file, units = tmp_path / "scores.safetensors", {"scored_units": "all"}
    pruner = CAPPruner(config(**units, mlp_unit_size=8))
    pruner.measure(tiny_model("mixtral"), tiny_tokenizer(), save_to=file)
    for changes, message in (
        ({}, "of scored_units 'all', but the config asks for 'heads'"),
        ({**units, "mlp_unit_size": 7}, "of mlp_unit_size 8, but the config asks for 7"),
    ):
        with pytest.raises(ValueError, match=message):
            CAPPruner(config(**changes, scores=file)).prune(tiny_model("mixtral"), tiny_tokenizer())
    settings = config(**units, mlp_unit_size=8, scores=file)
    pruned = CAPPruner(settings).prune(tiny_model("mixtral"), tiny_tokenizer())
    assert len(pruned.pruning_record.scores) == 12 + 12 * 3


def test_a_file_from_before_other_units_is_of_heads(scores: Path) -> None:
    saved = read_scores(scores)
    for field in ("scored_units", "mlp_unit_size"):
        del saved.settings[field]
    model, sites = tiny_model("llama"), find_sites(tiny_model("llama"))
    rows = build_calibration_set(config(), tiny_tokenizer(), max_length=64).examples
    assert len(saved.losses(ModelView(model, sites), rows, config()).units) == 12
    with pytest.raises(ValueError, match="of scored_units 'heads', but the config asks for 'all'"):
        saved.losses(ModelView(model, sites), rows, config(scored_units="all"))


@pytest.mark.parametrize("other", [("gpt2", 0), ("llama", 1)])
def test_scores_of_another_model_are_refused(other: tuple[str, int], scores: Path) -> None:
    with pytest.raises(ValueError, match=r"are of another model .* or of other weights"):
        CAPPruner(config(scores=scores)).prune(tiny_model(*other), tiny_tokenizer())


def test_scores_of_a_model_with_another_config_are_refused(scores: Path) -> None:
    model = tiny_model("llama")
    model.config.rms_norm_eps = 0.1
    with pytest.raises(ValueError, match="are of another model"):
        CAPPruner(config(scores=scores)).prune(model, tiny_tokenizer())


def test_scores_with_other_settings_of_the_estimator_are_refused(tmp_path: Path) -> None:
    file, settings = tmp_path / "scores.safetensors", {"estimator": "control_variate"}
    pruner = CAPPruner(config(**settings, exact_examples=4))
    pruner.measure(tiny_model("llama"), tiny_tokenizer(), save_to=file)
    other = CAPPruner(config(**settings, exact_examples=6, scores=file))
    with pytest.raises(ValueError, match="of exact_examples 4, but the config asks for 6"):
        other.prune(tiny_model("llama"), tiny_tokenizer())


def test_the_command_refuses_scores_of_data_in_memory(
    scores: Path, flags: list[str], tmp_path: Path
) -> None:
    model = flags[flags.index("-m") + 1]
    with pytest.raises(ValueError, match="were measured on in-memory data"):
        run(
            PruneCommand, "-m", model, "-o", tmp_path / "out", "--sparsity", 0.2, "--scores", scores
        )


def test_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors does not exist: create it with"):
        read_scores("no.safetensors")


def test_a_damaged_file(scores: Path) -> None:
    whole = scores.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"{}", whole[:-9] + b"\0" + whole[-8:]):
        scores.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is not a scores file, or is damaged|is damaged"):
            read_scores(scores)


@pytest.mark.parametrize("key", ["layout", "sha256", "settings", "units"])
def test_a_damaged_key(key: str, scores: Path) -> None:
    whole = scores.read_bytes()
    assert whole.count(f'\\"{key}\\"'.encode()) == 1
    scores.write_bytes(whole.replace(f'\\"{key}\\"'.encode(), f'\\"{key[::-1]}\\"'.encode()))
    with pytest.raises(ValueError, match=r"is not a scores file: create one|is damaged"):
        read_scores(scores)


REMOVED: Any = object()


def forge(
    file: Path, metadata: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None
) -> None:
    """Change a scores file, with a checksum that is right."""
    saved = read_scores(file)

    def changed(values: dict[str, Any], changes: dict[str, Any] | None) -> dict[str, Any]:
        merged = {**values, **(changes or {})}
        return {name: value for name, value in merged.items() if value is not REMOVED}

    new_metadata = changed(saved.metadata, metadata)
    new_tensors = changed(saved.tensors, tensors)
    new_metadata["sha256"] = digest_of(new_tensors, new_metadata)
    save_file(new_tensors, file, {"optimum_cap_scores": json.dumps(new_metadata)})


FORGED_METADATA = {
    "units": ([["layer", "0"]], "'units' in its metadata has another type than expected"),
    "rows": ("abc", "'rows' in its metadata has another type than expected"),
    "model": (REMOVED, "its metadata has no 'model'"),
    "base_model": ([1], "'base_model' in its metadata has another type"),
    "settings": ([], "'settings' in its metadata has another type"),
}


@pytest.mark.parametrize("name", FORGED_METADATA)
def test_metadata_of_other_types_are_refused(name: str, scores: Path) -> None:
    value, message = FORGED_METADATA[name]
    forge(scores, {name: value})
    with pytest.raises(ValueError, match=rf"{re.escape(str(scores))} is damaged \({message}"):
        read_scores(scores)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset", 5),
        ("dataset", []),
        ("num_samples", "12"),
        ("num_samples", 0),
        ("seed", -1),
        ("seed", True),
        ("scored_tokens", ["answer"]),
        ("scored_units", "some"),
        ("estimator", {"name": "exact"}),
        ("exact_examples", 1.5),
        ("precision", "0.1"),
        ("precision", math.nan),
        ("max_length", 1),
        ("mlp_unit_size", "8"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(name: str, value: Any, scores: Path) -> None:
    settings = read_scores(scores).settings | {name: value}
    forge(scores, {"settings": settings})
    with pytest.raises(ValueError, match=f"the value of '{name}' in its settings cannot be right"):
        read_scores(scores)


def test_settings_that_are_unknown_or_missing_are_refused(scores: Path) -> None:
    whole, settings = scores.read_bytes(), read_scores(scores).settings
    forge(scores, {"settings": settings | {"sparsity": 0.5}})
    with pytest.raises(ValueError, match="its settings have an unknown field 'sparsity'"):
        read_scores(scores)
    scores.write_bytes(whole)
    del settings["seed"]
    forge(scores, {"settings": settings})
    with pytest.raises(ValueError, match="its settings have no 'seed'"):
        read_scores(scores)


FORGED_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (
        {"masked": REMOVED},
        r"it holds the tensors \['intact'\], not 'intact' and 'masked'",
    ),
    "unknown": ({"other": torch.ones(1).double()}, "it holds the tensors .*'other'"),
    "one loss": (
        {"masked": torch.ones(1, 1).double()},
        r"'masked' has shape \[1, 1\], but \[12, 12",
    ),
    "no rows": (
        {"intact": torch.tensor(1.0).double()},
        r"'intact' has shape \[\], but \[12\] fits",
    ),
    "dtype": ({"intact": torch.ones(12)}, "'intact' is torch.float32, not torch.float64"),
    "bytes": (
        {"intact": torch.ones(12).to(torch.float8_e4m3fn)},
        "'intact' is torch.float8_e4m3fn",
    ),
    "NaN": (
        {"intact": torch.full((12,), torch.nan).double()},
        "the loss of the intact model is not finite on 12 of 12 examples",
    ),
    "negative": (
        {"standard_errors": -torch.ones(12).double()},
        "it has negative standard errors",
    ),
}


@pytest.mark.parametrize("name", FORGED_TENSORS)
def test_tensors_that_do_not_fit_are_refused(name: str, scores: Path) -> None:
    changes, message = FORGED_TENSORS[name]
    forge(scores, tensors=changes)
    with pytest.raises(ValueError, match=rf"{re.escape(str(scores))} is damaged \(.*{message}"):
        read_scores(scores)


def test_losses_that_are_not_finite_where_a_unit_is_masked_are_read(scores: Path) -> None:
    masked = read_scores(scores).tensors["masked"]
    masked[0, 0], masked[1, 1] = torch.nan, torch.inf
    forge(scores, tensors={"masked": masked})
    assert read_scores(scores).tensors["masked"].isfinite().sum() == masked.numel() - 2


@pytest.mark.parametrize("depth", [900, 100_000])
def test_metadata_that_are_nested_deeply(depth: int, scores: Path) -> None:
    nested = '{"layout": 1, "settings": ' + "[" * depth + "]" * depth + "}"
    save_file(load_file(scores), scores, {"optimum_cap_scores": nested})
    with pytest.raises(ValueError, match=rf"{re.escape(str(scores))} is damaged \("):
        read_scores(scores)


def test_a_header_of_another_encoding(scores: Path) -> None:
    header = '{"masked\x1b[31mä":{}}'.encode("latin-1")
    scores.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"is not a scores file, or is damaged") as error:
        read_scores(scores)
    assert str(error.value).isprintable()


def test_another_safetensors_file(scores: Path) -> None:
    save_file(load_file(scores), scores)
    with pytest.raises(ValueError, match="is not a scores file: create one"):
        read_scores(scores)


def test_a_failed_write_keeps_the_old_file(scores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scores.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        CAPPruner(config(seed=1)).measure(tiny_model("llama"), tiny_tokenizer(), save_to=scores)
    assert scores.read_bytes() == before
    assert [file.name for file in scores.parent.iterdir()] == [scores.name]


# The commands


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model and its data, as flags."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("llama").save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    rows = [{"prompt": f"{n}+{n + 1}=", "completion": f"{2 * n + 1}"} for n in range(12)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"-m {folder / 'dense'} --device-map cpu --num-samples 6"
    return [*flags.split(), "--dataset", str(folder / "sums.jsonl")]


def run(command: Any, *arguments: Any) -> None:
    """Run a command without `optimum-cli` around it; errors come through."""
    parser = CommandParser()
    command.parse_args(parser)
    instance = command.__new__(command)
    instance.args = parser.parse_args([str(argument) for argument in arguments])
    instance.execute(instance.prepare())


def test_score_then_prune(
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "scores.safetensors"
    run(ScoreCommand, *flags, "-o", file, "--seed", 3, "--estimator", "first_order")
    out = capsys.readouterr().out
    assert "heads         12 scored in 3 layers" in out
    assert "estimator     first_order" in out
    rows = out.split("\n\n")[1].splitlines()
    assert rows[0].split() == ["layer.head", "score", "standard", "error"]
    assert len(rows) == 13

    # Data, seed and estimator are those of the file.
    unused = Estimator(lambda *args: pytest.fail("measured again"))
    monkeypatch.setitem(ESTIMATORS, "first_order", unused)
    pruning = ["-m", flags[1], "--recipe", "paper", "--sparsity", 0.4, "-o", tmp_path / "dir"]
    with pytest.raises(FileNotFoundError, match=r"sums\.jsonl, whose folder is not stored"):
        run(PruneCommand, *pruning, "--scores", file)
    run(PruneCommand, *pruning, "--scores", file, "--dataset", flags[-1])
    record = inspect_checkpoint(str(tmp_path / "dir")).record
    assert record.config["seed"] == 3
    assert record.config["estimator"] == "first_order"
    assert "scores" not in record.config
    listed = {row.split()[0]: float(row.split()[1]) for row in rows[1:]}
    for unit in record.scores:
        assert listed[f"{unit.layer}.{unit.unit}"] == pytest.approx(unit.score, abs=1e-6)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dir").pruning_record == record


def test_score_then_prune_all_units(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scores.safetensors"
    run(ScoreCommand, *flags, "-o", file, "--units", "all", "--mlp-unit-size", 8)
    out = capsys.readouterr().out
    assert "units         12 attention heads, 9 MLP units scored in 3 layers" in out
    rows = out.split("\n\n")[1].splitlines()
    assert rows[0].split()[0] == "layer.unit"
    listed = {row.split()[0] for row in rows[1:]}
    assert len(listed) == 21
    assert {"0.0", "2.3", "0.mlp.0", "2.mlp.2"} < listed

    # What is scored is that of the file, and the data file is beside it.
    shutil.copy(flags[-1], tmp_path)
    run(PruneCommand, "-m", flags[1], "--sparsity", 0.4, "-o", tmp_path / "dir", "--scores", file)
    out = capsys.readouterr().out
    assert "units         12 attention heads, 9 MLP units scored in 3 layers" in out
    assert "layer.unit (nats per token)" in out
    record = inspect_checkpoint(str(tmp_path / "dir")).record
    assert {score.label for score in record.scores} == listed
    assert record.config["mlp_unit_size"] == 8
    assert record.config["recipe"] == "paper"
    card = (tmp_path / "dir" / "README.md").read_text()
    assert "12 attention heads, 9 MLP units, on answer tokens" in card


def test_a_long_table_ends_with_the_number_of_rows_left_out() -> None:
    losses = CAPPruner(config()).measure(tiny_model("llama"), tiny_tokenizer())
    many = 20_004 // len(losses.units)
    losses = replace(losses, units=losses.units * many, masked=losses.masked.repeat(many, 1))
    lines = score_table(causal_scores(losses)).splitlines()
    assert len(lines) == 1 + 20_000 + 1
    assert lines[-1] == "and 4 more with lower scores"


def test_the_commands_refuse(flags: list[str], tmp_path: Path) -> None:
    file = tmp_path / "scores.safetensors"
    run(ScoreCommand, *flags, "-o", file)
    with pytest.raises(ValueError, match="exists: pass --overwrite to replace it"):
        run(ScoreCommand, *flags, "-o", file)
    run(ScoreCommand, *flags, "-o", file, "--overwrite")
    with pytest.raises(FileNotFoundError, match="of the output does not exist"):
        run(ScoreCommand, *flags, "-o", tmp_path / "no" / "scores.safetensors")
    with pytest.raises(ValueError, match="is a folder: name a file"):
        run(ScoreCommand, *flags, "-o", tmp_path)
    prune = ["-m", flags[1], "--recipe", "paper", "--sparsity", 0.4, "-o", tmp_path / "dir"]
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors does not exist"):
        run(PruneCommand, *prune, "--scores", tmp_path / "no.safetensors")
    prune += ["--dataset", flags[-1]]
    with pytest.raises(ValueError, match=r"seed 0\) than this config takes .* seed 1\)"):
        run(PruneCommand, *prune, "--scores", file, "--seed", 1)
    with pytest.raises(ValueError, match=r"^scores '.*' has no effect with recipe 'wanda'"):
        run(PruneCommand, *prune, "--scores", file, "--recipe", "wanda")


def test_score_table_is_sorted_by_need() -> None:
    losses = CAPPruner(config()).measure(tiny_model("llama"), tiny_tokenizer())
    losses.masked[4] = float("nan")
    rows = [row.split() for row in score_table(causal_scores(losses)).splitlines()[1:]]
    assert rows[0] == ["1.0", "+nan", "nan"]
    values = [float(row[1]) for row in rows[1:]]
    assert values == sorted(values, reverse=True)
