"""Damaged and changed files are refused in one sentence that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import change_record, pruned, same_weights, sign
from helpers.tiny_models import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.checkpoint.conversion import convert_checkpoint, inspect_checkpoint, read_record
from optimum_cap.checkpoint.reading import read_header, read_json
from optimum_cap.commands.inspect import InspectCommand
from optimum_cap.commands.parser import CommandParser

WEIGHTS, RECORD = "model.safetensors", "pruning_record.json"
EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def flip(file: Path, position: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(name: str = "llama", checkpoint_format: str = "packed", **options: Any) -> Path:
        pruned(name, checkpoint_format=checkpoint_format).save_pretrained(
            tmp_path / "model", **options
        )
        return tmp_path / "model"

    return save


# Packed experts and their masks


def test_a_dense_expert_with_a_mask_beside_it(saved: Callable[..., Path]) -> None:
    """Pairing masks by order would give the other experts the masks of their predecessors."""
    folder = saved("mixtral")
    name = EXPERT.format(0)
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({name: torch.ones(20, 24)}))
    sign(folder)
    message = rf"model\.safetensors: {name} is damaged: it has a mask, so its values must be"
    with pytest.raises(ValueError, match=f"{message} floats in one dimension, found 2"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder, folder.parent / "dense", "dense")


def test_an_expert_of_one_dimension_without_a_mask(saved: Callable[..., Path]) -> None:
    folder = saved("mixtral")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("_mask", "_shape"):
            del tensors[EXPERT.format(0) + part]

    rewrite(folder / WEIGHTS, change)
    sign(folder)
    with pytest.raises(ValueError, match=r"4 of its matrices have one dimension.*but 3 have a ma"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_packed_values_of_an_integer_dtype(saved: Callable[..., Path]) -> None:
    folder = saved()
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder / WEIGHTS, lambda t: t.update({name: t[name].view(torch.int32)}))
    sign(folder)
    with pytest.raises(ValueError, match=rf"{name} is damaged: it has a mask.*of torch\.int32"):
        AutoModelForCausalLM.from_pretrained(folder)


# Text from records


ESCAPE = "a\x1b[31m|b`c\n<i>*d*_e_"


def test_names_of_data_files_are_plain_text_in_the_card(saved: Callable[..., Path]) -> None:
    folder = saved()
    change_record(
        folder,
        base_model=f"./{ESCAPE}",
        versions={"torch": ESCAPE},
        calibration={"sources": [{"name": ESCAPE}], "digests": []},
    )
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert "\x1b" not in card
    escaped = r"a\\x1b\[31m\|b\`c\\n\<i\>\*d\*\_e\_"
    assert f"| Calibration | 128 examples of {escaped}, seed 0 |" in card
    assert f"| Created with | torch {escaped} |" in card
    assert f"| Base model | a local folder, {escaped} |" in card


def test_inspect_escapes_control_characters(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved()
    change_record(folder, base_model="./a\x1b[31m\nsparsity 1", versions={"\x9b31m": "\u202e"})
    parser = CommandParser()
    InspectCommand.parse_args(parser)
    for flags in ([], ["--verify"], ["--json"]):
        command = InspectCommand.__new__(InspectCommand)
        command.args = parser.parse_args([str(folder), *flags])
        command.run()
        out = capsys.readouterr().out
        assert not {"\x1b", "\x9b", "\u202e"} & set(out)
        if "--json" not in flags:
            assert "base model    ./a\\x1b[31m\\nsparsity 1\n" in out
    assert json.loads(out)["record"]["base_model"] == "./a\x1b[31m\nsparsity 1"


# Local paths


def test_no_file_holds_a_local_path(tmp_path: Path) -> None:
    base, data = tmp_path / "private" / "base", tmp_path / "private" / "sums.jsonl"
    tiny_model("llama").save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    rows = [{"prompt": f"{n}+{n}=", "completion": f"{2 * n}"} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CAPConfig(0.5, recipe="paper", dataset={"path": data}, num_samples=6)
    model = AutoModelForCausalLM.from_pretrained(base)
    CAPPruner(config).measure(model, tiny_tokenizer(), save_to=tmp_path / "out.safetensors")
    CAPPruner(config).prune(model, tiny_tokenizer())
    model.save_pretrained(tmp_path / "out")
    for file in (*(tmp_path / "out").iterdir(), tmp_path / "out.safetensors"):
        assert b"private" not in file.read_bytes(), file
    record = inspect_checkpoint(tmp_path / "out").record
    assert record.base_model == "./base"
    assert record.config["dataset"] == {"path": "sums.jsonl"}
    # The license is in the card of the base model, then in that of the pruned model.
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    convert_checkpoint(tmp_path / "out", tmp_path / "dense", "dense")
    for name in ("out", "again", "dense"):
        assert "license: mit" in (tmp_path / name / "README.md").read_text()


# Digests


def swap_layers(tensors: dict[str, torch.Tensor]) -> None:
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    for part in ("", "_mask", "_shape"):
        if first + part in tensors:
            tensors[first + part], tensors[second + part] = (
                tensors[second + part],
                tensors[first + part],
            )


def flip_two_mask_bits(tensors: dict[str, torch.Tensor]) -> None:
    """Move one kept weight: the number of kept weights stays the same."""
    mask = tensors["model.layers.0.mlp.up_proj.weight_mask"]
    bits = torch.tensor([[byte >> bit & 1 for bit in range(8)] for byte in mask.tolist()])
    kept, dropped = bits.flatten().nonzero()[0], (bits.flatten() == 0).nonzero()[0]
    for position in (int(kept), int(dropped)):
        mask[position // 8] ^= 1 << position % 8


def flip_a_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.int32).flatten()[3] ^= 1


@pytest.mark.parametrize("change", [swap_layers, flip_two_mask_bits, flip_a_value])
@pytest.mark.parametrize("shards", [None, "20KB"])
def test_changed_weights_are_found(
    change: Callable[[dict[str, torch.Tensor]], None],
    shards: str | None,
    saved: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = saved(max_shard_size=shards)
    if shards and change is swap_layers:
        first, second = sorted(folder.glob("*.safetensors"))[1:3]
        first.rename(tmp_path / "first")
        second.rename(first)
        (tmp_path / "first").rename(second)
        changed = first
    else:
        name = "model.layers.0.mlp.up_proj.weight"
        changed = next(f for f in folder.glob("*.safetensors") if name in load_file(f))
        rewrite(changed, change)
    for read in (
        AutoModelForCausalLM.from_pretrained,
        lambda path: inspect_checkpoint(path, verify=True),
        lambda path: convert_checkpoint(path, tmp_path / "converted", "dense"),
    ):
        with pytest.raises(ValueError, match=rf"{changed.name} has changed since the model was sa"):
            read(folder)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("change", [swap_layers, flip_a_value])
def test_changed_weights_of_a_dense_checkpoint(
    change: Callable[[dict[str, torch.Tensor]], None], saved: Callable[..., Path]
) -> None:
    folder = saved(checkpoint_format="dense")
    rewrite(folder / WEIGHTS, change)
    with pytest.raises(ValueError, match="has changed since the model was saved"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_loading_a_dense_checkpoint_checks_the_ends_of_tensors(tmp_path: Path) -> None:
    model = pruned(checkpoint_format="dense", intermediate_size=200)
    model.save_pretrained(tmp_path)
    tensor = read_header(tmp_path / WEIGHTS)["model.layers.0.mlp.up_proj.weight"]
    flip(tmp_path / WEIGHTS, (tensor.start + tensor.stop) // 2)
    AutoModelForCausalLM.from_pretrained(tmp_path)  # a mapped file is not read as a whole
    with pytest.raises(ValueError, match=r"model\.safetensors has changed since"):
        inspect_checkpoint(tmp_path, verify=True)
    with pytest.raises(ValueError, match=r"model\.safetensors has changed since"):
        convert_checkpoint(tmp_path, tmp_path.parent / "packed", "packed")


@pytest.mark.parametrize("checkpoint_format", ["packed", "dense"])
def test_a_shard_of_another_checkpoint(checkpoint_format: str, saved: Callable[..., Path]) -> None:
    folder = saved(checkpoint_format=checkpoint_format, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shutil.copy(folder / min(index["weight_map"].values()), folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"model\.safetensors is not part of the checkpoint|incom"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors is not part of the checkpoint"):
        inspect_checkpoint(folder, verify=True)


def test_an_index_that_leaves_out_a_shard(saved: Callable[..., Path]) -> None:
    folder = saved(max_shard_size="20KB")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    lost = max(index["weight_map"].values())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != lost}
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json has changed since the model was saved"):
        AutoModelForCausalLM.from_pretrained(folder)
    sign(folder)
    with pytest.raises(ValueError, match=rf"is incomplete: {lost} is not loaded"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("checkpoint_format", ["packed", "dense"])
def test_a_model_that_was_trained_and_saved_again(
    checkpoint_format: str, saved: Callable[..., Path]
) -> None:
    folder = saved(checkpoint_format=checkpoint_format)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(folder)
    inspect_checkpoint(folder, verify=True)
    assert same_weights(AutoModelForCausalLM.from_pretrained(folder), model)


def test_a_dense_folder_that_another_program_wrote_into(saved: Callable[..., Path]) -> None:
    folder = saved(checkpoint_format="dense")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    PreTrainedModel.save_pretrained(model, folder)  # as without the plugin: the record stays
    with pytest.raises(ValueError, match=r"on purpose, delete pruning_record\.json to load"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / RECORD).unlink()
    assert same_weights(AutoModelForCausalLM.from_pretrained(folder), model)


class Other(HfQuantizer):
    is_trainable = True

    def is_serializable(self) -> bool:
        return True


def test_saving_by_transformers_removes_the_record_of_other_weights(
    saved: Callable[..., Path],
) -> None:
    folder = saved(checkpoint_format="dense")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.quantization_config = FineGrainedFP8Config()
    model.hf_quantizer = Other(model.config.quantization_config)
    model.save_pretrained(folder)
    assert not (folder / RECORD).exists()


def test_a_packed_checkpoint_without_a_record_warns(
    saved: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved()
    (folder / RECORD).unlink()
    AutoModelForCausalLM.from_pretrained(folder)
    assert "has no pruning_record.json, so the weights cannot be checked" in caplog.text


@pytest.mark.parametrize("checkpoint_format", ["packed", "dense"])
def test_an_edited_config_warns(
    checkpoint_format: str, saved: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(checkpoint_format=checkpoint_format)
    AutoModelForCausalLM.from_pretrained(folder)
    assert "has changed since" not in caplog.text
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    AutoModelForCausalLM.from_pretrained(folder)
    assert "config.json has changed since the model was saved" in caplog.text
    with pytest.raises(ValueError, match=r"config\.json has changed since"):
        inspect_checkpoint(folder, verify=True)


# Records


def test_a_record_that_was_changed(saved: Callable[..., Path]) -> None:
    folder = saved()
    text = (folder / RECORD).read_text()
    (folder / RECORD).write_text(json.dumps(json.loads(text)))  # only its layout
    AutoModelForCausalLM.from_pretrained(folder)
    (folder / RECORD).write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match=r"record\.json cannot be read \(it has changed since"):
        AutoModelForCausalLM.from_pretrained(folder)


MATRIX = {"name": "a", "zeros": 1, "total": 2, "tokens": None}
WRONG = {
    "config must be an object, got 'x'": {"config": "x"},
    "sparsity must be a number": {"config": {"sparsity": "x"}},
    "sparsity must be a number .* got nothing": {"config": {}},
    "base_model must be text or null, got 3": {"base_model": 3},
    "matrices must be a list, got {}": {"matrices": {}},
    r"matrices\[0\] must be an object, got 1": {"matrices": [1]},
    r"it lacks matrices\[0\]\.name": {"matrices": [{"zeros": 1, "total": 1}]},
    r"matrices\[0\]\.x is an unknown field": {"matrices": [{**MATRIX, "x": 1}]},
    r"matrices\[0\]\.zeros must be a count, got True": {"matrices": [{**MATRIX, "zeros": True}]},
    r"matrices\[0\]\.zeros must be a count, got 1000": {"matrices": [{**MATRIX, "zeros": 10**99}]},
    r"matrices\[0\] has 3 zeros of 2 weights": {"matrices": [{**MATRIX, "zeros": 3}]},
    r"matrices\[0\] has 0 zeros of 0 weights": {"matrices": [{**MATRIX, "zeros": 0, "total": 0}]},
    "calibration must be an object": {"calibration": []},
    "calibration.sources must be a list of objects with": {"calibration": {"sources": [1]}},
    "calibration.digests must be a list of texts": {"calibration": {"digests": [1]}},
    "versions must be an object of texts": {"versions": {"torch": 2}},
    "threshold must be a number or null": {"threshold": "0"},
    "x is an unknown field": {"x": 1},
    "nested too deeply": {"versions": json.loads("[" * 500 + "]" * 500)},
}


@pytest.mark.parametrize(("message", "changes"), WRONG.items())
def test_a_record_with_a_wrong_value(
    message: str, changes: dict[str, Any], saved: Callable[..., Path]
) -> None:
    folder = saved()
    change_record(folder, **changes)
    with pytest.raises(ValueError, match=rf"pruning_record\.json cannot be read \(.*{message}"):
        read_record(folder / RECORD, "name")
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": "\xff"}', "not valid JSON: 'utf-8' codec"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b"[]", "it holds a list, not a JSON object"),
        (b"", "not valid JSON: Expecting value"),
    ],
)
def test_json_that_cannot_be_read(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(ValueError, match=rf"pruning_record\.json is damaged \(.*{reason}"):
        read_json(tmp_path / RECORD)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        [],
    ],
)
def test_a_header_with_a_wrong_entry(entry: Any, tmp_path: Path) -> None:
    header = json.dumps({"x.weight": entry}).encode()
    file = tmp_path / WEIGHTS
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=rf"{file} is damaged \(.*wrong entry for x\.weight"):
        read_header(file)


# The Hub cache


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a repository `me/cap`, whose only commit has a checkpoint in two folders."""
    repository = tmp_path / "cache" / "models--me--cap"
    snapshot = repository / "snapshots" / ("a" * 40)
    pruned().save_pretrained(snapshot)
    pruned(checkpoint_format="dense").save_pretrained(snapshot / "dense")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_inspect_and_convert_from_the_cache(cached: Path, tmp_path: Path) -> None:
    summary = inspect_checkpoint("me/cap", cache_dir=cached)
    assert summary.checkpoint_format == "packed"
    file = cached / "models--me--cap" / "snapshots" / ("a" * 40) / WEIGHTS
    assert summary.weight_bytes == file.stat().st_size
    inspect_checkpoint("me/cap", cache_dir=cached, revision="a" * 40, verify=True)
    inside = inspect_checkpoint("me/cap", cache_dir=cached, subfolder="dense", verify=True)
    assert inside.checkpoint_format == "dense"
    convert_checkpoint("me/cap", tmp_path / "out", "packed", cache_dir=cached, subfolder="dense")
    assert inspect_checkpoint(tmp_path / "out", verify=True).checkpoint_format == "packed"
    loaded = AutoModelForCausalLM.from_pretrained("me/cap", cache_dir=cached)
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), loaded)


def test_what_is_not_in_the_cache(cached: Path) -> None:
    message = "of me/other is not in the cache, and the Hub cannot be reached"
    with pytest.raises(FileNotFoundError, match=message):
        inspect_checkpoint("me/other", cache_dir=cached)
    (cached / "models--me--cap" / "snapshots" / ("a" * 40) / WEIGHTS).unlink()
    assert inspect_checkpoint("me/cap", cache_dir=cached).weight_bytes > 0
    with pytest.raises(ValueError, match=r"model\.safetensors is missing; download"):
        inspect_checkpoint("me/cap", cache_dir=cached, verify=True)
