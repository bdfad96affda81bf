"""`optimum-cli cap` on classifiers: the class to load is the one that their config names."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import same_weights
from helpers.command_line import run_cap
from helpers.tiny_models import tiny_classifier, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from optimum_cap import CAPConfig

Cap = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reward model and texts."""
    folder = tmp_path_factory.mktemp("place")
    tiny_classifier("qwen2").save_pretrained(folder / "reward")
    tiny_classifier("qwen2", "ForTokenClassification").save_pretrained(folder / "tagger")
    for name in ("reward", "tagger"):
        tiny_tokenizer().save_pretrained(folder / name)
    texts = [{"text": f"{n}+{n + 1} is {2 * n + 1}", "label": n % 2} for n in range(12)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    chats = [{"messages": [{"role": "user", "content": f"{n}+{n}=?"}]} for n in range(12)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "data" / "gsm8k").mkdir(parents=True)
    row = {"question": "1+1?", "answer": "1+1=2\n#### 2"}
    (folder / "data" / "gsm8k" / "test.jsonl").write_text(json.dumps(row))
    return folder


@pytest.fixture
def cap(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cap:
    """Run `optimum-cli cap` in the folder: exit status, stdout, stderr."""
    monkeypatch.chdir(place)
    return lambda command: run_cap(monkeypatch, capfd, command.split())


ON_TEXTS = "--dataset texts.jsonl --num-samples 6 --device-map cpu"


def test_prune_inspect_and_convert(cap: Cap, place: Path) -> None:
    status, out, err = cap(f"prune -m reward -o pruned --recipe wanda --pattern 2:4 {ON_TEXTS}")
    assert status == 0, err
    assert "from transformers import AutoModelForSequenceClassification, AutoTokenizer" in out
    assert "model = AutoModelForSequenceClassification.from_pretrained('pruned')" in out
    config = CAPConfig(recipe="wanda", pattern="2:4", dataset="texts.jsonl", num_samples=6)
    expected = AutoModelForSequenceClassification.from_pretrained("reward", pruning_config=config)
    loaded = AutoModelForSequenceClassification.from_pretrained("pruned")
    assert same_weights(loaded, expected)
    assert torch.equal(loaded.score.weight, tiny_classifier("qwen2").score.weight)
    assert AutoTokenizer.from_pretrained("pruned")("1+1") == tiny_tokenizer()("1+1")

    status, out, err = cap("inspect pruned --verify")
    assert status == 0, err
    assert "sparsity      0.500000 (0.5 requested)" in out
    assert "score.weight" not in out
    status, out, err = cap("convert pruned --format dense -o plain")
    assert status == 0, err
    assert same_weights(AutoModelForSequenceClassification.from_pretrained("plain"), expected)
    card = Path("plain/README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card


def test_prompts_without_answers_calibrate(cap: Cap) -> None:
    flags = "--dataset chats.jsonl --num-samples 6 --device-map cpu"
    status, out, err = cap(f"prune -m tagger -o tags --sparsity 0.5 --recipe sparsegpt {flags}")
    assert status == 0, err
    assert "AutoModelForTokenClassification.from_pretrained('tags')" in out


REFUSED = {
    f"prune -m reward -o out --sparsity 0.5 {ON_TEXTS}": (
        "Qwen2ForSequenceClassification has no LM head, so it predicts no tokens, but recipe "
        "'causal' with allocation 'fisher' measures predictions of tokens: choose criterion 'alps' "
        "with refine 3, the nearest to recipe 'causal', or recipe 'magnitude', "
        "'magnitude_global', 'random', 'wanda', 'sparsegpt', 'owl_wanda' or 'owl_sparsegpt'"
    ),
    f"prune -m reward -o out --sparsity 0.5 --recipe sparsegpt --answers model {ON_TEXTS}": (
        "Qwen2ForSequenceClassification has no LM head, so it cannot answer prompts: use answers "
        "'dataset'"
    ),
    **dict.fromkeys(
        [
            f"score -m reward -o out.safetensors {ON_TEXTS}",
            f"generate -m reward -o out.jsonl {ON_TEXTS}",
            "eval reward --tasks gsm8k --data-dir data --num-fewshot 0 -o out.json",
        ],
        "the model reward is a Qwen2ForSequenceClassification, which has no LM head and predicts "
        "no tokens: choose a causal language model",
    ),
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_predicts_tokens_is_refused_before_the_model_is_loaded(
    command: str, cap: Cap, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`AutoModelForCausalLM` would load such a model with an LM head of random weights."""
    for auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(auto_class, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    status, out, err = cap(command)
    assert status == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.endswith(f": error: {REFUSED[command]}")
    assert not list(place.glob("out*"))
