"""Several processes score together: the bytes of one alone; a dead one stops the others."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.processes import ranks
from helpers.pruning_runs import pruned
from helpers.score_runs import chunk_files, digest, score
from helpers.tiny_models import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from optimum_cap.progress import PROGRESS
from optimum_cap.runtime.digests import digest_of
from optimum_cap.runtime.distributed import ProcessGroup

SCRIPT = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from helpers.score_runs import digest, score
from helpers.tiny_models import tiny_model
from optimum_cap.scoring.wavefront import Wavefront

def main(folder, dies_after=None):
    own, measured = Wavefront.masked_losses, []

    def masked_losses(self, jobs):
        measured.append(jobs)
        if os.environ["RANK"] == "1" and len(measured) == int(dies_after or -1):
            os.kill(os.getpid(), signal.SIGKILL)
        return own(self, jobs)

    Wavefront.masked_losses = masked_losses
    torch.set_num_threads(1)
    losses = score(tiny_model("llama"), Path(folder) if folder != "none" else None, count=24)
    print(digest(losses), len(measured))

main(*sys.argv[1:])
"""


@given(costs=st.lists(st.integers(1, 100), max_size=40), size=st.integers(1, 5))
def test_shares_are_consecutive_complete_and_about_equal(costs: list[int], size: int) -> None:
    shares = [ProcessGroup(rank, size).share(costs) for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(len(costs)))
    for share in shares:
        assert sum(costs[index] for index in share) < sum(costs) / size + max(costs, default=1)


def test_one_process_is_a_process_group_of_its_own() -> None:
    process_group = ProcessGroup.current()
    assert process_group == ProcessGroup(0, 1)
    assert process_group.broadcast(3) == 3
    assert process_group.all_gather({"a": 1}) == [{"a": 1}]
    assert process_group.share([1, 2, 3]) == [0, 1, 2]
    assert process_group.placement("auto") == "auto"


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one_and_a_dead_one_stops_the_other(tmp_path: Path) -> None:
    expected = digest(score(tiny_model("llama"), tmp_path / "alone", count=24))
    chunks = len(chunk_files(tmp_path / "alone")) - 24  # of them the intact losses

    survivor, dead = ranks(tmp_path / "scores", 10, script=SCRIPT)
    assert dead.returncode == -9
    assert survivor.returncode == 1
    error = survivor.stderr.strip().splitlines()[-1]
    assert "process 0 of 2 lost the connection to another process, which stopped" in error
    assert f"stored in {tmp_path / 'scores'}; run the same command again to resume" in error

    first, second = (done.stdout.split() for done in ranks(tmp_path / "scores", script=SCRIPT))
    assert first[0] == second[0] == expected
    left = int(first[1]) + int(second[1])
    assert 0 < left < chunks - 10, "what both had finished is not measured again"
    assert min(int(first[1]), int(second[1])) > left // 4, "what was left is shared out"

    names = [
        [file.relative_to(folder) for file in chunk_files(folder)]
        for folder in (tmp_path / "alone", tmp_path / "scores")
    ]
    assert names[0] == names[1]


def test_processes_with_different_inputs_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessGroup, "all_gather", lambda self, value: ["a", value, "a"])
    ProcessGroup(1, 3).check_consistent(lambda: "a", "model")
    with pytest.raises(
        ValueError, match=r"process\(es\) 1 of 3 got a different model than process 0"
    ):
        ProcessGroup(1, 3).check_consistent(lambda: "b", "model")


@pytest.mark.slow
def test_ranks_with_different_models_stop() -> None:
    different = SCRIPT.replace(
        'tiny_model("llama")', 'tiny_model("llama", int(os.environ["RANK"]))'
    )
    for done in ranks("none", script=different):
        assert done.returncode == 1
        assert "process(es) 1 of 2 got a different model, calibration set or" in done.stderr


@pytest.mark.slow
def test_ranks_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS, "bars")
    first, second = ranks("none", script=SCRIPT)
    assert first.stdout.split()[0] == second.stdout.split()[0]
    assert first.stdout.split()[0] == digest(score(tiny_model("llama"), None, count=24))
    assert "Scoring" in first.stderr
    assert "Scoring" not in second.stderr, "only the first one shows progress"


TRIALS = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from helpers.pruning_runs import pruned
from helpers.tiny_models import tiny_model
from optimum_cap.pruning.matrix_pruner import MatrixPruner
from optimum_cap.runtime.digests import digest_of

torch.set_num_threads(1)
solved, own = [], MatrixPruner.pruned
MatrixPruner.pruned = lambda self, *args: solved.append(args[0].name) or own(self, *args)
model = pruned(tiny_model("mixtral"), Path(sys.argv[1]), allocation="interventional")
print(digest_of(dict(model.state_dict())), len(solved))
"""


@pytest.mark.slow
def test_two_ranks_share_the_sites_that_are_tried(tmp_path: Path) -> None:
    alone = pruned(tiny_model("mixtral"), None, allocation="interventional")
    expected = digest_of(dict(alone.state_dict()))
    first, second = (
        done.stdout.split() for done in ranks(tmp_path / "sensitivities", script=TRIALS)
    )
    assert first[0] == second[0] == expected
    matrices = 3 * (4 + 4 * 2)
    solved = [int(own[1]) for own in (first, second)]
    assert sum(solved) == 2 * matrices, "each is tried once, and pruned once"
    assert min(solved) > 2 * matrices // 3


PRUNING = """
import json, os, signal, sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from helpers.pruning_runs import pruned
from helpers.tiny_models import tiny_model
from optimum_cap.pruning.layer_by_layer import LayerByLayerPruning
from optimum_cap.pruning.matrix_pruner import MatrixPruner
from optimum_cap.pruning.refinement import LayerRefiner
from optimum_cap.runtime.digests import digest_of

def counted(cls, name, dies_after=None):
    own, calls = getattr(cls, name), []
    def count(self, *args, **kwargs):
        if len(calls) == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(args)
        return own(self, *args, **kwargs)
    setattr(cls, name, count)
    return calls

torch.set_num_threads(1)
name, fields, folder, dies_after = sys.argv[1:]
solved, steps = counted(MatrixPruner, "pruned"), counted(LayerRefiner, "_errors")
counted(LayerByLayerPruning, "_store_layer", json.loads(dies_after))
folder = None if folder == "none" else Path(folder) / os.environ["RANK"]
model = pruned(tiny_model(name), folder, **json.loads(fields))
tokens = [matrix.tokens for matrix in model.pruning_record.matrices]
print(digest_of(dict(model.state_dict()), tokens), len(solved), len(steps))
"""


def digest_of_pruning(name: str, fields: dict[str, Any]) -> str:
    model = pruned(tiny_model(name), None, **fields)
    tokens = [matrix.tokens for matrix in model.pruning_record.matrices]
    return digest_of(dict(model.state_dict()), tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "size"),
    [
        ("llama", {"num_samples": 24}, 3),
        ("mixtral", {"num_samples": 24}, 2),
        ("gemma3n", {"num_samples": 16}, 2),
        ("llama", {"recipe": "causal_fast", "pattern": "2:4", "sparsity": None}, 2),
        ("llama", {"recipe": "wanda", "num_samples": 1}, 2),
        ("llama", {"recipe": "causal", "target": "dense", "order": "projection"}, 2),
    ],
    ids=["three", "mixtral", "gemma3n", "2:4", "one example", "dense target"],
)
def test_ranks_prune_together(name: str, fields: dict[str, Any], size: int) -> None:
    expected = digest_of_pruning(name, fields)
    found = ranks(name, json.dumps(fields), "none", "null", script=PRUNING, size=size)
    for done in found:
        assert done.stdout.split()[:1] == [expected], done.stderr


@pytest.mark.slow
def test_two_ranks_share_a_pruning_and_resume_it(tmp_path: Path) -> None:
    fields = {"num_samples": 32}
    expected = digest_of_pruning("llama", fields)
    alone = ranks("llama", json.dumps(fields), "none", "null", script=PRUNING, size=1)[0]
    solved, steps = map(int, alone.stdout.split()[1:])

    survivor, dead = ranks("llama", json.dumps(fields), tmp_path, "2", script=PRUNING)
    assert survivor.returncode == 1 or dead.returncode == -9
    found = ranks("llama", json.dumps(fields), tmp_path, "null", script=PRUNING)
    own = [tuple(map(int, done.stdout.split()[1:])) for done in found]
    assert [done.stdout.split()[0] for done in found] == [expected] * 2
    assert sum(one[0] for one in own) == solved // 3, "two of three layers are restored"
    assert sum(one[1] for one in own) == steps // 3
    assert min(one[0] for one in own) > 0
    assert min(one[1] for one in own) == steps // 6


LAUNCHES = {
    "one": "-m",
    "two": "-m torch.distributed.run --standalone --nproc-per-node 2 -m",
}
ACCELERATE = (
    "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no -m"
)


def flags_of_a_run(tmp_path: Path, samples: int) -> str:
    """Save a model and data there, and return the flags that name them."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    rows = [{"prompt": f"{n}+{n + 1}=", "completion": f"{2 * n + 1}"} for n in range(2 * samples)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"-m {tmp_path}/dense --dataset {tmp_path}/sums.jsonl --num-samples {samples}"


@pytest.mark.slow
def test_the_command_under_accelerate_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"score {flags_of_a_run(tmp_path, 12)} --estimator exact --memory-budget 20000"
    monkeypatch.setitem(LAUNCHES, "accelerate", ACCELERATE)
    written = {}
    for name in ("one", "accelerate"):
        file = tmp_path / f"{name}.safetensors"
        with launched(name, command, file, tmp_path / name) as process:
            out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.count("saved ") == 1, out
        written[name] = file.read_bytes()
    assert written["one"] == written["accelerate"]


def launched(how: str, command: str, output: Path, cache: Path) -> subprocess.Popen[str]:
    """Start a command of `optimum-cli cap` in one process or in two."""
    words = f"{LAUNCHES[how]} optimum.commands.optimum_cli cap {command}".split()
    return subprocess.Popen(
        [sys.executable, *words, "-o", output, "--resume-dir", cache],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_the_command_under_torchrun_saves_once(tmp_path: Path) -> None:
    command = f"prune {flags_of_a_run(tmp_path, 6)} --sparsity 0.5 --memory-budget 20000"
    for name in LAUNCHES:
        with launched(name, command, tmp_path / name, tmp_path / f"scores of {name}") as process:
            out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.count("saved ") == 1
    first, second = (
        {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in (tmp_path / name).iterdir()
        }
        for name in LAUNCHES
    )
    assert first["model.safetensors"] == second["model.safetensors"]
    assert first.keys() == second.keys()
    assert len(chunk_files(tmp_path / "scores of one")) == len(
        chunk_files(tmp_path / "scores of two")
    )


@pytest.mark.slow
def test_a_rank_killed_under_torchrun_and_the_same_again(tmp_path: Path) -> None:
    """The launcher ends the other one, which says how to resume; then the bytes of one process."""
    command = f"score {flags_of_a_run(tmp_path, 200)} --estimator exact --memory-budget 1"

    def scoring(name: str) -> subprocess.Popen[str]:
        return launched(name, command, tmp_path / f"{name}.safetensors", tmp_path / name)

    with scoring("two") as launcher:
        while not (tmp_path / "two").exists() or len(chunk_files(tmp_path / "two")) < 300:
            assert launcher.poll() is None
            time.sleep(0.01)
        [second] = [
            rank
            for rank in psutil.Process(launcher.pid).children()
            if rank.environ().get("RANK") == "1"
        ]
        second.kill()
        _, err = launcher.communicate()
    assert launcher.returncode == 1
    kept = f"finished results are stored in {tmp_path / 'two'}; run the same command again to"
    assert err.count(kept) == 1
    assert "exitcode  : -9" in err
    assert not (tmp_path / "two.safetensors").exists()
    finished = len(chunk_files(tmp_path / "two"))

    for name in LAUNCHES:
        with scoring(name) as process:
            _, err = process.communicate()
        assert process.returncode == 0, err
    files = [tmp_path / f"{name}.safetensors" for name in LAUNCHES]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert finished < len(chunk_files(tmp_path / "two")) == len(chunk_files(tmp_path / "one"))
