"""Scoring that was stopped resumes with the bytes of an undisturbed run."""

import copy
import importlib
import linecache
import math
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.calibration import ROWS
from helpers.out_of_memory import OUT_OF_MEMORY, limit_memory
from helpers.paths import TESTS
from helpers.score_runs import BUDGET, chunk_files, digest, examples, same_bytes, score
from helpers.tiny_models import tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.data.batches import batches
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.sites import SiteUnit
from optimum_cap.models.view import ModelView
from optimum_cap.runtime.digests import code_digest
from optimum_cap.runtime.files import TensorFiles
from optimum_cap.runtime.resume import resume_hint
from optimum_cap.scoring.cache import ScoreCache
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.sampling import adaptive_losses, control_variate_losses
from optimum_cap.scoring.scores import UnitLosses, causal_scores
from optimum_cap.scoring.settings import ScoringSettings
from optimum_cap.scoring.wavefront import Wavefront


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The units of each chunk that is measured from now on."""
    counts: list[int] = []
    own = Wavefront.masked_losses

    def masked_losses(self: Wavefront, units: list[SiteUnit]) -> torch.Tensor:
        losses = own(self, units)
        if any(unit.region for _, unit in units):  # not the check of streams
            counts.append(len(units))
        return losses

    monkeypatch.setattr(Wavefront, "masked_losses", masked_losses)
    return counts


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_second_run_measures_nothing(name: str, tmp_path: Path, measured: list[int]) -> None:
    model = tiny_model(name)
    expected = score(model, None)
    assert same_bytes(score(model, tmp_path), expected)
    chunks = len(measured) // 2
    assert len(measured) == 2 * chunks > 6
    assert same_bytes(score(model, tmp_path), expected)
    assert len(measured) == 2 * chunks
    assert not list(tmp_path.rglob("*.tmp"))


def test_half_precision_weights_are_hashed_as_they_are_stored(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    first = score(model, tmp_path)
    files = chunk_files(tmp_path)
    assert same_bytes(score(model, tmp_path), first)
    assert chunk_files(tmp_path) == files


def test_an_interrupt_keeps_finished_chunks_and_says_how_to_resume(
    llama: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = score(llama, None)
    total = len(measured)
    with monkeypatch.context() as patch:
        counting = Wavefront.masked_losses

        def interrupted(self: Wavefront, units: list[SiteUnit]) -> torch.Tensor:
            if len(measured) == total + 5:
                raise KeyboardInterrupt
            return counting(self, units)

        patch.setattr(Wavefront, "masked_losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(llama, tmp_path)
    (said,) = caplog.messages
    assert re.fullmatch(
        rf"scoring was stopped: finished results are stored in {re.escape(str(tmp_path))}; run "
        "the same command again to resume",
        said,
    )
    assert same_bytes(score(llama, tmp_path), expected)
    assert len(measured) == 2 * total


@pytest.mark.parametrize("estimate", [control_variate_losses, adaptive_losses])
def test_sampled_estimates_resume_with_the_same_bytes(
    estimate: Callable[..., UnitLosses],
    llama: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: list[int],
) -> None:
    sites, rows = find_sites(llama), examples(12)

    def run(cache: ScoreCache | None) -> UnitLosses:
        return estimate(
            ModelView(llama, sites),
            rows,
            settings=ScoringSettings(memory_budget=BUDGET, cache=cache),
            exact_examples=4,
        )

    expected = run(None)
    total = len(measured)
    counting = Wavefront.masked_losses

    def interrupted(self: Wavefront, units: list[SiteUnit]) -> torch.Tensor:
        if len(measured) == total + 4:
            raise KeyboardInterrupt
        return counting(self, units)

    with monkeypatch.context() as patch:
        patch.setattr(Wavefront, "masked_losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(ScoreCache(tmp_path, llama))
    found = run(ScoreCache(tmp_path, llama))
    assert same_bytes(found, expected)
    assert found.standard_errors is not None
    assert expected.standard_errors is not None
    assert torch.equal(found.standard_errors, expected.standard_errors)
    assert len(measured) == 2 * total


def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    files = TensorFiles(tmp_path)
    for value in (1, 2):
        files.write("key", torch.tensor(value), replace=False)
        found = files.read("key", (), torch.int64)
        assert found is not None
        assert int(found) == 1
    assert not files.failed
    assert [file.name for file in tmp_path.iterdir()] == ["key.safetensors"]


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.fsync

    def of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        own(descriptor)

    monkeypatch.setattr("os.fsync", of_files)
    files = TensorFiles(tmp_path)
    files.write("key", torch.tensor(1))
    assert not files.failed
    assert int(files.read("key", (), torch.int64) or 0) == 1


def test_hooks_of_transformers_are_no_other_code(llama: PreTrainedModel) -> None:
    before = code_digest(llama)
    llama(torch.ones(1, 3, dtype=torch.long), output_hidden_states=True, use_cache=False)
    assert any(module._forward_hooks for module in llama.modules())
    assert code_digest(llama) == before
    mlp = llama.model.layers[0].mlp
    mlp.forward = lambda hidden: hidden
    assert code_digest(llama) != before


def test_a_class_whose_module_is_gone(llama: PreTrainedModel) -> None:
    before = code_digest(llama)
    llama.__class__ = type("Own", (type(llama),), {"__module__": "gone"})
    assert code_digest(llama) != before


def test_what_could_not_be_written_is_not_said_to_be_kept(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    cache = ScoreCache(tmp_path / "file" / "scores", llama)
    assert resume_hint(cache).startswith(f"finished results are stored in {tmp_path}")
    cache.files.write("key", torch.zeros(1))
    assert resume_hint(cache).startswith(f"only some finished results are stored in {tmp_path}")


def test_code_of_a_repository_at_another_revision_is_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for factor in (1, 2):
        source = f"""
            from transformers import LlamaForCausalLM
            def scaled(logits):
                return {factor} * logits
            class Remote(LlamaForCausalLM):
                pass
        """
        (tmp_path / "remote_code.py").write_text(textwrap.dedent(source))
        sys.modules.pop("remote_code", None)
        linecache.clearcache()
        importlib.invalidate_caches()
        module = importlib.import_module("remote_code")
        digests.append(code_digest(module.Remote(tiny_model("llama").config)))
    assert len(set(digests)) == 2


def change_weight(model: PreTrainedModel) -> None:
    with torch.no_grad():
        weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(math.inf))


def add_hook(model: PreTrainedModel) -> None:
    def halve(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output / 2

    model.model.layers[1].post_attention_layernorm.register_forward_hook(halve)


CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    "weight": change_weight,
    "buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(1.001),
    "config": lambda model: setattr(model.config, "rms_norm_eps", 1e-4),
    "attention": lambda model: model.set_attn_implementation("eager"),
    "module": lambda model: setattr(model.model.layers[1].mlp, "act_fn", nn.ReLU()),
    "hook": add_hook,
    "threads": lambda model: torch.set_num_threads(2),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_input_meets_no_old_chunk(
    change: str, llama: PreTrainedModel, tmp_path: Path, measured: list[int]
) -> None:
    score(llama, tmp_path)
    chunks = len(measured)
    CHANGES[change](llama)
    assert same_bytes(score(llama, tmp_path), score(llama, None))
    assert len(measured) == 3 * chunks


@pytest.mark.parametrize("change", ["token", "scored", "version"])
def test_changed_data_or_versions_meet_no_old_chunk(
    change: str,
    llama: PreTrainedModel,
    tmp_path: Path,
    measured: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score(llama, tmp_path)
    first, rows = len(measured), examples()
    if change == "token":
        rows[0].input_ids[3] += 1
    elif change == "scored":
        rows[0].scored[-1] = False
    else:
        monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    exact_losses(
        ModelView.of(llama),
        rows,
        settings=ScoringSettings(memory_budget=BUDGET, cache=ScoreCache(tmp_path, llama)),
    )
    again = len(measured) - first
    of_one_batch = first // 6  # a batch of one example
    assert again == (first if change == "version" else of_one_batch)


def test_what_is_free_later_does_not_change_the_chunks(
    llama: PreTrainedModel, tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, cache = find_sites(llama), ScoreCache(tmp_path, llama)
    expected = exact_losses(
        ModelView(llama, sites),
        examples(),
        settings=ScoringSettings(memory_budget="auto", cache=cache),
    )
    chunks = len(measured)
    monkeypatch.setattr("optimum_cap.scoring.exact.budget_bytes", lambda budget, model: 1)
    again = exact_losses(
        ModelView(llama, sites),
        examples(),
        settings=ScoringSettings(memory_budget="auto", cache=cache),
    )
    assert len(measured) == chunks
    assert same_bytes(again, expected)
    other = exact_losses(
        ModelView(llama, sites),
        examples(5),
        settings=ScoringSettings(memory_budget="auto", cache=cache),
    )
    assert set(measured[chunks:]) == {1}
    torch.testing.assert_close(other.masked, expected.masked[:, :5], rtol=1e-5, atol=0)


def test_the_way_that_experts_are_computed_is_part_of_the_key(tmp_path: Path) -> None:
    batch = batches(examples(), 2)[0]
    for way, losses in (("eager", [1.0, 2.0]), ("grouped_mm", [3.0, 4.0])):
        model = tiny_model("mixtral")
        model.set_experts_implementation(way)
        cache = ScoreCache(tmp_path, model)
        assert cache.get(batch, []) is None
        cache.put(batch, [], torch.tensor(losses, dtype=torch.float64))
        assert cache.get(batch, []).tolist() == losses


def test_what_was_found_first_counts(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache, other = ScoreCache(tmp_path, llama), ScoreCache(tmp_path, llama)

    def meanwhile() -> int:
        assert other.get_or_measure("budget", examples(), [], lambda: 7) == 7
        return 8

    assert cache.get_or_measure("budget", examples(), [], meanwhile) == 7
    (file,) = chunk_files(tmp_path)
    file.write_bytes(b"damaged")
    assert cache.get_or_measure("budget", examples(), [], lambda: 9) == 9
    assert cache.get_or_measure("budget", examples(), [], lambda: 10) == 9


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files, stored = TensorFiles(tmp_path), torch.tensor([[1.5, math.inf], [math.nan, 2]]).double()
    files.write("model/chunk", stored)
    (file,) = chunk_files(tmp_path)
    intact = file.read_bytes()
    for position in range(len(intact)):
        file.write_bytes(intact[:position] + bytes([intact[position] ^ 4]) + intact[position + 1 :])
        caplog.clear()
        found = files.read("model/chunk", (2, 2), torch.float64)
        assert found is None or found.numpy().tobytes() == stored.numpy().tobytes(), position
        assert (found is None) == ("is damaged" in caplog.text)
    for length in range(len(intact)):
        file.write_bytes(intact[:length])
        assert files.read("model/chunk", (2, 2), torch.float64) is None
    file.write_bytes(intact)
    file.rename(file.with_name("other.safetensors"))
    assert files.read("model/other", (2, 2), torch.float64) is None, (
        "it is the chunk of another key"
    )


def test_a_damaged_chunk_is_said_and_measured_again(
    llama: PreTrainedModel, tmp_path: Path, measured: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    expected = score(llama, tmp_path)
    chunks = len(measured)
    damaged = max(chunk_files(tmp_path), key=lambda file: file.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    assert same_bytes(score(llama, tmp_path), expected)
    assert len(measured) == chunks + 1
    (said,) = caplog.messages
    assert f"{damaged} is damaged (its checksum is wrong)" in said
    caplog.clear()
    assert same_bytes(score(llama, tmp_path), expected)
    assert not caplog.messages


@pytest.mark.parametrize(
    "change", [lambda losses: losses[..., :0], lambda losses: losses.float(), torch.Tensor.flatten]
)
def test_losses_that_cannot_be_of_a_chunk_are_measured_again(
    change: Callable[[torch.Tensor], torch.Tensor],
    llama: PreTrainedModel,
    tmp_path: Path,
    measured: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = score(llama, tmp_path)
    chunks, files = len(measured), TensorFiles(tmp_path)
    stored = {file: load_file(file)["tensor"] for file in chunk_files(tmp_path)}
    forged = next(file for file, losses in stored.items() if losses.ndim == 2)
    key = forged.relative_to(tmp_path).with_suffix("").as_posix()
    files.write(key, change(stored[forged]).contiguous())  # with a checksum that is right
    assert same_bytes(score(llama, tmp_path), expected)
    assert len(measured) == chunks + 1
    assert f"{forged} is damaged (it holds [" in caplog.text


def test_a_negative_number_is_measured_again(
    llama: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ScoreCache(tmp_path, llama)
    assert cache.get_or_measure("budget", examples(), [], lambda: -1) == -1
    assert cache.get_or_measure("budget", examples(), [], lambda: 8) == 8
    assert "is damaged (it holds -1, a negative number)" in caplog.text


def test_losses_that_overflow_survive_the_cache(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Wavefront.masked_losses

    def overflowing(self: Wavefront, units: list[SiteUnit]) -> torch.Tensor:
        losses = own(self, units)
        for row, (site, unit) in enumerate(units):
            if (site.layer, unit.index) == (1, 2):
                losses[row, 0] = math.inf
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(Wavefront, "masked_losses", overflowing)
        first = score(llama, tmp_path)
    again = score(llama, tmp_path)
    assert same_bytes(first, again)
    scores = causal_scores(again)
    assert scores.nonfinite.tolist().count(0) == len(again.units) - 1
    assert scores.nonfinite.sum() == 6, "the six examples are batches of one"


@pytest.mark.slow
def test_out_of_memory_meets_the_cache(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    """Halves of a batch have chunks of their own, which the next run finds as well."""
    sites = find_sites(llama)
    limit_memory(monkeypatch, 40, OUT_OF_MEMORY["cuda"])
    first = exact_losses(
        ModelView(llama, sites),
        examples(),
        settings=ScoringSettings(cache=ScoreCache(tmp_path, llama)),
    )
    chunks = len(measured)
    again = exact_losses(
        ModelView(llama, sites),
        examples(),
        settings=ScoringSettings(cache=ScoreCache(tmp_path, llama)),
    )
    assert len(measured) == chunks
    assert same_bytes(first, again)


def test_pruning_with_a_cache_is_pruning(llama: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    settings = {"recipe": "paper", "dataset": ROWS, "num_samples": 12}
    expected = CAPPruner(CAPConfig(0.3, **settings)).prune(copy.deepcopy(llama), tokenizer)
    for sparsity in (0.5, 0.3):
        config = CAPConfig(sparsity, **settings, resume_dir=tmp_path)
        pruned = CAPPruner(config).prune(copy.deepcopy(llama), tokenizer)
    assert all(
        torch.equal(tensor, pruned.state_dict()[name])
        for name, tensor in expected.state_dict().items()
    )
    assert pruned.pruning_record == expected.pruning_record, "and the folder is not in the record"


# Processes

SCRIPT = """
import resource, sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from helpers.score_runs import digest, score
from helpers.tiny_models import tiny_model
from optimum_cap.scoring.wavefront import Wavefront

def main(folder, largest_file=None):
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest_file), resource.RLIM_INFINITY))
    own = Wavefront.masked_losses

    def masked_losses(self, units):
        losses = own(self, units)
        if any(unit.region for _, unit in units):  # not the check of streams
            print("measured", flush=True)
        return losses

    Wavefront.masked_losses = masked_losses
    torch.set_num_threads(1)
    print(digest(score(tiny_model("llama"), Path(folder), count=60)))

main(*sys.argv[1:])
"""


def undisturbed() -> str:
    return digest(score(tiny_model("llama"), None, count=60))


def start(*arguments: object) -> subprocess.Popen[str]:
    """Score 60 examples of a Llama in a process of its own."""
    script = SCRIPT.format(tests=str(TESTS))
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Return the digest of the losses, and what was said."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out.splitlines()[-1], err


def masked_chunks(folder: Path) -> int:
    """The number of chunks that hold losses of masked units: they have two dimensions."""
    shape = re.compile(rb'"shape":\[\d+,\d+\]')
    return sum(bool(shape.search(file.read_bytes())) for file in chunk_files(folder))


@pytest.mark.slow
def test_a_killed_process_loses_at_most_one_chunk(tmp_path: Path, measured: list[int]) -> None:
    expected = undisturbed()
    total = len(measured)
    kept = 0
    for count in (30, 150):
        process = start(tmp_path)
        while len(chunk_files(tmp_path)) < count:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        finished = process.communicate()[0].count("measured")
        assert finished - 1 <= masked_chunks(tmp_path) - kept <= finished
        kept = masked_chunks(tmp_path)
    assert 0 < kept < total
    assert digest(score(tiny_model("llama"), tmp_path, count=60)) == expected
    assert len(measured) == total + total - kept


@pytest.mark.slow
def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    processes = [start(tmp_path), start(tmp_path)]
    results = [ended(process) for process in processes]
    expected = undisturbed()
    for result, err in results:
        assert result == expected
        assert "damaged" not in err
    assert digest(score(tiny_model("llama"), tmp_path, count=60)) == expected
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_a_full_disk_is_said_once_and_loses_nothing(tmp_path: Path) -> None:
    result, err = ended(start(tmp_path, 100))
    assert result == undisturbed()
    assert err.count("cannot be written (File too large)") == 1
    assert "loses further results if it is interrupted" in err
    assert not list(tmp_path.rglob("*.*")), "no part of a file stays"
