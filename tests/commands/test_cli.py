"""`optimum-cli cap`: the main flows through the executable, the error cases in this process."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.command_line import run_cap
from helpers.paths import ROOT
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_cap import CAPConfig
from optimum_cap.checkpoint.record import MatrixSparsity, SiteSensitivity
from optimum_cap.checkpoint.saving import _MAX_SHARD_SIZE
from optimum_cap.commands.base import CAPSubcommand
from optimum_cap.commands.cap import CAPCommand
from optimum_cap.commands.eval import EvalCommand
from optimum_cap.commands.parser import CommandParser
from optimum_cap.commands.prune import PruneCommand
from optimum_cap.commands.summary import sensitivity_table, sparsity_table
from optimum_cap.progress import PROGRESS
from optimum_cap.text import format_size

OPTIMUM_CLI = str(Path(sys.executable).with_name("optimum-cli"))
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
OPENING = re.compile(r"^(pruning|evaluating) .*\n(data|tasks): .*\ndevice: .*\n", re.MULTILINE)
PROGRESS_BAR = re.compile(r"\d+%\||\d+it \[")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration data in a file."""
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{n}+{n + 1}=", "completion": f"{2 * n + 1}"} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def settings(dense: Path, sums: Path) -> list[str]:
    """Flags of a small pruning."""
    text = f"-m {dense} --dataset {sums} --sparsity 0.5 --num-samples 6 --subsets 2 --seed 3"
    return [*text.split(), "--recipe", "paper", "--device-map", "cpu"]


def replaced(flags: list[str], name: str, value: object) -> list[str]:
    """Return flags with another value of one of them."""
    position = flags.index(name) + 1
    return [*flags[:position], str(value), *flags[position + 1 :]]


def run_executable(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [OPTIMUM_CLI, "cap", *map(str, arguments)], capture_output=True, text=True, timeout=200
    )


def complaints(stderr: str) -> list[str]:
    """Return what `stderr` has besides the opening and progress.

    A line may follow a progress bar in its line.
    """
    lines = re.split(r"[\r\n]+", re.sub(OPENING, "", stderr))
    rest = [line.rpartition("]")[2] if PROGRESS_BAR.search(line) else line for line in lines]
    return [line for line in rest if line.strip()]


@pytest.fixture(scope="module")
def pruned(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint written by the executable, with its output beside it."""
    folder = tmp_path_factory.mktemp("pruned") / "checkpoint"
    done = run_executable("prune", *settings, "-o", folder)
    assert done.returncode == 0, done.stderr
    (folder.parent / "stdout").write_text(done.stdout)
    (folder.parent / "stderr").write_text(done.stderr)
    return folder


@pytest.fixture
def cap(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `optimum-cli cap` in this process: exit status, stdout, complaints on stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        status, out, err = run_cap(monkeypatch, capfd, arguments)
        return status, out, "\n".join(complaints(err))

    return run


def test_prune_writes_what_the_library_writes(
    pruned: Path, settings: list[str], dense: Path, sums: Path
) -> None:
    values = {"recipe": "paper", "num_samples": 6, "subsets": 2, "seed": 3}
    config = CAPConfig(sparsity=0.5, dataset=str(sums), **values)
    expected = AutoModelForCausalLM.from_pretrained(dense, pruning_config=config)
    loaded = AutoModelForCausalLM.from_pretrained(pruned)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.pruning_record.scores == expected.pruning_record.scores
    assert AutoTokenizer.from_pretrained(pruned)("1+1=") == AutoTokenizer.from_pretrained(dense)(
        "1+1="
    )
    assert (pruned / "README.md").read_text().startswith("---\n")


def test_the_files_of_a_processor_are_kept(
    dense: Path, sums: Path, tmp_path: Path, cap: Callable[..., tuple[int, str, str]]
) -> None:
    shutil.copytree(dense, tmp_path / "dense")
    for name in ("processor_config.json", "preprocessor_config.json", "chat_template.json"):
        (tmp_path / "dense" / name).write_text(json.dumps({"from": name}))
    (tmp_path / "dense" / "notes.txt").write_text("not part of the model")
    flags = f"-m {tmp_path / 'dense'} -o {tmp_path / 'out'} --sparsity 0.5 --recipe magnitude"
    assert cap("prune", *flags.split())[0] == 0
    for name in ("processor_config.json", "preprocessor_config.json", "chat_template.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == {"from": name}
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_prune_prints_a_summary_and_only_progress_on_stderr(pruned: Path) -> None:
    out = (pruned.parent / "stdout").read_text()
    whole = re.sub(r"\n {14}", " ", out)  # rows go on below their values
    facts = dict(re.findall(r"^(\w+(?: \w+)?) {2,}(.+)$", whole, re.MULTILINE))
    assert all(len(line) <= 80 for line in out.partition("Load it with")[0].splitlines())
    assert facts["heads"] == "12 scored in 3 layers"
    assert re.fullmatch(r"(\d\.\d \([+-]\d+\.\d{4}\),? +){5}layer.head.*", facts["most needed"])
    assert facts["sparsity"] == "0.500000 (0.5 requested)"
    assert "threshold" in facts
    assert re.search(r"packed, \d+\.\d% of .* dense", facts["size"])
    assert facts["saved"] == str(pruned)
    assert f"from_pretrained({str(pruned)!r})" in out
    assert "import optimum_cap" in out
    stderr = (pruned.parent / "stderr").read_text()
    assert OPENING.match(stderr)
    assert complaints(stderr) == []


@pytest.mark.slow
def test_inspect_prints_record_and_table(pruned: Path, dense: Path) -> None:
    done = run_executable("inspect", pruned)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^base model +\./{dense.name}$", done.stdout, re.MULTILINE)
    assert "pruned to     0.5 of the weights, pattern unstructured" in done.stdout
    assert "recipe        paper: criterion causal_score, allocation global" in done.stdout
    assert "least needed" in done.stdout
    header, *rows = done.stdout.split("\n\n")[-1].strip().splitlines()
    first, *projections, last = header.split()
    assert (first, last) == ("layer", "all")
    assert sorted(projections) == sorted(f"{name}_proj" for name in PROJECTIONS)
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "all"]
    assert rows[-1].split()[-1] == "0.500"


def test_inspect_prints_json(
    cap: Callable[..., tuple[int, str, str]], pruned: Path, dense: Path
) -> None:
    status, out, _ = cap("inspect", pruned, "--json")
    values = json.loads(out)
    assert status == 0
    assert values["record"]["base_model"] == f"./{dense.name}"
    assert values["checkpoint_format"] == "packed"
    assert values["zeros"] / values["total"] == pytest.approx(0.5)
    assert len(values["record"]["scores"]) == 12


def test_the_default_recipe_with_its_options_and_its_table(
    cap: Callable[..., tuple[int, str, str]], dense: Path, sums: Path, tmp_path: Path
) -> None:
    flags = ["-m", dense, "--dataset", sums, "--num-samples", "6", "--device-map", "cpu"]
    flags += ["--sparsity", "0.5", "-o", tmp_path / "out", "--allocation-bound", "0.05"]
    flags += ["--allocation-examples", "3", "--target", "dense", "--order", "projection"]
    flags += ["--refine", "3", "--refine-learning-rate", "0.002"]
    status, _, err = cap("prune", *flags, "--answer-weight", "2")
    assert (status, err) == (0, "")
    status, out, _ = cap("inspect", tmp_path / "out")
    assert status == 0
    shown = " ".join(out.split())
    for given in ("allocation_bound 0.05", "allocation_examples 3", "target dense"):
        assert given in shown
    assert "order projection (recipe: layer)" in shown
    assert ", refine 3" in shown
    assert "refine_learning_rate 0.002" in shown
    assert "refined       up to 3 passes over the calibration set for each layer\n" in out
    assert "answer_weight 2.0" in shown
    title, header, *rows = out.split("\n\n")[1].splitlines()
    assert title == "sites, each pruned alone (estimated)"
    assert header.split("  ")[-1].strip() == "sparsity"
    assert len(rows) == 6
    assert all(0.44 < float(row.split()[-1]) < 0.56 for row in rows)


@pytest.mark.slow
def test_convert_to_dense_and_back_keeps_every_bit(
    cap: Callable[..., tuple[int, str, str]], pruned: Path, tmp_path: Path
) -> None:
    done = run_executable("convert", pruned, "--format", "dense", "-o", tmp_path / "dense")
    assert done.returncode == 0, done.stderr
    assert complaints(done.stderr) == []
    assert re.match(r"packed .* -> dense .*: ", done.stdout)
    status, _, err = cap(
        "convert", tmp_path / "dense", "--format", "packed", "-o", tmp_path / "again"
    )
    assert (status, err) == (0, "")
    expected = AutoModelForCausalLM.from_pretrained(pruned).state_dict()
    for folder in (tmp_path / "dense", tmp_path / "again"):
        loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_overwrite_replaces_the_checkpoint_and_keeps_other_files(
    cap: Callable[..., tuple[int, str, str]], settings: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shards = ["--format", "dense", "--max-shard-size", "20KB"]
    assert cap("prune", *settings, "-o", output, *shards)[0] == 0
    assert len(list(output.glob("model-*.safetensors"))) > 1
    (output / "notes.txt").write_text("mine")

    status, out, err = cap("prune", *settings, "-o", output)
    assert (status, out) == (2, "")
    assert "is not empty" in err
    assert "--overwrite" in err

    status, _, err = cap("prune", *settings, "-o", output, "--overwrite")
    assert (status, err) == (0, "")
    assert (output / "notes.txt").read_text() == "mine"
    assert [file.name for file in output.glob("*.safetensors")] == ["model.safetensors"]
    assert not (output / "model.safetensors.index.json").exists()
    AutoModelForCausalLM.from_pretrained(output)


BAD_ARGUMENTS = {
    "--sparsity 1.5": r"sparsity must be a number strictly between 0 and 1 .* got 1\.5",
    "--sparsity half": "sparsity must be a number strictly between 0 and 1 .* got 'half'",
    "--recipe magic": "recipe must be one of causal, causal_fast, .*, got 'magic'",
    "--refine some": "refine must be an integer of at least 0, got 'some'",
    "--refine -1": "refine must be an integer of at least 0, got -1",
    "--refine-learning-rate 0": "refine_learning_rate must be a positive number, got 0.0",
    "--refine 2": "refine 2 has no effect with recipe 'paper'",
    "--aggregation max": "aggregation must be one of median, mean, got 'max'",
    "--num-samples 0": "num_samples must be an integer of at least 1, got 0",
    "--num-samples 2 --subsets 3": "subsets is 3, but num_samples is only 2",
    "--memory-budget plenty": 'memory_budget must be a number of bytes or text such as "4GB"',
    "--format zip": "checkpoint_format must be one of packed, coded, dense, got 'zip'",
    "--dtype int8": "argument --dtype: invalid choice: 'int8'",
    "--max-shard-size 3XB": '--max-shard-size must be a number of bytes or text such as "4GB", got',
    "--private": "--private needs --push-to-hub",
    "--max-memory cpu": "argument --max-memory: 'cpu' is not of the form DEVICE=SIZE: write 0=20GB",
    "--max-memory cpu=1GB": "--max-memory needs --device-map auto, .*, got --device-map cpu",
}


@pytest.mark.parametrize("flags", BAD_ARGUMENTS)
def test_bad_arguments_exit_with_2_before_the_model_is_loaded(
    flags: str,
    cap: Callable[..., tuple[int, str, str]],
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", _must_not_be_called)
    status, out, err = cap("prune", *settings, *flags.split(), "-o", tmp_path / "out")
    assert (status, out) == (2, "")
    (last,) = err.splitlines()
    assert last.startswith("optimum-cli cap prune: error: ")
    assert re.search(BAD_ARGUMENTS[flags], last)
    assert not (tmp_path / "out").exists()


def _must_not_be_called(*args: object, **kwargs: object) -> None:
    raise AssertionError("the model was loaded")


def test_an_example_is_shown_without_loading_the_model(
    cap: Callable[..., tuple[int, str, str]],
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", _must_not_be_called)
    (tmp_path / "file").touch()  # an output of before is no obstacle
    status, out, err = cap("prune", *settings, "-o", tmp_path, "--show-example")
    assert (status, err) == (0, "")
    first, prompt, answer = out.splitlines()
    assert re.fullmatch(r"row \d+ of sums.jsonl: \d+ tokens, \d scored .between ⟦ and ⟧.", first)
    assert re.fullmatch(r"\d+\+\d+=", prompt)
    assert re.fullmatch(r"⟦\d+</s>⟧", answer)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    flags = f"{settings[0]} {settings[1]} --sparsity 0.5 --recipe magnitude --show-example"
    status, _, err = cap("prune", *flags.split(), "-o", tmp_path / "out")
    assert status == 2
    assert "--show-example needs calibration data, but criterion 'magnitude'" in err


def test_a_specification_and_columns_name_the_data(
    cap: Callable[..., tuple[int, str, str]], dense: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}]
    row = {"q": "why?", "a": "because", "story": "once", "chat": chat}
    file.write_text(json.dumps(row))
    flags = f"-m {dense} --sparsity 0.5 -o {tmp_path / 'out'} --num-samples 1"
    show = ["prune", *flags.split(), "--show-example", "--dataset"]
    pair = {"path": str(file), "prompt_column": "q", "answer_column": "a"}
    for dataset, shown in (
        ([json.dumps(pair)], "why?\n⟦because</s>⟧"),
        ([file, "--prompt-column", "q", "--answer-column", "a"], "why?\n⟦because</s>⟧"),
        ([json.dumps({"path": str(file)}), "--text-column", "story"], "o⟦nce⟧"),
        ([file, "--messages-column", "chat"], "how?\n⟦so</s>⟧"),
    ):
        status, out, err = cap(*show, *dataset)
        assert (status, err, out.partition("\n")[2]) == (0, "", f"{shown}\n")
    for dataset, message in (
        (["{path: x}"], r"--dataset {path: x} is not valid JSON \(.*\): write it in single quotes"),
        (['["gsm8k"]'], "is a JSON list: write its entries after --dataset"),
        ([file, file, "--text-column", "story"], "--text-column needs a single data set, got 2"),
        ([json.dumps(pair), "--prompt-column", "a"], "name other columns for prompt_column"),
        ([file, "--text-column", "tale"], "no column 'tale' .text_column.: choose one of q, a"),
        ([file], "--prompt-column and --answer-column or --text-column"),
    ):
        status, _, err = cap(*show, *dataset)
        assert status == 2
        assert re.search(message, err), err
    status, _, err = cap(*show[:-1], "--text-column", "story")
    assert (status, "--text-column needs a file or a Hub id: add --dataset" in err) == (2, True)


@pytest.mark.parametrize("command", ["prune", "score"])
def test_a_tokenizer_that_is_not_the_models_is_refused_before_the_model_is_loaded(
    command: str,
    cap: Callable[..., tuple[int, str, str]],
    sums: Path,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", _must_not_be_called)
    other, empty = tmp_path / "other", tmp_path / "empty"
    tokenizer = tiny_tokenizer("{% for m in messages %}<|a|>{{ m.content }}<|b|>{% endfor %}")
    tokenizer.add_tokens(["<|a|>", "<|b|>"], special_tokens=True)
    tokenizer.save_pretrained(other)
    tiny_model("gpt2").config.save_pretrained(empty)
    sparsity = ["--sparsity", "0.5"] if command == "prune" else []
    flags = ["--dataset", sums, "--num-samples", "4", *sparsity, "-o", tmp_path / "out"]

    status, _, err = cap(command, "-m", dense, *flags, "--tokenizer", other)
    assert status == 2
    assert re.search(r"error: token 64 '<\|b\|>' .* but the model has 64 embeddings: resize", err)
    status, _, err = cap(command, "-m", empty, *flags)
    assert status == 2
    assert re.search(
        r"has no vocabulary \(perhaps its folder has no tokenizer files\).*--token", err
    )
    (empty / "config.json").write_text(json.dumps({"model_type": "llama"}))
    status, _, err = cap(command, "-m", empty, *flags)
    assert status == 2
    assert re.search("no tokenizer could be loaded from '.*empty' .* --tokenizer", err)


def test_output_is_checked_first(
    cap: Callable[..., tuple[int, str, str]],
    settings: list[str],
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", _must_not_be_called)
    full = tmp_path / "full"
    full.mkdir()
    for name in "abcdefg":
        (full / name).touch()
    status, _, err = cap("prune", *settings, "-o", full)
    assert status == 2
    assert re.search(r"full is not empty \(it holds a, b, c, d, e and 2 more\)", err)

    status, _, err = cap("prune", *settings, "-o", full / "a")
    assert (status, "is a file" in err) == (2, True)

    # Another model's weights are not replaced, whatever is asked.
    (full / "model.safetensors").touch()
    status, _, err = cap("prune", *settings, "-o", full, "--overwrite")
    assert (status, "holds the weights of another model" in err) == (1, True)

    monkeypatch.chdir(full)
    status, _, err = cap("prune", *settings, "-o", ".", "--overwrite")
    assert (status, "the current folder" in err) == (1, True)

    status, _, err = cap("prune", *settings, "-o", "/proc", "--overwrite")
    assert (status, "/proc is a mount point" in err) == (2, True)

    status, _, err = cap("prune", *settings, "-o", full / "a" / "below")
    assert (status, f"is inside the file {full / 'a'}" in err) == (2, True)

    # A folder in which nobody can write, not even root.
    status, _, err = cap("prune", *settings, "-o", "/proc/pruned")
    assert (status, "cannot write to the output folder /proc/pruned" in err) == (1, True)

    status, _, err = cap("prune", *settings, "-o", dense, "--overwrite")
    assert (status, "is the folder of the model itself" in err) == (2, True)
    assert (dense / "model.safetensors").exists()


def test_failures_exit_with_1_and_one_line(
    cap: Callable[..., tuple[int, str, str]], settings: list[str], tmp_path: Path, dense: Path
) -> None:
    output = tmp_path / "out"
    status, _, err = cap("prune", "-m", tmp_path / "none", "--sparsity", "0.2", "-o", output)
    assert status == 2
    assert re.fullmatch(r"optimum-cli cap prune: error: .*none.*", err)

    missing = replaced(settings, "--dataset", tmp_path / "no.jsonl")
    status, _, err = cap("prune", *missing, "-o", output)
    assert status == 2
    assert re.fullmatch(r"optimum-cli cap prune: error: .*no\.jsonl.*", err)

    status, _, err = cap("prune", *settings, "--leave-dense", "layers.9", "-o", output)
    assert status == 1
    assert re.fullmatch(r"optimum-cli cap prune: error: .*'layers\.9'.*", err)

    status, _, err = cap("inspect", dense)
    assert status == 1
    assert re.fullmatch(r"optimum-cli cap inspect: error: .*dense.*", err)

    status, _, err = cap("convert", tmp_path / "none", "--format", "dense", "-o", output)
    assert status == 1
    assert re.fullmatch(r"optimum-cli cap convert: error: .*none' is neither a folder .*", err)

    status, _, err = cap("inspect", tmp_path / "none")
    assert status == 1
    assert re.fullmatch(r"optimum-cli cap inspect: error: .*none' is neither a folder .*", err)

    status, _, err = cap("convert", dense, "--format", "zip", "-o", output)
    assert status == 2
    assert "--format must be one of packed, coded, dense, got 'zip'" in err
    assert not output.exists()


@pytest.mark.parametrize("switch", ["flag", "environment"])
def test_debug_shows_the_traceback(
    switch: str,
    cap: Callable[..., tuple[int, str, str]],
    dense: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if switch == "environment":
        monkeypatch.setenv("OPTIMUM_CAP_DEBUG", "1")
    with pytest.raises((ValueError, OSError)):
        cap("inspect", dense, *(["--debug"] if switch == "flag" else []))


def test_a_bug_says_that_it_is_one(
    cap: Callable[..., tuple[int, str, str]], dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("scores")

    monkeypatch.setattr("optimum_cap.checkpoint.inspect_checkpoint", broken)
    status, _, err = cap("inspect", dense)
    assert status == 1
    assert "unexpected KeyError: 'scores' (run again with --debug for the traceback)" in err


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of two evaluation tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "gsm8k").mkdir()
    rows = [{"question": f"{n}+{n}?", "answer": f"#### {2 * n}"} for n in range(12)]
    (folder / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wikitext-2").mkdir()
    lines = [f" line {n} tells about the number {n} . \n" for n in range(40)]
    (folder / "wikitext-2" / "test.txt").write_text("".join(lines))
    return folder


@pytest.mark.slow
def test_eval_and_compare(dense: Path, data_dir: Path, tmp_path: Path) -> None:
    pruned, flags = tmp_path / "pruned", ["--tasks", "gsm8k,wikitext2", "--data-dir", data_dir]
    flags += ["--num-fewshot", "0"]
    data = f"gsm8k={data_dir / 'gsm8k' / 'test.jsonl'}"
    options = ["--dataset", data, "--num-samples", "4", "--sparsity", "0.5"]
    done = run_executable("prune", "-m", dense, "-o", pruned, *options)
    assert done.returncode == 0, done.stderr
    outputs = {}
    for model in (dense, pruned):
        file = tmp_path / f"{model.name}.json"
        done = run_executable("eval", model, *flags, "-o", file)
        # Random weights give no answers.
        (warning,) = complaints(done.stderr)
        assert (done.returncode, "gsm8k: the model gives no answer" in warning) == (0, True)
        assert re.search(r"^gsm8k +\d+ +\d+\.\d% .*%", done.stdout, re.MULTILINE)
        assert re.search(r"^wikitext2 +\d+ +ppl [\d.]+ ", done.stdout, re.MULTILINE)
        outputs[model.name] = json.loads(file.read_text())["tasks"]
    assert outputs["dense"]["gsm8k"]["n"] == 12
    assert (outputs["pruned"]["gsm8k"]["n"], outputs["pruned"]["gsm8k"]["excluded"]) == (8, 4)

    files = [tmp_path / "dense.json", tmp_path / "pruned.json"]
    from_files = run_executable("compare", *files)
    assert (from_files.returncode, from_files.stderr) == (0, "")
    assert "gsm8k: dropped 4 items that only the dense model has and 0" in from_files.stdout
    row = re.search(r"^wikitext2 +perplexity +(.*)$", from_files.stdout, re.MULTILINE)
    assert row
    n, _, before, _, after, difference, *_ = row[1].split()
    assert int(n) == outputs["dense"]["wikitext2"]["n"]
    assert float(before) == pytest.approx(outputs["dense"]["wikitext2"]["perplexity"], rel=1e-3)
    assert float(difference) == pytest.approx(float(after) - float(before), abs=0.1)
    # A model in the place of its file gives the same table, for the tasks of the file.
    mixed = run_executable("compare", dense, files[1], "--data-dir", data_dir)
    assert (mixed.returncode, len(complaints(mixed.stderr))) == (0, 1)
    assert mixed.stdout == from_files.stdout


def test_eval_and_compare_say_what_is_wrong_in_one_line(
    cap: Callable[..., tuple[int, str, str]],
    dense: Path,
    data_dir: Path,
    tmp_path: Path,
) -> None:
    local = ["--data-dir", data_dir]

    def refused(message: str, *arguments: str | Path, status: int = 2) -> None:
        got, _, err = cap(*arguments)
        assert got == status, err
        assert re.fullmatch(rf"optimum-cli cap {arguments[0]}: error: .*{message}.*", err), err

    refused("unknown task 'gsm' .*: choose from .*gsm8k", "eval", dense, "--tasks", "gsm", *local)
    refused("limit must be .*got 0", "eval", dense, "--tasks", "gsm8k", "--limit", "0", *local)
    refused("none does not exist", "eval", dense, "--data-dir", tmp_path / "none")
    refused("strategyqa: no data file; looked for", "eval", dense, *local)
    refused("num_fewshot must be .*got -1", "eval", dense, *local, "--num-fewshot", "-1")
    refused("max_new_tokens must be .*got 0", "eval", dense, *local, "--max-new-tokens", "0")
    refused("include_path .* has no effect", "eval", dense, *local, "--include-path", tmp_path)
    refused(
        "with definitions of tasks .* does not exist",
        *("eval", dense, "--tasks", "lm_eval:x", "--include-path", tmp_path / "none"),
    )
    log = ["--log-samples", data_dir / "gsm8k" / "test.jsonl"]
    refused("is a file, but compare writes a folder", "compare", dense, dense, *local, *log)
    refused("must end in .json", "eval", dense, "--tasks", "gsm8k", *local, "-o", tmp_path / "a")
    refused("of the output does not exist", "eval", dense, "-o", tmp_path / "no" / "a.json")
    refused("none does not exist", "eval", tmp_path / "none", "--tasks", "gsm8k", *local)

    refused("no.json does not exist", "compare", dense, tmp_path / "no.json")
    (tmp_path / "odd.json").write_text("[]")
    refused("odd.json cannot be read as an evaluation", "compare", dense, tmp_path / "odd.json")
    refused("unknown task", "compare", dense, dense, "--tasks", "gsm", *local)
    file = tmp_path / "one.json"
    bare = ["--tasks", "gsm8k", *local, "--num-fewshot", "0"]
    assert cap("eval", dense, *bare, "-o", file, "--limit", "2")[0] == 0
    refused("holds no task 'wikitext2', only gsm8k", "compare", file, file, "--tasks", "wikitext2")
    refused("none does not exist", "compare", file, tmp_path / "none", *local)
    full = tmp_path / "full.json"
    assert cap("eval", dense, *bare, "-o", full)[0] == 0
    refused(
        r"values of limit \(2 in .*one.json, None in .*full.json\): name one with --limit",
        *("compare", dense, file, full, *local),
    )


def test_compare_asks_for_the_folder_of_a_file_in_results(
    cap: Callable[..., tuple[int, str, str]], dense: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    task, saved = ["--tasks", f"loss:{tmp_path / 'own.jsonl'}"], tmp_path / "dense.json"
    assert cap("eval", dense, *task, "-o", saved)[0] == 0
    status, _, err = cap("compare", saved, dense)
    assert status == 2
    assert "name it with --tasks loss:FOLDER/own.jsonl" in err
    status, out, err = cap("compare", saved, dense, *task)
    assert (status, str(tmp_path / "own") in out) == (0, False), err


def test_compare_evaluates_the_items_of_the_file(
    cap: Callable[..., tuple[int, str, str]], dense: Path, data_dir: Path, tmp_path: Path
) -> None:
    local = ["--data-dir", data_dir]
    draw = ["--tasks", "gsm8k", "--limit", "5", "--seed", "3"]
    draw += ["--num-fewshot", "0", "--max-new-tokens", "9"]
    files = [tmp_path / "pruned.json", tmp_path / "dense.json"]
    for file in files:
        assert cap("eval", dense, *draw, *local, "-o", file)[0] == 0
    expected = cap("compare", files[1], files[0])[1]
    assert re.search(r"^gsm8k +accuracy +5 ", expected, re.MULTILINE)
    samples = ["--log-samples", tmp_path / "samples"]
    assert cap("compare", dense, files[0], *local, *samples)[1] == expected
    lines = (tmp_path / "samples" / dense.name / "gsm8k.jsonl").read_text().splitlines()
    assert len(lines) == 5
    assert max(json.loads(line)["tokens"] for line in lines) <= 9
    status, out, _ = cap("compare", dense, files[0], *local, "--limit", "4")
    assert status == 0
    assert re.search(r"^gsm8k +accuracy +4 ", out, re.MULTILINE)


def test_eval_reports_a_perplexity_that_is_not_finite_after_it_wrote_the_rest(
    cap: Callable[..., tuple[int, str, str]], data_dir: Path, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    file = tmp_path / "broken.json"
    flags = ["--tasks", "gsm8k,wikitext2", "--data-dir", data_dir, "--num-fewshot", "0"]
    status, out, err = cap("eval", tmp_path / "broken", *flags, "-o", file)
    assert status == 1
    assert "error: wikitext2: the perplexity is not finite: the loss is NaN or infinite" in err
    assert re.search(r"^wikitext2 .* not finite ", out, re.MULTILINE)
    assert re.search(r"^gsm8k +12 +\d", out, re.MULTILINE)
    assert json.loads(file.read_text())["tasks"]["gsm8k"]["n"] == 12
    status, out, err = cap("compare", file, file)
    assert status == 1
    assert "wikitext2: not compared: for" in out
    assert "error: wikitext2 of" in err
    status, out, _ = cap("compare", file, file, "--json")
    (comparison,) = json.loads(out)["comparisons"]
    assert status == 1
    assert set(comparison["tasks"]) == {"gsm8k", "wikitext2"}


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (signal.SIGINT, "interrupted"),
        pytest.param(signal.SIGTERM, "terminated", marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_with_its_status_and_the_run_resumes(
    number: signal.Signals, word: str, settings: list[str], tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n}+{n}=" * 6, "completion": f"{2 * n}" * 4} for n in range(400)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = replaced(settings, "--dataset", tmp_path / "many.jsonl")
    flags += ["--num-samples", "400", "--memory-budget", "1", "--resume-dir", f"{tmp_path}/scores"]
    command = [OPTIMUM_CLI, "cap", "prune", *flags, "-o", str(tmp_path / "out")]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, PROGRESS: "bars"},
        # A shell lets what it starts in the background ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr
        err = ""
        while err.count("Scoring") < 3:  # when the first chunks are done
            character = process.stderr.read(1)
            assert character, f"ended before it scored: {err}"
            err += character
        process.send_signal(number)
        err += process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    kept = f"finished results are stored in {tmp_path / 'scores'}; run the same command again to"
    assert kept in err
    advice = "run the same command again to continue"
    assert complaints(err)[-1] == f"optimum-cli cap prune: {word}: {advice}"
    assert list((tmp_path / "scores").rglob("*.safetensors"))
    assert not (tmp_path / "out").exists()


def test_finished_parts_of_the_scoring_are_kept_in_the_hugging_face_home(pruned: Path) -> None:
    folder = Path(os.environ["HF_HOME"]) / "optimum_cap" / "resume"
    assert list(folder.rglob("*.safetensors"))
    assert str(folder) not in (pruned / "pruning_record.json").read_text()


@pytest.mark.slow
def test_a_killed_and_resumed_pruning_gives_the_same_checkpoint(
    settings: list[str], tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n}+{n}=" * 6, "completion": f"{2 * n}" * 4} for n in range(60)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = replaced(settings, "--dataset", tmp_path / "many.jsonl")
    slowly = ["--num-samples", "60", "--memory-budget", "1"]
    checksums, chunks = [], []
    for name in ("undisturbed", "killed"):
        scores = tmp_path / f"scores of {name}"
        flags = [*settings, *slowly, "--resume-dir", scores, "-o", tmp_path / name]
        if name == "killed":
            command = [OPTIMUM_CLI, "cap", "prune", *map(str, flags)]
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
                while len(list(scores.rglob("*.safetensors"))) < 40:
                    assert process.poll() is None
                    time.sleep(0.001)
                process.kill()
            assert not (tmp_path / name).exists()
        done = run_executable("prune", *flags)
        assert done.returncode == 0, done.stderr
        checksums.append(
            hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()
        )
        chunks.append({file.name for file in scores.rglob("*.safetensors")})
    assert checksums[0] == checksums[1]
    assert chunks[0] == chunks[1]


def test_help_of_every_flag_is_one_line_with_the_default_of_the_config() -> None:
    parser = CommandParser()
    PruneCommand.parse_args(parser)
    defaults = {field.name: field.default for field in dataclasses.fields(CAPConfig)}
    for action in parser._actions:
        assert action.help, action.option_strings
        assert len(action.help) <= 125, action.help
        assert "\n" not in action.help
        default = defaults.get(action.dest)
        if default not in (dataclasses.MISSING, None):
            assert f"(default: {default})" in action.help, action.option_strings
    (shards,) = (action for action in parser._actions if action.dest == "max_shard_size")
    assert f"(default: {_MAX_SHARD_SIZE})" in shards.help


@pytest.mark.parametrize("command", [info.subcommand_class for info in CAPCommand.SUBCOMMANDS])
def test_every_flag_has_a_help_text(command: type[CAPSubcommand]) -> None:
    from optimum_cap.evaluation.tasks import DEFAULT_TASKS

    parser = CommandParser()
    command.parse_args(parser)
    for action in parser._actions:
        assert action.help, action.option_strings
        assert len(action.help) <= 125, action.help
    if command is EvalCommand:
        assert parser.get_default("tasks") == ",".join(DEFAULT_TASKS)


def test_criteria_for_parts_are_documented() -> None:
    from optimum_cap.methods import CRITERIA

    page = (ROOT / "docs" / "smaller_models.md").read_text(encoding="utf-8")
    for name, criterion in CRITERIA.items():
        assert not criterion.parts or f"`{name}`" in page, name


def test_choices_in_the_help_are_those_of_the_config() -> None:
    from optimum_cap import config
    from optimum_cap.formats import FORMATS
    from optimum_cap.methods import ALLOCATIONS, CRITERIA

    parser = CommandParser()
    PruneCommand.parse_args(parser)
    texts = {action.dest: action.help for action in parser._actions}
    for field, choices in {
        "recipe": config.RECIPES,
        "criterion": [name for name, criterion in CRITERIA.items() if criterion.ranks_weights],
        "allocation": ALLOCATIONS,
        "target": config.TARGETS,
        "order": config.ORDERS,
        "aggregation": config.AGGREGATIONS,
        "kv_combination": config.KV_COMBINATIONS,
        "answers": config.ANSWERS,
        "answer_selection": config.ANSWER_SELECTIONS,
        "scored_tokens": config.SCORED_TOKENS,
        "scored_units": config.SCORED_UNITS,
        "estimator": config.ESTIMATOR_NAMES,
        "checkpoint_format": FORMATS,
    }.items():
        assert set(re.findall(r"[\w:]+", texts[field])) >= set(choices), field


def test_sparsity_table_merges_experts_and_marks_what_is_missing() -> None:
    table = sparsity_table(
        [
            MatrixSparsity("model.layers.0.self_attn.o_proj.weight", 1, 4),
            MatrixSparsity("model.layers.0.mlp.experts.down_proj[0]", 1, 4),
            MatrixSparsity("model.layers.0.mlp.experts.down_proj[1]", 3, 4),
            MatrixSparsity("model.layers.1.self_attn.o_proj.weight", 3, 4),
            MatrixSparsity("model.layers.1.mlp.down_proj.weight", 4, 4),
        ]
    )
    assert [line.split() for line in table.splitlines()] == [
        ["layer", "o_proj", "mlp.experts.down_proj", "mlp.down_proj", "all"],
        ["0", "0.250", "0.500", "-", "0.417"],
        ["1", "0.750", "-", "1.000", "0.875"],
        ["all", "0.500", "0.500", "1.000", "0.600"],
    ]


def test_sensitivity_table_shows_the_ends_and_counts_the_rest() -> None:
    sites = [
        SiteSensitivity(f"layers.{layer}.experts.down_proj[7]", "expert", layer, 1, 4, layer, 0.5)
        for layer in range(23)
    ]
    broken = SiteSensitivity("layers.23.self_attn.o_proj", "attention", 23, 3, 4, None, None)
    header, *rows = [line.split() for line in sensitivity_table([*sites, broken]).splitlines()]
    assert header == ["layer.site", "nats", "per", "token", "standard", "error", "sparsity"]
    assert rows[0] == ["23.attention", "-", "-", "0.750"]
    assert rows[1] == ["22.expert7", "22", "0.5", "0.250"]
    assert rows[10] == ["4", "more"]
    assert rows[-1] == ["0.expert7", "0", "0.5", "0.250"]
    assert len(rows) == 21


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2_500_000, "2.5 MB"), (7e12, "7.0 TB")],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text
