"""Sparse checkpoints: lossless, reproducible, atomic; convert and inspect."""

import copy
import dataclasses
import errno
import inspect
import json
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import contents, pruned, same_weights, sign
from helpers.paths import TESTS
from helpers.tiny_models import tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    PreTrainedModel,
)
from transformers.quantizers.base import HfQuantizer

from optimum_cap.checkpoint.conversion import convert_checkpoint, inspect_checkpoint
from optimum_cap.checkpoint.folders import atomic_folder, check_target
from optimum_cap.runtime.files import write_atomically


def test_round_trip_is_bit_identical(every_architecture: str, tmp_path: Path) -> None:
    model = pruned(every_architecture)
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(loaded) is type(model)
    assert same_weights(loaded, model)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.pruning_record == model.pruning_record
    loaded.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_same_model_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    model.save_pretrained(tmp_path / "a")  # over itself
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert os.listdir(tmp_path) == ["a", "b"] or sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_every_pruned_matrix_is_packed(every_architecture: str, tmp_path: Path) -> None:
    model = pruned(every_architecture)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    packed = {name.removesuffix("_mask") for name in tensors if name.endswith("weight_mask")}
    assert len(packed) >= len(model.pruning_record.matrices)  # fused experts are separate on disk
    for name in packed:
        assert tensors[name].ndim == 1
        assert len(tensors[name]) < int(tensors[f"{name}_shape"].prod())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_sharded(name: str, tmp_path: Path) -> None:
    model = pruned(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    stored = {key: path.name for path in shards for key in load_file(path)}
    assert stored == index["weight_map"]
    sizes = [t.nbytes for path in shards for t in load_file(path).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    model.save_pretrained(tmp_path)  # one file again: no shard of the old ones may remain
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = pruned(dtype=dtype)
    model.save_pretrained(tmp_path)
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert same_weights(wide, copy.deepcopy(model).float())


def test_arguments_are_those_of_transformers(tmp_path: Path) -> None:
    stock, ours = (
        list(inspect.signature(function).parameters)
        for function in (PreTrainedModel.save_pretrained, pruned().save_pretrained)
    )
    assert ours[:7] == stock[1:8]
    model = pruned()
    weights = {name: torch.full_like(w, 2) for name, w in model.state_dict().items()}
    model.save_pretrained(tmp_path, True, weights)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all((weight == 2).all() for weight in loaded.state_dict().values())
    assert loaded.pruning_record.zeros == 0


def test_variant(tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path, variant="small", max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.small.json").read_text())
    assert any(name.endswith("weight_mask") for name in index["weight_map"])
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path, variant="small"), model)


def test_experts_are_packed_whatever_format_is_asked_for(tmp_path: Path) -> None:
    model = pruned("mixtral")
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", save_original_format=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_adapters_are_saved_by_transformers(tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:  # transformers 5.24 asks for one that is not released yet
        pytest.skip(str(error))

    model = pruned()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not list(tmp_path.glob("model*"))
    assert not (tmp_path / "pruning_record.json").exists()


def test_a_model_quantized_later_is_saved_by_transformers(tmp_path: Path) -> None:
    class Other(HfQuantizer):
        is_trainable = True

        def is_serializable(self) -> bool:
            return True

    model = pruned()
    model.config.quantization_config = FineGrainedFP8Config()
    model.hf_quantizer = Other(model.config.quantization_config)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert not any(name.endswith("_mask") for name in load_file(tmp_path / "model.safetensors"))


def test_fully_zero_and_fully_dense_matrices(tmp_path: Path) -> None:
    model = pruned()
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(2.5)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].shape == (0,)
    assert tensors["model.layers.1.mlp.up_proj.weight"].shape == (20, 24)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_weights(loaded, model)


def test_one_dense_expert_among_packed_ones(tmp_path: Path) -> None:
    model = pruned("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2] = 1.5
    model.model.layers[1].mlp.experts.gate_up_proj.data[0].zero_()
    model.save_pretrained(tmp_path)
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_tied_weights(tmp_path: Path) -> None:
    model = pruned("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_record_counts_what_is_there_not_what_was(tmp_path: Path) -> None:
    model = pruned()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1)  # as fine-tuning may
    model.save_pretrained(tmp_path)
    matrices = {m.name: m for m in inspect_checkpoint(tmp_path).record.matrices}
    assert matrices["model.layers.0.mlp.up_proj.weight"].zeros == 0
    assert matrices["model.layers.1.mlp.up_proj.weight"].zeros > 0


def test_record_of_a_backbone(tmp_path: Path) -> None:
    """Its parameters lack the prefix that they had in the model that was pruned."""
    model = pruned()
    model.save_pretrained(tmp_path / "a")
    backbone = AutoModel.from_pretrained(tmp_path / "a")
    backbone.layers[0].mlp.up_proj.weight.data.fill_(1)
    backbone.save_pretrained(tmp_path / "b")
    record = inspect_checkpoint(tmp_path / "b").record
    filled = "model.layers.0.mlp.up_proj.weight"
    for matrix, before in zip(record.matrices, model.pruning_record.matrices, strict=True):
        assert matrix.name == before.name
        assert matrix.zeros == (0 if matrix.name == filled else before.zeros)


def test_record_lists_only_what_is_there(tmp_path: Path) -> None:
    model = pruned()
    del model.model.layers[2]
    model.save_pretrained(tmp_path)
    names = [matrix.name for matrix in inspect_checkpoint(tmp_path).record.matrices]
    assert names
    assert not any(name.startswith("model.layers.2.") for name in names)


def test_record_of_offloaded_weights(tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path / "a")
    # The claim is wrong, and the weights that show it are on the disk.
    claimed = model.pruning_record
    wrong = [dataclasses.replace(matrix, zeros=matrix.total) for matrix in claimed.matrices]
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu"}
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", device_map=places, offload_folder=tmp_path / "offload"
    )
    loaded.pruning_record = dataclasses.replace(claimed, matrices=wrong)
    loaded.save_pretrained(tmp_path / "b")
    assert inspect_checkpoint(tmp_path / "b").record == claimed
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), model)


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    model = pruned()
    duplicate = copy.deepcopy(model)
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    duplicate.save_pretrained(tmp_path / "copy")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "copy"), duplicate)
    pickled = pickle.loads(pickle.dumps(duplicate))
    pickled.save_pretrained(tmp_path / "pickled")
    assert contents(tmp_path / "copy") == contents(tmp_path / "pickled")


def test_another_process_than_the_main_one_writes_nothing(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path / "out", is_main_process=False)
    assert not list((tmp_path / "out").iterdir())


# Convert and inspect


def test_convert_there_and_back(every_architecture: str, tmp_path: Path) -> None:
    model = pruned(every_architecture)
    model.save_pretrained(tmp_path / "packed")
    (tmp_path / "packed" / "tokenizer.json").write_text("{}")
    convert_checkpoint(tmp_path / "packed", tmp_path / "dense", "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "again", "packed")
    assert contents(tmp_path / "packed") == contents(tmp_path / "again")
    model.config.pruning_config = {**model.config.pruning_config, "checkpoint_format": "dense"}
    model.save_pretrained(tmp_path / "saved_dense")
    expected = contents(tmp_path / "saved_dense")
    assert {**expected, "tokenizer.json": b"{}"} == contents(tmp_path / "dense")


def test_dense_format_keeps_the_record(tmp_path: Path) -> None:
    model = pruned(checkpoint_format="dense")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_weights(loaded, model)
    assert loaded.pruning_record == model.pruning_record


def test_inspect(tmp_path: Path) -> None:
    model = pruned(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    summary = inspect_checkpoint(tmp_path)
    assert summary.record == model.pruning_record
    assert summary.checkpoint_format == "packed"
    assert summary.format_version == 1
    assert summary.weight_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert summary.dense_bytes == sum(t.nbytes for t in model.state_dict().values())


def test_inspect_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="is not a CAP checkpoint, because it has no pruning_record"
    ):
        inspect_checkpoint(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        inspect_checkpoint(tmp_path / "file")


def test_inspect_of_a_damaged_record(tmp_path: Path) -> None:
    (tmp_path / "pruning_record.json").write_text("{")
    with pytest.raises(ValueError, match=r"pruning_record\.json is damaged"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "pruning_record.json").write_text('{"files": {"format_version": 1}}')
    with pytest.raises(ValueError, match=r"json cannot be read \(files\.checkpoint_format must be"):
        inspect_checkpoint(tmp_path)


def test_convert_refuses_bad_targets_and_formats(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="full exists and is not empty"):
        convert_checkpoint(tmp_path / "in", tmp_path / "full", "dense")
    with pytest.raises(ValueError, match="unknown checkpoint format 'zip': choose one of packed"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", "zip")
    with pytest.raises(FileExistsError, match="is inside the source checkpoint"):
        convert_checkpoint(tmp_path / "in", tmp_path / "in" / "dense", "dense")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "in" / "dense").exists()


# All or nothing


def test_files_of_others_stay(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "notes").mkdir(parents=True)
    (target / "notes" / "a.txt").write_text("a")
    (target / "tokenizer.json").write_text("{}")
    pruned().save_pretrained(target)
    assert (target / "notes" / "a.txt").read_text() == "a"
    assert (target / "tokenizer.json").read_text() == "{}"
    assert (target / "model.safetensors").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_the_weights_of_another_model_are_not_overwritten(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="holds the weights of another model"):
        pruned().save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_a_file_or_the_current_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file: choose a folder"):
        pruned().save_pretrained(tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="is or contains the current folder"):
        pruned().save_pretrained(".")


FAILURES: list[tuple[BaseException, type[BaseException], str | None]] = [
    (OSError(errno.ENOSPC, "No space left on device"), OSError, "could not save to .* as it was"),
    (OSError(errno.EROFS, "Read-only file system"), OSError, "could not save to .* as it was"),
    (KeyboardInterrupt(), KeyboardInterrupt, None),
]


@pytest.mark.parametrize(("failure", "expected", "message"), FAILURES)
@pytest.mark.parametrize(
    "where", ["transcoding.save_file", "saving.write_model_card", "transcoding.read_json"]
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_save_leaves_the_old_folder_or_none(
    failure: BaseException,
    expected: type[BaseException],
    message: str | None,
    where: str,
    existing: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pruned()
    if existing:
        model.save_pretrained(tmp_path / "out")
        model.model.layers[0].mlp.up_proj.weight.data.zero_()
    before = contents(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    monkeypatch.setattr(f"optimum_cap.checkpoint.{where}", fail)
    with pytest.raises(expected, match=message):
        model.save_pretrained(tmp_path / "out")
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["out"] if existing else [])


def test_a_swap_that_fails_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruned()
    model.save_pretrained(tmp_path / "out")
    before = contents(tmp_path)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".saving-" in self.name:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="could not save to"):
        model.save_pretrained(tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failing_name", ["out", ".saving-"])
def test_an_interrupt_between_the_renames_puts_the_old_folder_back(
    failing_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruned()
    model.save_pretrained(tmp_path / "out")
    before = contents(tmp_path)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if failing_name in self.name and ".replaced" not in self.name:
            if failing_name == "out":
                rename(self, target)
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_save_that_was_killed_between_the_renames_is_undone_by_the_next(tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert os.listdir(tmp_path) == ["out"]


def test_saves_of_other_processes_are_let_alone(tmp_path: Path) -> None:
    alive = tmp_path / f".out.saving-{platform.node()}-{os.getpid()}-0123abcd"
    gone = tmp_path / f".out.saving-{platform.node()}-999999999-0123abcd"
    elsewhere = [
        tmp_path / ".out.saving-another.host-999999999-0123abcd",
        tmp_path / f".out.saving-{platform.node()}-blue-999999999-0123abcd",
        tmp_path / f".out.saving-{platform.node()}-7-999999999-0123abcd",
    ]
    for folder in (alive, gone, *elsewhere):
        folder.mkdir()
    pruned().save_pretrained(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([alive, *elsewhere, tmp_path / "out"])


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for _ in range(2):
        pruned().save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["real"]
    assert (tmp_path / "disk" / "real" / "model.safetensors").exists()


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that says it is a mount point, and that cannot be renamed."""
    folder = tmp_path / "out"
    folder.mkdir()
    rename = Path.rename

    def refusing(self: Path, target: Path) -> Path:
        assert self != folder
        return rename(self, target)

    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    monkeypatch.setattr(Path, "rename", refusing)
    return folder


def test_saving_to_a_mount_point(mounted: Path, tmp_path: Path) -> None:
    model = pruned()
    (mounted / "lost+found").mkdir()
    (mounted / "tokenizer.json").write_text("{}")
    model.save_pretrained(mounted, max_shard_size="20KB")
    model.save_pretrained(mounted)
    model.save_pretrained(tmp_path / "elsewhere")
    expected = contents(tmp_path / "elsewhere") | {"tokenizer.json": b"{}"}
    assert contents(mounted) == expected
    assert (mounted / "lost+found").is_dir()


@pytest.mark.parametrize("failing_move", range(12))
def test_a_mount_point_is_as_it_was_after_a_failure(
    failing_move: int, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruned()
    model.save_pretrained(mounted)
    before = contents(mounted)
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    rename, moves = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        if ".saving-" in f"{self} {target}":
            moves.append(self)
            if len(moves) == failing_move + 1:
                raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="could not save to"):
        model.save_pretrained(mounted)
    assert contents(mounted) == before
    # Without a config nothing loads: it goes first and comes last.
    assert moves[0].name == "config.json"
    assert (moves[failing_move].name == "config.json") == (failing_move in {0, 11})


@pytest.mark.parametrize("moves", range(13))
def test_a_save_to_a_mount_point_that_was_killed_is_undone_by_the_next(
    moves: int, mounted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after so many of the 12 moves. After the last one, the new checkpoint is complete."""
    model = pruned()
    (mounted / "tokenizer.json").write_text("{}")
    model.save_pretrained(mounted)
    old = contents(mounted)
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    rename, unlink, done = Path.rename, Path.unlink, []

    def as_if_killed() -> None:
        if len(done) == moves:
            shutil.copytree(mounted, tmp_path / "killed")

    def moving(self: Path, target: Path) -> Path:
        if ".saving-" in f"{self} {target}":
            as_if_killed()
            done.append(self)
        return rename(self, target)

    def removing(self: Path, **options: Any) -> None:
        if self.name == "swap.json":
            as_if_killed()
        unlink(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", moving)
        patch.setattr(Path, "unlink", removing)
        model.save_pretrained(mounted)
    assert len(done) == 12
    new = contents(mounted)
    for entry in mounted.iterdir():
        entry.unlink()
    shutil.copytree(tmp_path / "killed", mounted, dirs_exist_ok=True)
    (left,) = mounted.glob(".*.saving-*")
    of_killed_process(left)
    assert (mounted / "config.json").exists() == (moves in {0, 12}), "else it does not load"
    check_target(mounted)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("optimum_cap.checkpoint.transcoding.save_file", fail)
        with pytest.raises(OSError, match=r"could not save to .* as it was"):
            model.save_pretrained(mounted)
    assert contents(mounted) == (new if moves == 12 else old)
    model.save_pretrained(mounted)
    assert contents(mounted) == new
    assert not list(mounted.glob(".*"))


def of_killed_process(folder: Path) -> None:
    """Make the folder of a save that of a process that no longer runs."""
    swap = json.loads((folder / "swap.json").read_text())
    (folder / "swap.json").write_text(json.dumps(swap | {"process": 999_999_999}))
    folder.rename(folder.with_name(folder.name.replace(f"-{os.getpid()}-", "-999999999-")))


@pytest.mark.slow
def test_kill_9_while_the_files_of_a_mount_point_are_replaced(mounted: Path) -> None:
    model = pruned()
    model.save_pretrained(mounted)
    expected = contents(mounted)
    code = SAVE_IN_A_PROCESS.format(
        tests=str(TESTS),
        target=str(mounted),
        limit=f"""
import os, signal
from pathlib import Path
os.path.ismount = lambda path: str(path) == {str(mounted)!r}
rename = Path.rename
def killed(self, target):
    if self.name == "pruning_record.json" and target.parent.name == "replaced":
        rename(self, target)
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = killed
""",
    )
    assert run(code).returncode == -signal.SIGKILL
    assert not (mounted / "pruning_record.json").exists()
    assert (mounted / "model.safetensors").exists()
    model.save_pretrained(mounted)
    assert contents(mounted) == expected


@pytest.fixture
def half_replaced(mounted: Path) -> Path:
    """The folder of a save that was killed once it had moved the record and the config away."""
    pruned().save_pretrained(mounted)
    folder = mounted / ".out.saving-elsewhere-1-0123abcd"
    (folder / "replaced").mkdir(parents=True)
    names = ["config.json", "model.safetensors", "pruning_record.json"]
    for name in ("config.json", "pruning_record.json"):
        (mounted / name).rename(folder / "replaced" / name)
    for name in names:
        (folder / name).write_text("new")
    swap = {"host": "elsewhere", "process": 1, "stale": names, "added": names}
    (folder / "swap.json").write_text(json.dumps(swap))
    return folder


def test_a_killed_save_of_another_host_is_undone_after_a_minute(
    half_replaced: Path, mounted: Path
) -> None:
    """As in a container that was started again: it has another name, and its first process id 1."""
    old = time.time() - 61
    os.utime(half_replaced / "swap.json", (old, old))
    pruned().save_pretrained(mounted)
    assert not half_replaced.exists()
    assert "new" not in {file.read_text(errors="replace") for file in mounted.iterdir()}


def test_a_save_that_may_still_run_is_let_alone(half_replaced: Path, mounted: Path) -> None:
    before = contents(mounted)
    check_target(mounted)
    with pytest.raises(
        OSError, match=r"process 1 on elsewhere is saving to .*out: save again when"
    ):
        pruned().save_pretrained(mounted)
    assert contents(mounted) == before


SWAPS: dict[str, Any] = {
    "no JSON": "{",
    "not UTF-8": b"\xff\xfe",
    "deep": "[" * 100_000,
    "a list": [],
    "outside": {"stale": ["../model.safetensors"], "added": []},
    "the parent": {"stale": [".."], "added": []},
    "null byte": {"stale": ["a\0b"], "added": []},
    "a number": {"stale": [1], "added": []},
    "no list": {"stale": "model.safetensors", "added": []},
    "nothing": {"stale": []},
    "a huge process": {"stale": [], "added": [], "process": 1 << 70},
}


@pytest.mark.parametrize("swap", SWAPS)
def test_a_file_that_only_looks_like_that_of_a_killed_save(
    swap: str, half_replaced: Path, mounted: Path
) -> None:
    content = SWAPS[swap]
    if isinstance(content, dict):
        content = {"host": "elsewhere", "process": 1, **content}
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    (half_replaced / "swap.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    os.utime(half_replaced / "swap.json", (0, 0))
    before = contents(mounted)
    with pytest.raises(FileExistsError, match="holds the weights of another model"):
        pruned().save_pretrained(mounted)
    assert contents(mounted) == before


def test_old_files_that_cannot_be_put_back_are_kept_for_the_next_save(
    mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruned()
    model.save_pretrained(mounted)
    before, rename, moves = contents(mounted), Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        if ".saving-" in f"{self} {target}":
            moves.append(self)
            if len(moves) > 3:
                raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match=r"could not put back its old files, which .* finds in"):
            model.save_pretrained(mounted)
    (left,) = mounted.glob(".*.saving-*")
    of_killed_process(left)
    monkeypatch.setattr("optimum_cap.checkpoint.transcoding.save_file", failing)
    with pytest.raises(TypeError):
        model.save_pretrained(mounted)
    assert contents(mounted) == before


SAVE_IN_A_PROCESS = """
import resource, sys
sys.path.insert(0, {tests!r})
from helpers.checkpoints import pruned
model = pruned()
{limit}
try:
    model.save_pretrained({target!r})
except OSError as error:
    print("OSError:", error)
"""


def run(code: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a disk that is really full."""
    code = SAVE_IN_A_PROCESS.format(
        tests=str(TESTS),
        target=str(tmp_path / "out"),
        limit="import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))",
    )
    result = run(code)
    assert "OSError: " in result.stdout, result.stderr
    assert f"could not save to {tmp_path / 'out'}" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("save_file", marks=pytest.mark.slow),
        pytest.param("model_card", marks=pytest.mark.slow),
        "rename",
    ],
)
def test_kill_9_leaves_the_old_folder_or_none(point: str, tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path / "out")
    before = contents(tmp_path / "out")
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    patched = {
        "save_file": f"transcoding.save_file = lambda *a, **k: {kill}",
        "model_card": f"saving.write_model_card = lambda *a, **k: {kill}",
        "rename": f"transcoding.Path.rename = lambda *a, **k: {kill}",
    }[point]
    code = SAVE_IN_A_PROCESS.format(
        tests=str(TESTS),
        target=str(tmp_path / "out"),
        limit="import os, signal\nfrom optimum_cap.checkpoint import saving, transcoding\n"
        + patched,
    )
    assert run(code).returncode == -signal.SIGKILL
    assert contents(tmp_path / "out") == before
    model.save_pretrained(tmp_path / "out")  # the next save works, and clears up
    assert os.listdir(tmp_path) == ["out"]


# Damage


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    shard = tmp_path / "model.safetensors"
    data = shard.read_bytes()
    for kept in (len(data) - 10, 100, 4, 0):
        shard.write_bytes(data[:kept])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged.*again"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged.*again"):
            convert_checkpoint(tmp_path, tmp_path.parent / "converted", "dense")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_mask_and_values_that_disagree(name: str, tmp_path: Path) -> None:
    pruned(name).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    mask = next(key for key in tensors if key.endswith("weight_mask"))
    tensors[mask][0] ^= 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sign(tmp_path)
    with pytest.raises(ValueError, match=r"is damaged: its mask keeps \d+ weights, but"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["", "_mask", "_shape"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_part_that_is_missing(name: str, part: str, tmp_path: Path) -> None:
    """Without the values transformers would make the weight up."""
    pruned(name).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = next(key for key in tensors if key.endswith("weight_mask")).removesuffix("_mask")
    del tensors[f"{weight}{part}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*weight{part} is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_newer_format_version(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format_version"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    sign(tmp_path)
    with pytest.raises(ValueError, match="format version 3, but this optimum-cap reads up to 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_filled_zeros_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = pruned()
    record = model.pruning_record
    model.pruning_record = dataclasses.replace(record, zeros_after=record.zeros)
    model.save_pretrained(tmp_path / "before")
    assert "right after pruning" not in caplog.text
    for parameter in model.parameters():
        parameter.data.add_(1e-3)
    model.save_pretrained(tmp_path / "after")
    assert "0.00% of the prunable weights are zero, but right after pruning it was" in caplog.text
    before, after = ((tmp_path / name / "README.md").read_text() for name in ("before", "after"))
    assert "were then fitted to the hidden states of the dense model" in before
    assert "- sparse\n" in before
    assert "were then fitted" not in after
    assert "- sparse\n" not in after
    assert "% were right after pruning" in after
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert loaded.pruning_record.lost_zeros
    convert_checkpoint(tmp_path / "after", tmp_path / "dense", "dense")
    assert "% were right after pruning" in (tmp_path / "dense" / "README.md").read_text()


@pytest.mark.parametrize(
    "front_matter", ["license: mit\nbase_model: foo: bar", "[", "license: [mit", "\x00"]
)
def test_a_damaged_card_of_the_base_model_fails_no_save(
    front_matter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(f"---\n{front_matter}\n---\n")
    model = pruned()
    model.name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").exists()
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)
    assert "the model card names none" in caplog.text


def test_a_card_that_cannot_be_created_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise RuntimeError("no card today")

    monkeypatch.setattr("optimum_cap.checkpoint.model_card.model_card", fail)
    model = pruned()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert "the model card could not be created (RuntimeError: no card today)" in caplog.text


@pytest.mark.parametrize("name", ["o" * 255, "o" * 230, "\u00e9" * 127])
def test_a_name_may_be_as_long_as_the_file_system_allows(name: str, tmp_path: Path) -> None:
    for _ in range(2):  # the second time, the folder is replaced
        with atomic_folder(tmp_path / name) as folder:
            (folder / "config.json").write_text("{}")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    write_atomically(tmp_path / name / name, b"scores")
    assert {entry.name for entry in (tmp_path / name).iterdir()} == {"config.json", name}


def test_long_names_have_temporary_folders_of_their_own(tmp_path: Path) -> None:
    first, second = (tmp_path / ("o" * 200 + end) for end in "ab")
    with atomic_folder(first) as one, atomic_folder(second) as other:
        assert one.name.partition(".saving-")[0] != other.name.partition(".saving-")[0]
        assert len(one.name) < 200
