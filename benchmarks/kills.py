"""Kills runs of scoring, pruning, saving and converting with SIGKILL, and resumes them.

Each operation first runs undisturbed. Then it runs in a fresh folder, in processes that are killed:
half of them when they have made a random number of changes to the folder (files opened to write,
renames, links, new and removed entries), the others after a random time. After each kill, the
output has to be absent or whole, old or new. Where a run comes to its end, the output has to have
the bytes of the undisturbed run, nothing unfinished may be left, and nothing may have been said
about damage; then the operation begins anew.

    python benchmarks/kills.py --kills 60 --seed 0
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.checkpoint import convert_checkpoint

REASONER = Path(__file__).parents[1] / "examples" / "tiny_reasoner"
DATA = {"dataset": str(REASONER / "data" / "calibration.jsonl"), "num_samples": 8}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "open"}


def dense() -> PreTrainedModel:
    """Return the first two layers of the model, which make many small files."""
    return AutoModelForCausalLM.from_pretrained(REASONER / "model", num_hidden_layers=2)


def score(folder: Path, estimator: str) -> None:
    fields = {"exact_examples": 4} if estimator == "control_variate" else {}
    config = CAPConfig(
        sparsity=0.5,
        recipe="paper",
        estimator=estimator,
        memory_budget="1MB",
        resume_dir=folder / "resume",
        **DATA,
        **fields,
    )
    CAPPruner(config).measure(dense(), TOKENIZER, save_to=folder / "out")


def prune(folder: Path, **fields: Any) -> None:
    config = CAPConfig(sparsity=0.5, resume_dir=folder / "resume", **DATA, **fields)
    CAPPruner(config).prune(dense(), TOKENIZER).save_pretrained(folder / "out")


def save_to_mount_point(folder: Path) -> None:
    """Save a model to a folder that cannot be renamed, over a checkpoint of another one."""
    out = (folder / "out").resolve()
    os.path.ismount = lambda path: Path(path) == out  # in this process only
    AutoModelForCausalLM.from_pretrained(folder / "pruned").save_pretrained(out)


def convert(folder: Path) -> None:
    if not (folder / "out").exists():  # else a run ended before it was killed
        convert_checkpoint(folder / "pruned", folder / "out", "dense")


def with_pruned_model(folder: Path) -> None:
    config = CAPConfig(sparsity=0.5, recipe="wanda", **DATA)
    CAPPruner(config).prune(dense(), TOKENIZER).save_pretrained(folder / "pruned")


def with_old_output(folder: Path) -> None:
    """Prepare a pruned model, and the checkpoint of another one in the place of the output."""
    with_pruned_model(folder)
    config = CAPConfig(sparsity=0.5, recipe="magnitude")
    CAPPruner(config).prune(dense(), TOKENIZER).save_pretrained(folder / "out")


@dataclass(frozen=True)
class Operation:
    """Something to kill.

    Attributes:
        run: Runs it in a folder, where its output is `out`.
        prepare: Prepares the folder.
    """

    run: Callable[[Path], None]
    prepare: Callable[[Path], None] = lambda folder: None


OPERATIONS = {
    "score": Operation(lambda folder: score(folder, "exact")),
    "score, control variate": Operation(lambda folder: score(folder, "control_variate")),
    "prune, causal": Operation(prune),
    "prune, causal_fast": Operation(lambda folder: prune(folder, recipe="causal_fast")),
    "prune, wanda 2:4": Operation(lambda folder: prune(folder, recipe="wanda", pattern="2:4")),
    "save over another": Operation(
        lambda folder: prune(folder, recipe="wanda"), prepare=with_old_output
    ),
    "save to a mount point": Operation(save_to_mount_point, prepare=with_old_output),
    "convert": Operation(convert, prepare=with_pruned_model),
}


def in_process(action: Callable[[], None], kill_after: float | None = None) -> tuple[int, str]:
    """Run an action in a forked process; return its exit status and what it said."""
    with tempfile.TemporaryFile() as said:
        process = os.fork()
        if process == 0:
            os.dup2(said.fileno(), 2)
            os.dup2(said.fileno(), 1)
            status = 1
            try:
                action()
                status = 0
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(status)
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode(errors="replace")


def counting(action: Callable[[], None], folder: Path, until: int | None) -> Callable[[], None]:
    """Return an action that is killed before so many changes to a folder, or counts them."""

    def counted() -> None:
        changes = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal changes
            if event not in CHANGES or not str(arguments[0]).startswith(str(folder)):
                return
            if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            if changes == until:
                os.kill(os.getpid(), signal.SIGKILL)
            changes += 1

        sys.addaudithook(hook)
        action()
        if until is None:
            folder.with_name("changes").write_text(str(changes))

    return counted


def digest(path: Path) -> str | None:
    """Return a digest of a file or of the files of a folder, without hidden ones."""
    if not path.exists():
        return None
    content = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        inside = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in inside.parts):
            content.update(f"{inside} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return content.hexdigest()


def campaign(
    operation: Operation, kills: int, draw: random.Random, parent: Path
) -> tuple[int, list[str]]:
    """Kill an operation so many times; return how often it resumed to its end, and what is wrong.

    A run that ends before it is killed begins anew, in a fresh folder.
    """
    prepared, undisturbed, folder = (parent / name for name in ("prepared", "undisturbed", "run"))
    prepared.mkdir()
    status, said = in_process(lambda: operation.prepare(prepared))
    if status:
        return 0, [f"preparing it failed: {said}"]
    for each in (undisturbed, folder):
        shutil.copytree(prepared, each)
    old, start = digest(prepared / "out"), time.monotonic()
    status, said = in_process(counting(lambda: operation.run(undisturbed), undisturbed, until=None))
    seconds, expected = time.monotonic() - start, digest(undisturbed / "out")
    if status:
        return 0, [f"the undisturbed run failed: {said}"]
    changes, killed, ended, faults = int((parent / "changes").read_text()), 0, 0, []

    def run() -> None:
        operation.run(folder)

    while killed < kills or status:
        if killed == kills:
            status, said = in_process(run)
        elif killed % 2:
            status, said = in_process(run, kill_after=draw.uniform(0, seconds))
        else:
            # A resumed run makes fewer changes than the first: kills come earlier.
            resumes = (folder / "resume").exists()
            until = int(changes * draw.random() ** (2 if resumes else 1))
            status, said = in_process(counting(run, folder, until))
        if status not in (0, -signal.SIGKILL) or "damaged" in said:
            faults.append(f"after {killed} kills: {said}")
            break
        killed += status == -signal.SIGKILL
        found = digest(folder / "out")
        # Without a config, a mount point does not load; the next save restores it.
        partial = operation.run is save_to_mount_point and not (folder / "out/config.json").exists()
        if status and found not in (old, expected) and not partial:
            faults.append(f"after {killed} kills, the output is neither the old nor the new one")
        if status == 0:
            ended += 1
            if found != expected:
                faults.append(f"after {killed} kills, the output is not that of an undisturbed run")
            faults += [f"{path} is left" for path in folder.rglob("*") if is_unfinished(path)]
            shutil.rmtree(folder)
            shutil.copytree(prepared, folder)
    return ended, faults


def is_unfinished(path: Path) -> bool:
    return path.suffix == ".tmp" or ".saving-" in path.name or path.name.endswith(".replaced")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=64, help="of all operations together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=OPERATIONS, help="one operation")
    args = parser.parse_args()
    torch.set_num_threads(1)  # processes are forked
    chosen = [args.only] if args.only else list(OPERATIONS)
    draw, faults = random.Random(args.seed), Counter[str]()
    for name in chosen:
        kills, start = args.kills // len(chosen), time.monotonic()
        with tempfile.TemporaryDirectory() as parent:
            ended, found = campaign(OPERATIONS[name], kills, draw, Path(parent).resolve())
        faults[name] = len(found)
        seconds = time.monotonic() - start
        print(
            f"{name:22} {kills:3} kills, resumed to the end {ended:3} times, {len(found)} faults, "
            f"{seconds:.0f} s"
        )
        for fault in found:
            print(f"  {fault.strip()}")
    sys.exit(1 if faults.total() else 0)


TOKENIZER = AutoTokenizer.from_pretrained(REASONER / "model")

if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
