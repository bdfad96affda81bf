"""The embedded reasoning model and the examples that use it."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.paths import EXAMPLES
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from optimum_cap import CAPConfig
from optimum_cap.data.calibration import build_calibration_set
from optimum_cap.data.sources import row_digest

REASONER = EXAMPLES / "tiny_reasoner"
MODEL = REASONER / "model"
CALIBRATION = REASONER / "data" / "calibration.jsonl"

sys.path.insert(0, str(REASONER))  # the examples are scripts, no package
from evaluate import accuracy, load_problems, wilson_interval  # noqa: E402
from tasks import KINDS, extract_answer, make_split, read_jsonl, split_of  # noqa: E402

SIZES = {"calibration": 128, "validation": 200, "test": 300}


@pytest.fixture(scope="module")
def reasoner_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def test_splits_are_complete_and_disjoint() -> None:
    seen: dict[str, str] = {}
    for split, per_kind in SIZES.items():
        rows = read_jsonl(REASONER / "data" / f"{split}.jsonl")
        assert Counter(row.kind for row in rows) == dict.fromkeys(KINDS, per_kind)
        for row in rows:
            assert split_of(row.question) == split
            assert seen.setdefault(row.question, split) == split
            assert extract_answer(row.answer) == row.final_answer


def test_data_are_what_the_script_makes() -> None:
    for split, per_kind in SIZES.items():
        assert make_split(split, per_kind) == read_jsonl(REASONER / "data" / f"{split}.jsonl")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1 + 1 = 2\n#### 2", "2"), ("####  B \nmore", "B"), ("no marker", None), ("####", "")],
)
def test_extract_answer(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


def test_wilson_interval() -> None:
    low, high = wilson_interval(90, 100)
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)  # textbook values


def test_the_weights_are_small() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 10_000_000


def test_any_text_can_be_tokenised(reasoner_tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Größe: 42 €, naïve 🙂\tΣ"
    ids = reasoner_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert reasoner_tokenizer.decode(ids) == text


def test_the_prompt_is_a_prefix_in_text_and_tokens(
    reasoner_tokenizer: PreTrainedTokenizerBase,
) -> None:
    for row in read_jsonl(CALIBRATION)[::40]:
        user = {"role": "user", "content": row.question}
        assistant = {"role": "assistant", "content": row.answer}
        prompt, whole = (
            reasoner_tokenizer.apply_chat_template(messages, tokenize=False, **options)
            for messages, options in (
                ([user], {"add_generation_prompt": True}),
                ([user, assistant], {}),
            )
        )
        assert whole == f"{prompt}{row.answer}{reasoner_tokenizer.eos_token}"
        ids = [
            reasoner_tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt, whole)
        ]
        assert ids[1][: len(ids[0])] == ids[0]


def test_calibration_scores_the_answers(reasoner_tokenizer: PreTrainedTokenizerBase) -> None:
    config = CAPConfig(sparsity=0.2, dataset=str(CALIBRATION), num_samples=12)
    rows = {row_digest(row.question, row.answer): row for row in read_jsonl(CALIBRATION)}
    for example in build_calibration_set(config, reasoner_tokenizer).examples:
        text = reasoner_tokenizer.decode(example.input_ids[example.scored])
        assert text == rows[example.digest].answer + reasoner_tokenizer.eos_token


@pytest.mark.slow
def test_bfloat16_loads_and_prunes(tmp_path: Path) -> None:
    config = CAPConfig(sparsity=0.2, dataset=str(CALIBRATION), num_samples=6)
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, pruning_config=config)
    assert model.dtype == torch.bfloat16
    assert model.pruning_record.zeros == round(0.2 * model.pruning_record.total)


@pytest.mark.slow
def test_dense_accuracy_is_at_least_90_per_cent_on_each_kind() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    shares = accuracy(model, tokenizer, load_problems("test"))
    assert min(shares.values()) >= 0.9, shares


@pytest.mark.slow
def test_training_runs_resumes_and_repeats_itself(tmp_path: Path) -> None:
    def train(folder: Path, *, stop_at: int | None = None) -> None:
        code = "import sys; sys.argv = ['train', *sys.argv[1:]]; import train; train.main()"
        if stop_at is not None:
            # Dies in the middle, as a machine that goes away would.
            code = code.replace(
                "train.main()",
                f"""
rate = train.learning_rate
def dying(step, *rest):
    if step == {stop_at}: raise SystemExit(3)
    return rate(step, *rest)
train.learning_rate, train.SAVE_EVERY = dying, 2
train.main()""",
            )
        command = [sys.executable, "-c", code, "--output", str(folder), "--steps", "6"]
        result = subprocess.run(command, cwd=REASONER, check=False, capture_output=True, text=True)
        assert result.returncode == (0 if stop_at is None else 3), result.stderr

    train(tmp_path / "a")
    train(tmp_path / "b", stop_at=5)
    train(tmp_path / "b")
    a, b = (tmp_path / name / "model" / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


RESULTS = """model,recipe,sparsity,calibration,seed,task,metric,value,low,high,n,error
llama,dense,0.0,,,sums,loss,0.10,,,60,
llama,causal,0.5,sums,0,sums,loss,0.12,,,60,
llama,causal,0.5,sums,1,sums,loss,0.14,,,60,
llama,paper,0.5,sums,0,sums,loss,0.11,,,60,
llama,paper,0.5,sums,1,sums,loss,0.11,,,60,
llama,wanda,0.5,sums,0,sums,loss,0.20,,,60,
llama,wanda,0.5,sums,1,sums,loss,0.20,,,60,
llama,magnitude,0.5,,,sums,loss,0.30,,,60,
"""


@pytest.mark.slow
def test_tables_of_a_page_are_what_their_commands_print(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(RESULTS)
    page = tmp_path / "page.md"
    before = "# A page\n\n"
    comments = [
        f"<!-- table: increases.py {tmp_path}/results.csv causal -->\n\n",
        f"<!-- table: means.py {tmp_path}/results.csv 0.5 -->\n\n",
    ]
    page.write_text(before + comments[0] + "| old |\n|---|\n\nText.\n\n" + comments[1])
    refresh = EXAMPLES / "studies" / "refresh.py"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, refresh, page], check=True, capture_output=True, text=True
        )
        assert "2 tables" in done.stdout
        # Half of the interval of two seeds: 12.7 standard errors of 0.01.
        assert page.read_text() == (
            before
            + comments[0]
            + "| model | sparsity | best peer | its increase | ours | ratio | accuracy, points |\n"
            "|---|---|---|---|---|---|---|\n"
            "| llama | 50% | wanda | 0.1 ± 0 | 0.03 ± 0.13 | 0.30 |  |\n\nText.\n\n"
            + comments[1]
            + "| recipe | llama, loss |\n|---|---|\n"
            "| dense | 0.1000 |\n"
            "| causal | 0.1300 ± 0.1271 |\n"
            "| paper | 0.1100 ± 0.0000 |\n"
            "| wanda | 0.2000 ± 0.0000 |\n"
            "| magnitude | 0.3000 |\n"
        )
    before = page.read_text()
    (tmp_path / "results.csv").write_text(RESULTS.replace("paper", "wanda"))
    done = subprocess.run(
        [sys.executable, refresh, page], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "prints 6 lines" in done.stderr
    assert page.read_text() == before


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--limit", "20"]
    result = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "(70.00%) with 128 calibration examples" in result.stdout
    table = re.findall(r"(\d+) of 20 +(\d+) of 20 +(\d+) of 20", result.stdout)
    dense, wanda, cap = (sum(map(int, column)) for column in zip(*table, strict=True))
    assert dense == 60
    assert wanda < 45
    assert cap >= 58
    for name in ("dense", "Wanda", "CAP"):
        assert re.search(rf"^ *{name} \| ", result.stdout, re.MULTILINE)
    assert (tmp_path / "out" / "pruning_record.json").exists()
