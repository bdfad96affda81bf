"""Pruning that was stopped resumes with the bytes of an undisturbed run."""

import dataclasses
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.checkpoints import on_disk, saved
from helpers.paths import TESTS
from helpers.pruning_runs import FIELDS, layer_files, pruned, weights
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.config import effective
from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.models.sites import Matrix
from optimum_cap.models.view import ModelView
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.cache import ExpectedWeights, LayerStore
from optimum_cap.pruning.matrix_pruner import MatrixPruner
from optimum_cap.runtime.files import TensorFiles


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the matrices that are pruned from now on, trials of sites included."""
    names: list[str] = []
    own = MatrixPruner.pruned

    def counting(self: MatrixPruner, matrix: Matrix, *args: Any) -> torch.Tensor:
        names.append(matrix.name)
        return own(self, matrix, *args)

    monkeypatch.setattr(MatrixPruner, "pruned", counting)
    return names


def stopped(
    model: PreTrainedModel,
    folder: Path,
    solved: list[str],
    after: int,
    monkeypatch: pytest.MonkeyPatch,
    **fields: Any,
) -> None:
    """Prune, and interrupt that once so many matrices have been pruned."""
    counting, until = MatrixPruner.pruned, len(solved) + after

    def interrupted(self: MatrixPruner, *args: Any) -> torch.Tensor:
        if len(solved) == until:
            raise KeyboardInterrupt
        return counting(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MatrixPruner, "pruned", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pruned(model, folder, **fields)


MEASURED: dict[str, Any] = {
    "recipe": "causal_fast",
    "allocation": "interventional",
    "target": "dense",
    "order": "projection",
}
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "measured": MEASURED,
    "estimated": {"recipe": "causal_fast", "target": "dense", "order": "projection"},
    "fast": {"recipe": "causal_fast"},
    "refined": {"recipe": "wanda", "refine": 2},
    "sparsegpt": {"recipe": "sparsegpt"},
    "2:4": {"pattern": "2:4"},
}


@pytest.mark.parametrize(
    ("name", "run"),
    [("llama", run) for run in RUNS]
    + [("gpt2", "default")]
    + [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (("mixtral", "default"), ("qwen2_moe", "default"), ("mixtral", "measured"))
    ],
)
def test_a_stopped_run_resumes_with_the_same_bytes(
    name: str, run: str, tmp_path: Path, solved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = RUNS[run]
    expected = pruned(tiny_model(name), None, **fields)
    total = len(solved)
    for after in (total // 4, total // 2):
        stopped(tiny_model(name), tmp_path, solved, after, monkeypatch, **fields)
    before = len(solved)
    resumed = pruned(tiny_model(name), tmp_path, **fields)
    assert len(solved) - before < total - total // 4, "what was done is not done again"
    assert weights(resumed) == weights(expected)
    assert resumed.pruning_record == expected.pruning_record


def of_single_examples(
    view: ModelView, examples: list[CalibrationExample], answer_weight: float, budget: Any
) -> LayerwisePass:
    return LayerwisePass(view, examples, answer_weight, memory_budget=1)


def test_estimates_of_the_first_run_stay(
    tmp_path: Path, solved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with less memory free would have others in the last bits, and other shares."""
    fields = {"recipe": "causal_fast"}
    expected = pruned(tiny_model("llama"), None, **fields)
    stopped(tiny_model("llama"), tmp_path, solved, 10, monkeypatch, **fields)
    monkeypatch.setattr("optimum_cap.pruning.fisher.LayerwisePass", of_single_examples)
    resumed = pruned(tiny_model("llama"), tmp_path, **fields)
    assert resumed.pruning_record.sensitivities == expected.pruning_record.sensitivities
    assert weights(resumed) == weights(expected)


def test_an_interrupt_says_how_to_resume(
    tmp_path: Path,
    solved: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stopped(tiny_model("llama"), tmp_path, solved, 10, monkeypatch, recipe="wanda")
    assert "load the model again before you use or prune it; the same call then resumes here" in (
        caplog.text
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(
    dtype: torch.dtype, tmp_path: Path, solved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights(pruned(tiny_model("llama", dtype=dtype), None))
    stopped(tiny_model("llama", dtype=dtype), tmp_path, solved, 10, monkeypatch)
    kept = [safetensors.torch.load_file(file)["tensor"] for file in layer_files(tmp_path)]
    assert {tensor.dtype for tensor in kept if tensor.is_floating_point()} == {dtype}
    assert weights(pruned(tiny_model("llama", dtype=dtype), tmp_path)) == expected


def test_layers_are_kept_as_they_are_stored_where_nothing_is_widened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    monkeypatch.setattr("optimum_cap.models.modes._narrow_on_cpu", lambda model: iter(()))
    pruned(tiny_model("llama", dtype=torch.bfloat16), tmp_path)
    kept = [safetensors.torch.load_file(file)["tensor"] for file in layer_files(tmp_path)]
    assert {tensor.dtype for tensor in kept if tensor.is_floating_point()} == {torch.bfloat16}


def test_a_finished_run_waits_until_it_is_saved(tmp_path: Path, solved: list[str]) -> None:
    cache = tmp_path / "cache"
    model = pruned(tiny_model("llama"), cache)
    assert layer_files(cache)
    before = len(solved)
    again = pruned(tiny_model("llama"), cache)
    assert len(solved) == before, "all of it is known"
    assert weights(again) == weights(model)
    again.save_pretrained(tmp_path / "saved")
    assert not layer_files(cache)
    assert list(cache.rglob("*.safetensors")), "sensitivities stay"
    model.save_pretrained(tmp_path / "saved too")


def test_a_model_that_cannot_be_saved_keeps_its_layers(tmp_path: Path) -> None:
    cache, place = tmp_path / "cache", tmp_path / "a file"
    place.write_text("in the way")
    model = pruned(tiny_model("llama"), cache, recipe="wanda")
    with pytest.raises(FileExistsError, match="a file"):
        model.save_pretrained(place)
    assert layer_files(cache)


def test_a_push_that_fails_keeps_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruned(tiny_model("llama"), tmp_path, recipe="wanda")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")

    with monkeypatch.context() as patch:
        patch.setattr("optimum_cap.checkpoint.saving.upload", fail)
        with pytest.raises(ConnectionError):
            model.push_to_hub("somebody/something")
    assert layer_files(tmp_path)
    commit = SimpleNamespace(repo_url=SimpleNamespace(repo_id="somebody/something"))
    monkeypatch.setattr("optimum_cap.checkpoint.saving.upload", lambda *args, **kwargs: commit)
    assert model.push_to_hub("somebody/something") is commit
    assert model.name_or_path == "somebody/something"
    assert not layer_files(tmp_path)


def test_saving_again_deletes_nothing_of_another_run(tmp_path: Path) -> None:
    model = pruned(tiny_model("llama"), tmp_path, recipe="wanda")
    model.save_pretrained(tmp_path / "first")
    assert not layer_files(tmp_path)
    pruned(tiny_model("llama"), tmp_path, recipe="wanda")
    model.save_pretrained(tmp_path / "second")
    assert layer_files(tmp_path)


def test_without_room_no_layers_are_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    solved: list[str],
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
    stopped(tiny_model("llama"), tmp_path, solved, 10, monkeypatch, recipe="wanda")
    assert not layer_files(tmp_path)
    assert f"{tmp_path} has 0.0 GB of free space, but storing pruned layers needs" in caplog.text
    assert "resumes here" not in caplog.text


def test_layers_that_are_kept_already_need_no_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[str]
) -> None:
    stopped(tiny_model("llama"), tmp_path, solved, 8, monkeypatch, recipe="wanda")
    held = sum(file.stat().st_size for file in layer_files(tmp_path))
    needed = sum(
        matrix.numel() * 4
        for name, matrix in tiny_model("llama").named_parameters()
        if "proj" in name
    )
    usage = namedtuple("usage", "total used free")
    # Seven more matrices are another layer, which is stored with its counts.
    for free, count in ((2 * needed - held - 1, 0), (2 * needed - held, 8)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: usage(0, 0, free))
        before = len(layer_files(tmp_path))
        stopped(tiny_model("llama"), tmp_path, solved, 8, monkeypatch, recipe="wanda")
        assert len(layer_files(tmp_path)) == before + count


@pytest.mark.parametrize(
    "change",
    [
        {"sparsity": 0.6},
        {"answer_weight": 1.0},
        {"num_samples": 7},
        {"pattern": "2:4"},
        {"refine": 1},
        {"refine_learning_rate": 1e-3},
    ],
)
def test_another_run_meets_nothing(
    change: dict[str, Any], tmp_path: Path, solved: list[str]
) -> None:
    pruned(tiny_model("llama"), tmp_path)
    before, count = solved.copy(), len(solved)
    config = CAPConfig(**effective({**FIELDS, "resume_dir": tmp_path}, change))
    CAPPruner(config).prune(tiny_model("llama"), tiny_tokenizer())
    assert solved[count:] == before


LATER: list[dict[str, Any]] = [
    {"allocation_bound": 0.05},
    {"target": "local"},
    {"order": "layer"},
    {"memory_budget": 4000},
]


@pytest.mark.parametrize("change", [*LATER, {"refine": 1}])
def test_measured_sensitivities_are_used_again_when_later_settings_change(
    change: dict[str, Any], tmp_path: Path, solved: list[str]
) -> None:
    pruned(tiny_model("llama"), tmp_path, **MEASURED)
    count = len(solved)
    pruned(tiny_model("llama"), tmp_path, **{**MEASURED, **change})
    layers = 0 if "memory_budget" in change else count // 2
    assert len(solved) - count == layers


@pytest.mark.parametrize("change", [LATER[0], {"target": "dense"}, {"refine": 0}])
def test_estimated_sensitivities_are_used_again_when_later_settings_change(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[str]
) -> None:
    pruned(tiny_model("llama"), tmp_path)
    count = len(solved)
    monkeypatch.setattr("optimum_cap.pruning.fisher._estimate", None)
    pruned(tiny_model("llama"), tmp_path, **change)
    assert len(solved) - count == count


def test_another_layout_meets_nothing(
    tmp_path: Path, solved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned(tiny_model("llama"), tmp_path, recipe="wanda")
    before = len(solved)
    monkeypatch.setattr("optimum_cap.pruning.cache._LAYOUT", 99)
    pruned(tiny_model("llama"), tmp_path, recipe="wanda")
    assert len(solved) == 2 * before


def test_other_scores_meet_nothing(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"criterion": "causal_score", "allocation": "interventional"}
    config = CAPConfig(**FIELDS, resume_dir=tmp_path, **fields)
    losses = CAPPruner(config).measure(tiny_model("llama"), tiny_tokenizer())
    other = dataclasses.replace(losses, masked=losses.masked.flip(0))
    found = []
    for own, folder in ((losses, tmp_path), (other, tmp_path), (other, None)):
        pruner = CAPPruner(dataclasses.replace(config, resume_dir=folder))
        found.append(pruner.prune(tiny_model("llama"), tiny_tokenizer(), losses=own))
    assert weights(found[1]) == weights(found[2])
    sensitivities = [model.pruning_record.sensitivities for model in found]
    assert sensitivities[1] == sensitivities[2] != sensitivities[0]


def test_another_model_meets_nothing(tmp_path: Path, solved: list[str]) -> None:
    pruned(tiny_model("llama"), tmp_path)
    before, other = len(solved), tiny_model("llama")
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight[3, 4] += 1
    pruned(other, tmp_path)
    assert len(solved) == 2 * before


def test_what_is_damaged_is_done_again(
    tmp_path: Path, solved: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    expected = weights(pruned(tiny_model("llama"), tmp_path))
    before = len(solved)
    damaged = layer_files(tmp_path)[3]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert weights(pruned(tiny_model("llama"), tmp_path)) == expected
    assert f"{damaged} is damaged" in caplog.text
    assert 0 < len(solved) - before <= 7, "one layer at most"


def forge(file: Path, folder: Path, tensor: torch.Tensor) -> None:
    """Replace what is stored in a file, with a checksum that is right."""
    key = file.relative_to(folder).with_suffix("").as_posix()
    TensorFiles(folder).write(key, tensor)


FORGERIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one weight": lambda weight: torch.ones(1, 1, dtype=weight.dtype),
    "transposed": lambda weight: weight.T[: len(weight) // 2].contiguous(),
    "another dtype": lambda weight: weight.double(),
    "dense": torch.ones_like,
    "all zero": torch.zeros_like,
    "NaN": lambda weight: weight.masked_fill(weight != 0, torch.nan),
    "infinite": lambda weight: weight.masked_fill(weight != 0, torch.inf),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_layers_that_cannot_be_of_this_run_are_pruned_again(
    forgery: str, tmp_path: Path, solved: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    expected = weights(pruned(tiny_model("llama"), tmp_path, recipe="wanda"))
    before = len(solved)
    stored = {file: safetensors.torch.load_file(file)["tensor"] for file in layer_files(tmp_path)}
    file = next(file for file, tensor in stored.items() if tensor.is_floating_point())
    forge(file, tmp_path, FORGERIES[forgery](stored[file]))
    assert weights(pruned(tiny_model("llama"), tmp_path, recipe="wanda")) == expected
    assert f"{file} is damaged (" in caplog.text
    assert "): its content is computed again" in caplog.text
    assert len(solved) - before == 7, "one layer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda counts: -counts, "it holds a negative number"),
        (lambda counts: counts[:1], r"it holds \[1, 7\] torch.int64, not \[2, 7\] torch.int64"),
        (lambda counts: counts.double(), "torch.float64, not"),
        (lambda counts: counts // 2, r"\d+ of its weights are zero, not \d+"),
    ],
)
def test_counts_that_cannot_be_of_this_run(
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
    tmp_path: Path,
    solved: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = pruned(tiny_model("llama"), tmp_path, recipe="wanda")
    before = len(solved)
    file = next(file for file in layer_files(tmp_path) if file.stem == "1")
    forge(file, tmp_path, change(safetensors.torch.load_file(file)["tensor"]))
    again = pruned(tiny_model("llama"), tmp_path, recipe="wanda")
    assert weights(again) == weights(expected)
    assert again.pruning_record == expected.pruning_record
    assert re.search(message, caplog.text)
    assert len(solved) - before == 7, "one layer"


def test_a_layer_with_fewer_zeros_than_this_run_asks_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its counts agree with it, as if both were replaced."""
    matrix, dense = ModelView.of(tiny_model("llama")).matrices[0], torch.ones(4, 4)
    store = LayerStore(TensorFiles(tmp_path), "layers", 64, writes=True)
    store.put(matrix, dense)
    store.commit(0, {matrix: 5})
    for zeros, found in ((0, True), (8, False)):
        layer = store.get(0, {matrix: ExpectedWeights((4, 4), torch.float32, zeros)})
        assert (layer is not None) == found
    assert "(0 of its weights are zero, but at least 8 have to be)" in caplog.text


@pytest.mark.parametrize("allocation", ["fisher", "interventional"])
@pytest.mark.parametrize("change", [lambda tensor: tensor[..., :1], lambda tensor: tensor.float()])
def test_sensitivities_that_cannot_be_of_this_run_are_measured_again(
    allocation: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = pruned(tiny_model("llama"), tmp_path, allocation=allocation)
    for file in tmp_path.glob("*/*/*.safetensors"):
        if file not in layer_files(tmp_path):
            stored = safetensors.torch.load_file(file)["tensor"]
            forge(file, tmp_path, change(stored).contiguous())
    again = pruned(tiny_model("llama"), tmp_path, allocation=allocation)
    assert again.pruning_record == expected.pruning_record
    assert weights(again) == weights(expected)
    assert "is damaged (it holds [" in caplog.text


@pytest.mark.parametrize("count", range(1, 9))
def test_layers_that_another_run_deletes_meanwhile_are_pruned_again(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[str]
) -> None:
    """They are deleted once so many files of them have been read, the last one of a layer too."""
    expected = weights(pruned(tiny_model("llama"), tmp_path, recipe="wanda"))
    before, own, found = len(solved), TensorFiles.read, []

    def read(self: TensorFiles, key: str, *args: Any) -> torch.Tensor | None:
        tensor = own(self, key, *args)
        found.append(tensor)
        if len(found) == count:
            shutil.rmtree(tmp_path / key.rpartition("/")[0])
        return tensor

    monkeypatch.setattr(TensorFiles, "read", read)
    assert weights(pruned(tiny_model("llama"), tmp_path, recipe="wanda")) == expected
    assert len(solved) - before == (14 if count == 8 else 21)


def test_measured_sites_are_not_measured_again(
    tmp_path: Path, solved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"criterion": "causal_score", "allocation": "interventional"}
    expected = pruned(tiny_model("mixtral"), None, **fields)
    total = len(solved)
    stopped(tiny_model("mixtral"), tmp_path, solved, 11, monkeypatch, **fields)
    before = len(solved)
    assert weights(pruned(tiny_model("mixtral"), tmp_path, **fields)) == weights(expected)
    # Four matrices of the attention, two of each of three experts.
    assert len(solved) - before == total - 10


def test_an_offloaded_model_resumes(
    tmp_path: Path, solved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = saved(tmp_path / "dense"), tmp_path / "cache"
    expected = pruned(on_disk(folder, tmp_path / "first"), None)
    expected.save_pretrained(tmp_path / "expected")
    stopped(on_disk(folder, tmp_path / "second"), cache, solved, 10, monkeypatch)
    assert layer_files(cache)
    pruned(on_disk(folder, tmp_path / "third"), cache).save_pretrained(tmp_path / "resumed")
    files = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("expected", "resumed")
    ]
    assert files[0] == files[1]


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from helpers.pruning_runs import pruned
from helpers.tiny_models import tiny_model

torch.set_num_threads(1)
pruned(tiny_model("llama"), sys.argv[1]).save_pretrained(sys.argv[2])
"""


@pytest.mark.slow
def test_it_resumes_wherever_it_was_killed(tmp_path: Path) -> None:
    def start(cache: str, output: str) -> "subprocess.Popen[bytes]":
        script = SCRIPT.format(tests=str(TESTS))
        return subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / cache, tmp_path / output],
            stderr=subprocess.DEVNULL,
        )

    assert start("undisturbed cache", "expected").wait(280) == 0
    for files in (2, 7, 14, 22):
        process = start("cache", "output")
        while len(list((tmp_path / "cache").rglob("*.safetensors"))) < files:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "output").exists()
    assert start("cache", "output").wait(280) == 0
    expected, output = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("expected", "output")
    )
    assert output == expected
    assert not layer_files(tmp_path / "cache")
