"""Usual mistakes on the command line: each gets one sentence, before the model is loaded."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command_line import run_cap
from helpers.paths import ROOT
from helpers.tiny_models import tiny_model, tiny_tokenizer
from optimum.commands import optimum_cli
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CLIPVisionConfig,
    LlamaConfig,
    T5Config,
)

from optimum_cap.commands.base import CAPSubcommand
from optimum_cap.commands.cap import CAPCommand

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and what a user may take for them."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{n}+{n + 1}=", "completion": f"{2 * n + 1}"} for n in range(12)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").touch()
    (folder / "broken.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n{"prompt": \n')
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "nothing").mkdir()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    T5Config(vocab_size=64).save_pretrained(folder / "t5")
    CLIPVisionConfig().save_pretrained(folder / "clip")
    BertConfig(vocab_size=64).save_pretrained(folder / "bert")
    LlamaConfig(architectures=["LlamaModel"]).save_pretrained(folder / "headless")
    quantized = LlamaConfig(vocab_size=64)
    quantized.quantization_config = {"quant_method": "gptq", "bits": 4}
    quantized.save_pretrained(folder / "gptq")
    tiny_model("llama").save_pretrained(folder / "no-tokenizer")
    rows = [{"question": f"{n}+1=", "reply": f"{n + 1}"} for n in range(12)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Refused:
    """Run `optimum-cli cap` in the folder of the mistakes, and return its only line on stderr."""

    def run(command: str) -> str:
        monkeypatch.chdir(place)
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", _must_not_be_called)
        monkeypatch.setattr(CAPSubcommand, "announce", lambda self: None)
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "cap", *command.split()])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            optimum_cli.main()
        out, err = capfd.readouterr()
        assert stopped.value.code in (1, 2)
        assert out == ""
        (line,) = err.splitlines()
        return line

    return run


def _must_not_be_called(*args: object, **kwargs: object) -> None:
    raise AssertionError("the model was loaded")


PRUNE = "prune -m model -o out --dataset sums.jsonl --device-map cpu --num-samples 4 "
HALF = PRUNE + "--sparsity 0.5 "
ON = "prune -o out --sparsity 0.5 --recipe magnitude --device-map cpu -m "
MISTAKES = {
    # Numbers and choices
    PRUNE + "--recipe wanda": "sparsity must be a number strictly between 0 and 1 .*, got nothing",
    PRUNE + "--sparsity 20%": r"sparsity must be .*, got '20%': write 0\.2 for 20 %",
    PRUNE + "--sparsity 20": r"sparsity must be .*, got 20\.0: write 0\.2 for 20 %",
    PRUNE + "--sparsity 0": r"sparsity must be a number strictly between 0 and 1 .*, got 0\.0",
    PRUNE + "--sparsity 1": r"sparsity must be a number strictly between 0 and 1 .*, got 1\.0",
    PRUNE + "--sparsity half": "sparsity must be a number strictly between .*, got 'half'",
    HALF + "--num-samples -3": "num_samples must be an integer of at least 1, got -3",
    HALF + "--num-samples many": "num_samples must be an integer of at least 1, got 'many'",
    HALF + "--seed 1.5": "seed must be an integer of at least 0, got '1.5'",
    HALF + "--recipe wnada": r"recipe must be one of .*, got 'wnada' \(did you mean 'wanda'\?\)",
    HALF + "--criterion sparsgpt": r"criterion must be .* \(did you mean 'sparsegpt'\?\)",
    HALF + "--pattern 2-4": "pattern must be .*, got '2-4'",
    HALF + "--pattern 1:4": r"pattern '1:4' keeps .* sparsity 0.75, got sparsity 0\.5: set it to",
    HALF + "--recipe wanda --subsets 5 --estimator first_order": (
        "subsets 5 and estimator 'first_order' have no effect with recipe 'wanda': leave them out"
    ),
    HALF + "--recipe magnitude": (
        "dataset 'sums.jsonl' and num_samples 4 have no effect with recipe 'magnitude': leave them"
    ),
    HALF + "--criterion wanda --recipe paper": "recipe 'paper' has no effect with criterion 'wan",
    HALF + "--leave-dense re:[": r"has the pattern 're:\[', which is not a regular expression",
    HALF + "--dtype fp8": "argument --dtype: invalid choice: 'fp8': choose from auto, float32",
    HALF + "--format zipped": "checkpoint_format must be one of packed, coded, dense, got 'zipped'",
    # Flags
    HALF + "--sparcity 0.3": r"unknown flag --sparcity \(did you mean '--sparsity'\?\): opt",
    HALF + "--num_samples 3": r"unknown flag --num_samples \(did you mean '--num-samples'\?\)",
    HALF + "-sparsity 0.3": r"unknown flag -sparsity \(did you mean '--sparsity'\?\)",
    HALF + "--scored-units all": r"unknown flag --scored-units \(did you mean '--units'\?\)",
    HALF + "--xyzzy": "unknown flag --xyzzy: optimum-cli cap prune --help lists the flags",
    "eval -model model": r"unknown flag -model \(did you mean '--model'\?\)",
    HALF + "-m other": "argument -m/--model: given twice: give it once",
    HALF + "--dataset gsm8k": "argument --dataset: given twice: give it once with all its values",
    HALF + "--sparsity": "argument --sparsity: expected one argument",
    "prune -o out --sparsity 0.5": "the following arguments are required: MODEL",
    "prune --dataset sums.jsonl model -o out": r"required: MODEL \(name it first, or with -m: a",
    "prune model -o out -m model": "unexpected argument 'model': the model is given by -m already",
    "prun -m model": r"unknown command 'prun' \(did you mean 'prune'\?\): choose from prune,",
    "eval": "the following arguments are required: MODEL",
    "eval model --limit ten": "argument --limit: invalid int value: 'ten'",
    # Devices
    HALF.replace("cpu", "gpu"): "--device-map gpu is neither a placement .* nor a device such as",
    HALF.replace("cpu", "meta"): "--device-map meta loads no weights",
    # Models
    ON + "./modle": r"the model folder \./modle does not exist: check the path",
    ON + "/no/such/model": "the model folder /no/such/model does not exist: check the path",
    ON + "owner/typo": "there is no folder owner/typo, the model is not in the cache, and the Hub",
    ON + "model.gguf": "model.gguf is a file, not a folder or a Hub id: prune the float model",
    HALF
    + "--tokenizer nowhere": "no tokenizer could be loaded from 'nowhere' .*: name another one",
    ON + "sums.jsonl": "the model sums.jsonl is a file, not a folder or a Hub id",
    ON + "nothing": "the folder nothing holds no model, as it has no config.json: check the path",
    ON + "adapter": "the folder adapter holds a PEFT adapter, not a model: merge it",
    ON + "t5": "the model t5 is of type 't5', which is no decoder-only language model: choose",
    ON + "clip": "the model clip is of type 'clip_vision_model', which is no decoder-only language",
    ON + "headless": "the model headless was saved as LlamaModel, without an LM head",
    "compact headless -o out": "the model headless was saved as LlamaModel, without an LM head",
    ON + "bert": "the model bert is of type 'bert', which is no decoder-only language model",
    ON + "gptq": r"the model gptq is quantized \(gptq\), but only float weights can be pruned",
    "score -o s.safetensors -m t5": "the model t5 is of type 't5', which is no decoder-only",
    "eval ./modle --tasks gsm8k --data-dir .": r"gsm8k: no data file; looked for|does not exist",
    "compact ./modle -o out": r"the model folder \./modle does not exist: check the path",
    "compact nothing -o out": "the folder nothing holds no model, as it has no config.json",
    "compact t5 -o out": "the model t5 is of type 't5', which is no decoder-only language model",
    "compact gptq -o out": r"the model gptq is quantized \(gptq\), but only float weights can be",
    "compact model": "the following arguments are required: -o/--output",
    "compact model -o t5": r"the output folder t5 is not empty \(it holds config\.json\)",
    "compact model -o model": "the output model is the folder of the model itself",
    # Data and outputs
    HALF.replace("sums", "no"): r"no\.jsonl.* does not exist",
    HALF.replace("sums", "empty"): r"empty\.jsonl is empty",
    HALF.replace("sums", "broken"): r"broken\.jsonl.* not a valid jsonl file",
    HALF.replace("-o out", "-o nothing/../model"): "the output .*model is the folder of the model",
    HALF.replace("-o out", "-o t5"): r"the output folder t5 is not empty \(it holds config\.json\)",
    HALF.replace("-o out", "-o sums.jsonl"): "the output sums.jsonl is a file: name a folder",
    HALF.replace("-o out", "-o sums.jsonl/x"): r"the output .*x is inside the file .*sums\.jsonl:",
    HALF.replace("-o out", f"-o {'x' * 300}"): "the output name x+... has 300 bytes, .* allows 255",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_gets_one_sentence(command: str, refused: Refused, place: Path) -> None:
    line = refused(command)
    assert re.match(r"optimum-cli cap( \w+)?: error: ", line)
    assert re.search(MISTAKES[command], line), line
    assert not (place / "out").exists()


PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(.+?)`(?: \(.+?\))? \| (.+) \|$", PAGE, re.MULTILINE))
ABBREVIATED = "-m model -o out --dataset sums.jsonl --num-samples 4 --sparsity 0.5"


@pytest.fixture(scope="module")
def place_with_results(place: Path) -> Path:
    """The same folder, with a pruned model, and scores of another model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        other = tiny_model("llama", seed=1)
        other.save_pretrained("other")
        tiny_tokenizer().save_pretrained("other")
        for command in (
            "prune -m model -o pruned --sparsity 0.5 --recipe magnitude --device-map cpu",
            "score -m other -o scores.safetensors --dataset sums.jsonl --num-samples 4",
        ):
            patch.setattr(sys, "argv", ["optimum-cli", "cap", *command.split()])
            optimum_cli.main()
    return place


def test_the_page_says_what_its_abbreviation_is() -> None:
    assert len(ROWS) >= 30
    assert f"`…` stands for `{ABBREVIATED}`" in PAGE.replace("\n", " ")


@pytest.mark.parametrize("command", ROWS)
def test_the_page_of_common_mistakes_is_true(
    command: str,
    place_with_results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place_with_results)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, out, err = run_cap(monkeypatch, capfd, command.replace("…", ABBREVIATED).split())
    assert status in (1, 2)
    assert out == ""
    assert not Path("out").exists()
    said = err.splitlines()[-1].removeprefix(f"optimum-cli cap {command.split()[0]}: error: ")
    words = ".*".join(map(re.escape, ROWS[command].split("...")))
    assert re.fullmatch(words, said), f"docs/troubleshooting.md has to say: {said}"


def test_a_missing_device_is_named(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = "--device-map cuda:0 needs a CUDA device, but torch finds none: choose another"
    assert message in refused(HALF.replace("cpu", "cuda:0"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    message = "--device-map cuda:7 needs a CUDA device, but torch finds 2: choose another"
    assert message in refused(HALF.replace("cpu", "cuda:7"))


def test_a_resume_folder_that_cannot_be_written(refused: Refused) -> None:
    line = refused(HALF + "--resume-dir sums.jsonl/x")
    assert "the resume folder sums.jsonl/x cannot be written" in line
    if os.path.isdir("/proc"):
        line = refused(HALF + "--resume-dir /proc/none")
        assert "the resume folder /proc/none cannot be written" in line


@pytest.mark.parametrize("info", CAPCommand.SUBCOMMANDS, ids=lambda info: info.name)
def test_an_interrupted_command_says_to_run_it_again(
    info: object, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command: type[CAPSubcommand] = info.subcommand_class  # type: ignore[attr-defined]

    def interrupted(self: CAPSubcommand) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "prepare", interrupted)
    arguments = {
        "prune": ["-m", "model", "-o", "out"],
        "score": ["-m", "model", "-o", "out"],
        "generate": ["-m", "model", "-o", "out.jsonl"],
        "convert": ["model", "--format", "dense", "-o", "out"],
        "compact": ["model", "-o", "out"],
        "recover": ["-m", "model", "-o", "out"],
        "compare": ["model", "other"],
        "push": ["model", "repo"],
        "completion": ["bash"],
    }
    name = info.name  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "cap", name, *arguments.get(name, ["model"])])
    with pytest.raises(SystemExit) as stopped:
        optimum_cli.main()
    assert stopped.value.code == 130
    resumes = ("prune", "generate", "score", "study", "eval", "compare", "recover")
    aim = "continue" if name in resumes else "start over"
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"optimum-cli cap {name}: interrupted: run the same command again to {aim}"
