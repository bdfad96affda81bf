"""The guides and the quick tour: their code runs, block by block, on tiny models."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import run_cap
from helpers.evaluation import SUMS, TEMPLATE, write_rows
from helpers.paths import EXAMPLES, ROOT
from helpers.tiny_models import tiny_model, tiny_tokenizer

GUIDES = sorted([*ROOT.glob("docs/guides/*.md"), ROOT / "docs" / "quick_tour.md"])
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
RUN = {"bash", "python"}
SHOWN = {"json", "text"}
# Why a block may stay untested.
REASONS = {
    "installs packages",
    "needs an account on the Hub",
    "needs llama.cpp",
    "needs MLX",
    "needs transformers[serving]",
    "needs vLLM",
}
# What the commands and the code of a guide print in the end.
PROMISES = {
    "fine_tune": r"sparsity +0\.5",  # of the model that was trained
    "larger_than_memory": r"loss:test.jsonl +loss",
    "mixture_of_experts": r"2 of 4 experts",
    "own_answers": r"of 16 answers came to an end",
    "prune_your_fine_tune": r"sparsity +0\.500",
    "publish": r"gsm8k +accuracy",
    "quick_tour": r"1,651,507 of 2,359,296 weights are zero",
    "serve": r"(?s)(12 \+ 30 =.*){3}",
}
MODELS = ("my-fine-tune", "my-large-model", "my-mixture", "my-model", "my-reasoner")
SIZE = 256


@dataclass(frozen=True)
class Block:
    """A block of code in a page.

    Attributes:
        language: The language that the page names.
        code: The code.
        reason: Why it is not run, as the comment before it says.
    """

    language: str
    code: str
    reason: str | None

    def commands(self) -> Iterator[list[str]]:
        """Yield the commands of a bash block, whose lines may end in a backslash."""
        for line in self.code.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def blocks(page: Path) -> list[Block]:
    return [
        Block(found["language"], found["code"], found["reason"])
        for found in BLOCK.finditer(page.read_text())
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model for each id of the guides."""
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        architecture = "mixtral" if name == "my-mixture" else "llama"
        tokenizer = tiny_tokenizer(TEMPLATE)
        tokenizer.model_max_length = SIZE
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        tiny_model(architecture, max_position_embeddings=SIZE, **sizes).save_pretrained(
            folder / name
        )
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def workplace(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with what the reader of a guide has: models, data, and the examples."""
    (tmp_path / "you").symlink_to(models)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    rows = [
        {"prompt": f"{a} + {b} =", "completion": f"{a} + {b} = {a + b}"}
        for a in range(12)
        for b in range(12)
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "gsm8k" / "test.jsonl", SUMS)
    write_rows(
        tmp_path / "test.jsonl",
        [{"prompt": row["question"], "completion": row["answer"]} for row in SUMS],
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_blocks_are_run_or_say_why_not() -> None:
    for page in GUIDES:
        found = blocks(page)
        assert len(found) == len(re.findall(r"^```\w+$", page.read_text(), re.MULTILINE))
        for block in found:
            assert block.language in RUN | SHOWN, f"{page.name}: {block.language}"
            assert block.reason in REASONS | {None}, f"{page.name}: {block.reason}"
            if block.language == "bash" and block.reason is None:
                for words in block.commands():
                    assert words[:2] == ["optimum-cli", "cap"], f"{page.name}: {words}"


@pytest.mark.parametrize(
    "page",
    # The quick tour does what examples/quickstart.py does, which CI runs.
    [
        pytest.param(page, marks=getattr(pytest.mark, mark), id=page.stem)
        for page in GUIDES
        for mark in ["exhaustive" if page.stem == "quick_tour" else "slow"]
    ],
)
@pytest.mark.filterwarnings("default")  # as for a reader
def test_the_code_of_a_guide_runs(
    page: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    names: dict[str, Any] = {"__name__": "guide"}
    printed = []
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            capfd.readouterr()
            exec(compile(block.code, str(page), "exec"), names)
            printed.append(capfd.readouterr().out)
        elif block.language == "bash" and block.reason is None:
            for words in block.commands():
                status, out, err = run_cap(monkeypatch, capfd, words[2:])
                assert status == 0, f"{shlex.join(words)}\n{out}\n{err[-3000:]}"
                printed.append(out)
    assert re.search(PROMISES[page.stem], "\n".join(printed)), "\n".join(printed)
