"""Uploads that are refused before the Hub is asked; `test_hub.py` has those that reach it."""

from pathlib import Path

import huggingface_hub
import pytest
from helpers.checkpoints import change_record, pruned
from helpers.command_line import run_cap
from helpers.tiny_models import tiny_model, tiny_tokenizer

from optimum_cap.checkpoint import inspect_checkpoint, set_base_model
from optimum_cap.publishing import push_checkpoint


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the Hub was asked")

    for name in ("whoami", "repo_exists", "create_repo", "create_commit"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, fail)
    pruned().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_damaged_weights_and_a_missing_card_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model.safetensors has changed since"):
        push_checkpoint(folder, "user/never")
    weights.write_bytes(original)
    (folder / "pruning_results.json").write_text("{")
    with pytest.raises(ValueError, match=r"pruning_results.json"):
        push_checkpoint(folder, "user/never")
    (folder / "pruning_results.json").unlink()
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"has no README.md, without which"):
        push_checkpoint(folder, "user/never")
    with pytest.raises(ValueError, match=r"nothing is no folder"):
        push_checkpoint(folder / "nothing", "user/never")


def test_only_outdated_weights_beside_the_new_ones_are_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = []
    there = [
        "model-00001-of-00002.safetensors",
        "models/other.safetensors",
        "model_b/x.bin",
        "a.py",
    ]
    for name, result in (
        ("create_repo", huggingface_hub.RepoUrl("https://huggingface.co/user/model")),
        ("list_repo_files", there),
    ):
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda *_, given=result, **__: given)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_commit", lambda _, repo, done, **__: operations.extend(done)
    )
    push_checkpoint(folder, "user/model")
    removed = [
        each.path_in_repo
        for each in operations
        if isinstance(each, huggingface_hub.CommitOperationDelete)
    ]
    assert removed == there[:1]


def test_an_unknown_base_model_is_asked_for(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    change_record(folder, base_model="./mine")
    status, _, error = run_cap(monkeypatch, capfd, ["push", folder, "user/never"])
    assert status == 2
    assert "(only that its folder was ./mine): pass --base-model ID, or --base-model none" in error
    checked = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda: "org/dense")
    monkeypatch.setattr("optimum_cap.commands.push.check_hub_access", lambda *_: None)
    monkeypatch.setattr(
        "optimum_cap.publishing.check_base_model", lambda name, _: checked.append(name)
    )
    _, out, error = run_cap(monkeypatch, capfd, ["push", folder, "user/never", "--json"])
    assert "Hub id of the base model" not in out  # which is JSON
    assert error.count("Hub id of the base model") == 1
    assert checked == ["org/dense"]


def test_prune_names_the_base_model_of_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "mine")
    tiny_tokenizer().save_pretrained(tmp_path / "mine")

    def prune(model: object, base_model: str) -> tuple[int, str, str]:
        flags = ["--sparsity", "0.5", "--recipe", "magnitude", "-o", tmp_path / "out"]
        command = ["prune", "-m", model, *flags, "--base-model", base_model]
        return run_cap(monkeypatch, capfd, command)

    for model, name, message in (
        (tmp_path / "mine", "a/b/c", "--base-model a/b/c is no Hub id: write it as owner/name"),
        ("org/dense", "org/dense", "org/dense comes from the Hub, so its name is known"),
    ):
        status, _, error = prune(model, name)
        assert status == 2
        assert message in error
    status, _, error = prune(tmp_path / "mine", "org/dense")
    assert status == 0, error
    assert inspect_checkpoint(str(tmp_path / "out"), verify=True).record.base_model == "org/dense"
    assert "base_model: org/dense\n" in (tmp_path / "out" / "README.md").read_text()


def test_the_state_of_a_training_stays_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"")
    (folder / "optimizer.pt").write_bytes(b"")
    (folder / "logs").mkdir()
    (folder / "logs" / "notes.txt").write_text("mine")
    uploaded: list[str] = []
    monkeypatch.setattr(
        "optimum_cap.publishing.push.upload", lambda path, repo, names, **_: uploaded.extend(names)
    )
    push_checkpoint(folder, "user/repo")
    assert "logs/notes.txt" in uploaded
    assert "model.safetensors" in uploaded
    assert not [name for name in uploaded if "checkpoint" in name or "optimizer" in name]
    assert "the state of a training: checkpoint-5 and optimizer.pt" in caplog.text


def test_a_base_model_that_is_known_keeps_its_revision(folder: Path) -> None:
    change_record(folder, base_model="org/dense", base_revision="abc")
    set_base_model(folder, "org/dense")
    assert inspect_checkpoint(str(folder)).record.base_revision == "abc"
    set_base_model(folder, "org/other")
    assert inspect_checkpoint(str(folder)).record.base_revision is None
