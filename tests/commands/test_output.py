"""What commands print: the opening, results as text or JSON, and little with `--quiet`."""

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.command_line import run_cap
from helpers.tiny_models import tiny_model, tiny_tokenizer

from optimum_cap import CAPConfig
from optimum_cap.commands.base import CAPSubcommand
from optimum_cap.commands.cap import CAPCommand
from optimum_cap.commands.compare import CompareCommand
from optimum_cap.commands.inspect import InspectCommand
from optimum_cap.commands.opening import DEFAULTS, WITHOUT_DATA, opening_lines
from optimum_cap.commands.parser import CommandParser
from optimum_cap.commands.prune import PruneCommand, _what_next
from optimum_cap.config import RECIPES
from optimum_cap.progress import PROGRESS

Cap = Callable[..., tuple[int, str, str]]

OPTIMUM_CLI = Path(sys.executable).with_name("optimum-cli")

FLAGS = "--sparsity 0.5 --dataset sums.jsonl --num-samples 6 --device-map cpu --recipe wanda"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and data."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{n}+{n + 1}=", "completion": f"{2 * n + 1}"} for n in range(12)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def cap(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cap:
    """Run `optimum-cli cap` in the folder: exit status, stdout, stderr."""
    monkeypatch.chdir(folder)
    return lambda command: run_cap(monkeypatch, capfd, command.split())


@pytest.fixture(scope="module")
def pruned(folder: Path) -> Path:
    """A pruned checkpoint, and beside it what its command has printed."""
    command = [OPTIMUM_CLI, "cap", "prune", "model", "-o", "pruned", *FLAGS.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder / "pruned"


def test_the_opening_says_what_comes(pruned: Path) -> None:
    model, data, device = (pruned.parent / "stderr").read_text().splitlines()
    size = sum(file.stat().st_size for file in (pruned.parent / "model").glob("*.safetensors"))
    assert f"({size / 1000:.1f} kB, LlamaForCausalLM)" in model
    assert model.startswith("pruning model (")
    assert model.endswith("): recipe wanda, sparsity 0.5")
    assert data == "data: sums.jsonl, 6 examples, seed 0"
    assert device == "device: cpu; an interrupted run resumes from the Hugging Face cache"


def test_the_opening_needs_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys\n"
        "from optimum.commands import optimum_cli\n"
        "from optimum_cap.commands.base import CAPSubcommand\n"
        "class Stop(BaseException): pass\n"
        "def stop(self):\n"
        "    self.opening()\n"
        "    assert not {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "    sys.exit(7)\n"
        "CAPSubcommand.announce = stop\n"
        f"sys.argv = ['optimum-cli', 'cap', 'prune', 'model', '-o', 'x', *{FLAGS.split()!r}]\n"
        "optimum_cli.main()\n"
    )
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, timeout=200)
    assert done.returncode == 7


def test_the_opening_knows_the_defaults() -> None:
    config = CAPConfig(sparsity=0.5)
    for name, value in DEFAULTS.items():
        default = getattr(config, name)
        assert value == ([default] if name == "dataset" else default), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_opening_knows_which_recipes_need_no_data(recipe: str) -> None:
    needs_data = CAPConfig(sparsity=0.5, recipe=recipe).method.needs_data
    assert needs_data == (recipe not in WITHOUT_DATA)


@pytest.mark.parametrize(
    ("flags", "settings", "lines"),
    [
        (
            "--config settings.yaml",
            "sparsity: 0.5\npattern: 2:4\ndataset: [a.jsonl, b.jsonl]\nseed: 3\nresume_dir: r\n",
            [
                "recipe causal, sparsity 0.5, pattern 2:4, settings of settings.yaml",
                "data: a.jsonl, b.jsonl, 128 examples, seed 3",
                "device: auto; an interrupted run resumes from r",
            ],
        ),
        (
            "--config settings.yaml --sparsity 0.6",
            "sparsity: 0.5\nrecipe: magnitude\n",
            ["recipe magnitude, sparsity 0.6, settings of settings.yaml", "data: none"],
        ),
        ("--config none.yaml", "", ["pruning model: recipe causal, settings of none.yaml"]),
        ("--scores file", "", ["pruning model: recipe paper", "data: scores of file"]),
        ("--scores file --recipe wanda", "", ["pruning model: recipe wanda"]),
        ("--criterion random", "", ["recipe causal, criterion random", "data: none"]),
        ("--criterion random --allocation fisher", "", ["", "data: gsm8k, 128 examples, seed 0"]),
        ("--dataset a\x1b[2J", "", ["", r"data: a\x1b[2J, 128 examples, seed 0"]),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("--") else "",
)
def test_the_opening_says_what_flags_and_files_choose(
    flags: str,
    settings: str,
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("settings.yaml").write_text(settings)
    parser = CommandParser(prog="cap prune")
    PruneCommand.parse_args(parser)
    command = PruneCommand.__new__(PruneCommand)
    command.args = parser.parse_args(["model", "-o", "out", *flags.split()])
    command.announce()
    shown = capfd.readouterr().err.splitlines()
    assert len(shown) == 3
    for line, expected in zip(shown, lines, strict=False):
        assert line.endswith(expected)


@pytest.mark.parametrize(
    ("arguments", "tasks"),
    [
        ("a b", "the default ones, all items"),
        ("a.json b", "those of the files, as many items as in the files"),
        ("a.json b --tasks gsm8k --limit 5", "gsm8k, 5 items per task"),
    ],
)
def test_the_opening_of_a_comparison(arguments: str, tasks: str) -> None:
    parser = CommandParser(prog="cap compare")
    CompareCommand.parse_args(parser)
    command = CompareCommand.__new__(CompareCommand)
    command.args = parser.parse_args(arguments.split())
    assert command.opening()[1] == f"tasks: {tasks}"


def test_a_model_of_the_cache_has_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"0" * 2500)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    lines: list[str] = []
    monkeypatch.setattr(CAPSubcommand, "announce", lambda self: lines.extend(self.opening()))
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "cap", "eval", "org/model", "--tasks", "none"])
    from optimum.commands import optimum_cli

    with pytest.raises(SystemExit):
        optimum_cli.main()
    assert lines[0] == "evaluating org/model (2.5 kB)"


def test_the_opening_takes_any_name_and_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "mo\x1b[31mdel"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"0" * 2500)
    args = Namespace(model=str(model), sparsity="\x1b", dataset=['{"path":\n1}'], device_map="cpu")
    command = SimpleNamespace(
        opening=lambda: opening_lines(args, "pruning"), _is_set=lambda flag: False
    )
    for config in ('["x"]', "null", "[" * 100_000, '{"architectures": ["\\u001b[2J"]}'):
        (model / "config.json").write_text(config)
        CAPSubcommand.announce(command)  # type: ignore[arg-type]
        first, data, device = capsys.readouterr().err.splitlines()
        assert "mo\\x1b[31mdel (2.5 kB" in first
        assert "\x1b" not in first + data + device


def test_json_is_all_of_stdout(cap: Cap, pruned: Path) -> None:
    status, out, err = cap(f"prune model -o json --json {FLAGS}")
    assert status == 0, err
    values = json.loads(out)
    assert values["saved"] == "json"
    assert values["zeros"] / values["total"] == pytest.approx(0.5)
    assert values["weight_bytes"] < values["dense_bytes"]
    assert values["seconds"] > 0
    for command in (
        "inspect pruned",
        "convert pruned --format dense -o dense",
        "report pruned -o report.html",
        "chat pruned -p 1+1= --max-new-tokens 2",
        "prune model -o dry --dry-run " + FLAGS,
        "score model -o scores --dataset sums.jsonl --num-samples 6 --device-map cpu",
    ):
        status, out, err = cap(f"{command} --json")
        assert status == 0, (command, err)
        assert isinstance(json.loads(out), dict), command


def test_json_has_null_for_what_is_no_number(
    cap: Cap, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"a": math.nan, "b": [1.5, (-math.inf, Path("x"))]}
    monkeypatch.setattr(InspectCommand, "execute", lambda self, prepared: values)
    status, out, _ = cap("inspect pruned --json")
    assert (status, json.loads(out)) == (0, {"a": None, "b": [1.5, [None, "x"]]})


class _Prints(CAPSubcommand):
    """Prints as other packages do."""

    def __init__(self, **flags: bool) -> None:
        self.args = Namespace(**flags)

    def prepare(self) -> None:
        print("loading")

    def execute(self, prepared: None) -> dict[str, Any]:
        print("done")
        return {"a": 1}


def test_json_is_apart_from_what_other_packages_print(capsys: pytest.CaptureFixture[str]) -> None:
    _Prints(json=True).run()
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1}
    assert err == "loading\ndone\n"


@pytest.mark.usefixtures("capsys")
@pytest.mark.parametrize(
    ("chosen", "shown"), [(None, "lines"), ("auto", "lines"), ("none", "none")]
)
def test_progress_in_a_log_is_lines_unless_chosen_otherwise(
    chosen: str | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PROGRESS, raising=False)
    if chosen:
        monkeypatch.setenv(PROGRESS, chosen)
    modes: list[str | None] = []
    monkeypatch.setattr(_Prints, "prepare", lambda self: modes.append(os.environ.get(PROGRESS)))
    _Prints().run()
    assert modes == [shown]
    assert os.environ.get(PROGRESS) == chosen


def test_quiet_prints_the_result_alone(cap: Cap, pruned: Path) -> None:
    assert cap(f"prune model -o quiet --quiet {FLAGS}") == (0, "quiet\n", "")
    assert cap("convert quiet --format dense -o quiet_dense --quiet") == (0, "quiet_dense\n", "")
    status, out, err = cap("inspect pruned --quiet")
    assert (status, err) == (0, "")
    assert "recipe        wanda" in out


def test_every_command_has_the_general_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for info in CAPCommand.SUBCOMMANDS:
        parser = CommandParser(prog=f"optimum-cli cap {info.name}")
        info.subcommand_class.parse_args(parser)
        text = parser.format_help()
        for flag in ("--help", "--json", "--quiet", "--debug"):
            assert text.count(f"  {flag}") + text.count(f", {flag}") == 1, (info.name, flag)
        assert "\nexamples:\n" in text
        assert "https://" in text.splitlines()[-1]
        assert max(map(len, text.splitlines())) <= 80, info.name


def test_values_that_look_like_m(capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandParser(prog="cap")
    parser.add_model("a model")
    parser.group("data")("--prompt")
    assert parser.parse_args(["-m=name"]).model == "name"
    assert parser.parse_args(["--", "-m"]).model == "-m"
    for prompt in (["--prompt=-m"], ["--prompt", "-m is a flag"]):
        assert parser.parse_args(["name", *prompt]).model == "name"
    for form in (["-m", ""], ["-m="], ["--model=", "name"]):
        with pytest.raises(SystemExit):
            parser.parse_args(form)
        assert "argument -m/--model: expected one argument" in capsys.readouterr().err
    for form in (["-m=-x"], ["-m-x"], ["--model=-x"]):
        with pytest.raises(SystemExit):
            parser.parse_args(form)
        assert "the model '-x' begins with a dash: write ./-x" in capsys.readouterr().err


@pytest.mark.parametrize("info", CAPCommand.SUBCOMMANDS, ids=lambda info: info.name)
def test_the_model_is_the_first_argument_or_that_of_m(info: object) -> None:
    parser = CommandParser(prog="cap")
    info.subcommand_class.parse_args(parser)  # type: ignore[attr-defined]
    if not parser.takes_model:
        assert info.name in ("study", "completion")  # type: ignore[attr-defined]
        return
    rest = {
        "convert": ["--format", "dense", "-o", "x"],
        "compare": ["other"],
        "push": ["repo"],
    }.get(info.name, ["-o", "x"] if "-o" in parser.flags else [])  # type: ignore[attr-defined]
    forms = [["name", *rest], ["-m", "name", *rest], [*rest, "--model", "name"]]
    forms += [[*rest, "--model=name"], ["-mname", *rest], ["-m=name", *rest]]
    if rest[:1] in (["-o"], []):
        forms.append([*rest, "name"])
    first, *others = (vars(parser.parse_args(form)) for form in forms)
    assert "name" in first.values()
    assert all(other == first for other in others)


def test_the_advice_after_pruning_works_for_the_model() -> None:
    args = Namespace(model="my model", output=Path("out"), push_to_hub=None)
    assert _what_next(args, "AutoModelForCausalLM").splitlines()[1:] == [
        "See what it has lost, talk to both and share it:",
        "",
        "optimum-cli cap compare 'my model' out --tasks gsm8k_loss --limit 64",
        "optimum-cli cap chat 'my model' out",
        "optimum-cli cap push out you/name",
    ]
    # A classifier gives no answers.
    classifier = "AutoModelForSequenceClassification"
    assert _what_next(args, classifier).endswith("Share it:\n\noptimum-cli cap push out you/name")
    args.push_to_hub = "you/name"
    assert "push" not in _what_next(args, "AutoModelForCausalLM")
    assert _what_next(args, classifier) == ""


def test_a_dry_run_checks_all_and_writes_nothing(cap: Cap, folder: Path) -> None:
    before = sorted(folder.iterdir())
    status, out, err = cap(f"prune model -o dry --dry-run {FLAGS}")
    assert status == 0, err
    assert sorted(folder.iterdir()) == before
    assert "would prune   model, loaded as AutoModelForCausalLM" in out
    assert "recipe        wanda: criterion wanda, allocation uniform" in out
    assert "calibration   6 examples, " in out
    assert all(len(line) <= 80 for line in out.splitlines())
    status, _, err = cap("prune model -o dry --dry-run --sparsity 2")
    assert status == 2
    assert "sparsity must be" in err


def test_a_file_of_settings(cap: Cap, folder: Path) -> None:
    file = folder / "settings.yaml"
    file.write_text(
        "pattern: 2:4\nrecipe: sparsegpt\ndataset: sums.jsonl\nnum_samples: 6\nseed: 3\n"
    )
    run = "prune model -o file --device-map cpu --dry-run --json --config settings.yaml"
    status, out, err = cap(run)
    assert status == 0, err
    settings = json.loads(out)["settings"]
    assert (settings["pattern"], settings["recipe"], settings["seed"]) == ("2:4", "sparsegpt", 3)
    status, out, _ = cap(f"{run} --recipe wanda --seed 4")
    assert status == 0
    settings = json.loads(out)["settings"]
    assert (settings["recipe"], settings["seed"]) == ("wanda", 4)
    for text, message in {
        "sparsty: 0.5": "settings.yaml: CAPConfig has no field 'sparsty' (did you mean 'sp",
        "sparsity: 0.5\nsparsity: 0.6": "settings.yaml is not valid YAML: the key 'sparsity'",
        "- 0.5": "settings.yaml must be a YAML mapping, got list",
        "sparsity: [1]": "sparsity must be",
    }.items():
        file.write_text(text)
        status, _, err = cap(run)
        assert status == 2
        assert message in err, err
        assert len(err.splitlines()) == 1
    status, _, err = cap("prune model -o file --config none.yaml")
    assert status == 2
    assert "the settings file none.yaml does not exist" in err


def test_the_version(cap: Cap) -> None:
    status, out, _ = cap("--version")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()][::3] == ["optimum-cap", "torch"]


def test_the_shell_completes_commands_and_flags(cap: Cap, tmp_path: Path) -> None:
    status, script, err = cap("completion bash")
    assert (status, err) == (0, "")
    (tmp_path / "script").write_text(script)

    def completed(*words: str) -> list[str]:
        code = (
            f"source {tmp_path / 'script'}; f=$(complete -p optimum-cli); f=${{f##*-F }}; "
            f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; ${{f%% *}}; "
            'echo "${COMPREPLY[@]}"'
        )
        return subprocess.check_output(["bash", "-c", code], text=True).split()

    assert completed("optimum-cli", "cap", "pru") == ["prune"]
    assert completed("optimum-cli", "cap", "prune", "--sparsi") == ["--sparsity"]
    assert "export" in completed("optimum-cli", "exp")
