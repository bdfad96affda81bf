"""`cap generate` and the flags for the model's own answers."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.checkpoints import saved
from helpers.command_line import run_cap
from transformers import AutoModelForCausalLM

Cap = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, saved."""
    return saved(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration data in a file."""
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{n}+{n + 1}=", "completion": f"{2 * n + 1}"} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def cap(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cap:
    """Run `optimum-cli cap` in this process: exit status, stdout, last line of stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        status, out, err = run_cap(monkeypatch, capfd, arguments)
        return status, out, (err.splitlines() or [""])[-1]

    return run


def flags(dense: Path, sums: Path, *others: str) -> list[str]:
    text = f"-m {dense} --dataset {sums} --num-samples 6 --max-new-tokens 9 --device-map cpu"
    return [*text.split(), *others]


def test_generate_writes_answers_that_prune_can_read(
    cap: Cap, dense: Path, sums: Path, tmp_path: Path
) -> None:
    file = tmp_path / "traces.jsonl"
    status, out, _ = cap("generate", *flags(dense, sums), "-o", file)
    assert status == 0
    assert re.match(r"answers       6 of the dense model's own, sampled at temperature 0.6", out)
    assert f"--dataset {file} --num-samples 6" in out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 6
    assert set(rows[0]) >= {"prompt", "completion", "finished", "correct", "tokens", "row_digest"}
    own, from_file = tmp_path / "own", tmp_path / "from file"
    recipe = ("--sparsity", "0.5", "--recipe", "wanda")
    status, out, _ = cap("prune", *flags(dense, sums), *recipe, "--answers", "model", "-o", own)
    assert status == 0
    assert "\nanswers       6 of the dense model's own" in f"\n{out}"
    status, _, _ = cap(
        "prune", "-m", dense, "--dataset", file, "--num-samples", "6", *recipe, "-o", from_file
    )
    assert status == 0
    records = [
        json.loads((folder / "pruning_record.json").read_text())["calibration"]
        for folder in (own, from_file)
    ]
    assert sorted(records[0]["digests"]) == sorted(records[1]["digests"])
    assert "answers" not in records[1]
    status, out, _ = cap("inspect", own)
    assert "answers       6 of the dense model's own, sampled at temperature 0.6 and top-p" in out
    status, out, _ = cap("inspect", from_file)
    assert "of the dense model's own" not in out


def test_answers_are_stored_in_the_resume_folder(
    cap: Cap, dense: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimum_cap.generation import sampler

    resume = ("--resume-dir", str(tmp_path / "kept"))
    cap("generate", *flags(dense, sums, *resume), "-o", tmp_path / "first.jsonl")
    monkeypatch.setattr(sampler, "sample_answers", _must_not_be_called)
    status, _, err = cap("generate", *flags(dense, sums, *resume), "-o", tmp_path / "second.jsonl")
    assert status == 0, err
    first, second = (tmp_path / f"{name}.jsonl" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def _must_not_be_called(*args: object, **kwargs: object) -> None:
    raise AssertionError("the model was loaded, or has answered")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ("-o exists.jsonl", "the output .*exists.jsonl exists: pass --overwrite to replace it"),
        ("-o traces.txt", "the output .*traces.txt must end in .jsonl or .json, so that `--datas"),
        ("-o a.jsonl --top-p 2", "top_p must be at most 1, got 2.0"),
        ("-o a.jsonl --temperature 0", "temperature must be a positive number, got 0.0"),
        ("-o a.jsonl --max-new-tokens 64", "max_new_tokens is 64, but an example with its prompt"),
        ("-o a.jsonl --num-samples 13", "has 12 usable prompts of 12 rows, but 13 are needed"),
        ("-o a.jsonl --answer-candidates 5", r"answer_candidates is 5, but num_samples \(6\) of"),
        ("-o a.jsonl --dataset {texts}", "has plain texts, which are no prompts to answer: leave"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(
    others: str,
    message: str,
    cap: Cap,
    dense: Path,
    sums: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", _must_not_be_called)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists.jsonl").write_text("another run's")
    (tmp_path / "texts.txt").write_text("a text\nanother text")
    name, _, texts = others.partition(" --dataset ")
    data = Path(texts.format(texts=tmp_path / "texts.txt")) if texts else sums
    status, out, err = cap("generate", *flags(dense, data), *name.split())
    assert (status, out) == (2, "")
    assert re.search(f"^optimum-cli cap generate: error: .*{message}", err)
    assert (tmp_path / "exists.jsonl").read_text() == "another run's"


def test_overwrite_replaces_the_file(cap: Cap, dense: Path, sums: Path, tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    file.write_text("another run's")
    assert cap("generate", *flags(dense, sums), "-o", file, "--overwrite")[0] == 0
    assert len(file.read_text().splitlines()) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["traces.jsonl"]


@pytest.mark.parametrize(
    ("command", "others", "message"),
    [
        (
            "prune",
            "--sparsity 0.5 --temperature 0.7",
            "temperature 0.7 and max_new_tokens 9 have no effect with recipe 'causal' and answers "
            "'dataset': leave them out, or choose answers 'model' to use them",
        ),
        (
            "prune",
            "--sparsity 0.5 --answers model --show-example",
            "--show-example loads no model, so it cannot show an answer of the model: leave out "
            "--answers, or write answers to a file with `cap generate`",
        ),
        (
            "prune",
            "--sparsity 0.5 --answers model --num-samples 20",
            "data set 'sums.jsonl' has 12 usable prompts of 12 rows, but 20 are needed: lower "
            "num_samples",
        ),
        (
            "score",
            "--answers nobody",
            "answers must be one of dataset, model, got 'nobody'",
        ),
    ],
)
def test_answers_that_cannot_be_had_are_refused_before_the_model_is_loaded(
    command: str,
    others: str,
    message: str,
    cap: Cap,
    dense: Path,
    sums: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", _must_not_be_called)
    status, _, err = cap(command, *flags(dense, sums), *others.split(), "-o", tmp_path / "out")
    assert status == 2
    assert err == f"optimum-cli cap {command}: error: {message}"
