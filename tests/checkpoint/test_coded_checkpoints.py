"""Coded checkpoints are lossless for all architectures, and damage to them is found and named."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import contents, pruned, same_weights, sign
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_cap import formats
from optimum_cap.checkpoint.conversion import convert_checkpoint, inspect_checkpoint
from optimum_cap.checkpoint.digests import RECORD_NAME
from optimum_cap.checkpoint.reading import read_header
from optimum_cap.version import install_command

WEIGHTS = "model.safetensors"
UP_PROJ = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def coded(tmp_path: Path) -> Callable[..., Path]:
    def save(name: str = "llama", changes: Any = None, **options: Any) -> Path:
        model = pruned(name, checkpoint_format="coded", **(changes or {}))
        model.save_pretrained(tmp_path / "model", **options)
        return tmp_path / "model"

    return save


def flip(file: Path, position: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def test_round_trip_is_bit_identical(every_architecture: str, tmp_path: Path) -> None:
    model = pruned(every_architecture, checkpoint_format="coded")
    model.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    streams = [name for name, tensor in tensors.items() if formats.is_coded(tensor)]
    assert len(streams) >= len(model.pruning_record.matrices)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert same_weights(loaded, model)
    loaded.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.float16)),
    ],
)
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = pruned(dtype=dtype, checkpoint_format="coded")
    model.save_pretrained(tmp_path)
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    for other in (torch.float32, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=other)
        assert same_weights(loaded, pruned(dtype=dtype).to(other))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]  # transformers then takes the dtype of the first float tensor
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == loaded.model.layers[0].mlp.up_proj.weight.dtype == dtype


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "mixtral"])
def test_conversion_restores_the_same_bytes(name: str, tmp_path: Path) -> None:
    pruned(name).save_pretrained(tmp_path / "packed")
    steps = [("packed", "coded"), ("coded", "dense"), ("dense", "coded-2"), ("coded-2", "packed-2")]
    for source, target in steps:
        checkpoint_format, _, _ = target.partition("-")
        convert_checkpoint(tmp_path / source, tmp_path / target, checkpoint_format)
    assert contents(tmp_path / "packed") == contents(tmp_path / "packed-2")
    assert contents(tmp_path / "coded") == contents(tmp_path / "coded-2")


def test_sharded(tmp_path: Path) -> None:
    model = pruned("mixtral", checkpoint_format="coded")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert {key: path.name for path in shards for key in load_file(path)} == index["weight_map"]
    sizes = [tensor.nbytes for path in shards for tensor in load_file(path).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_experts_that_are_stored_in_different_forms(coded: Callable[..., Path]) -> None:
    """One list of experts then has coded, packed and dense ones."""
    folder = coded("mixtral")
    expected = AutoModelForCausalLM.from_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    for name in ("model.layers.0.block_sparse_moe.experts.{}.w2.weight",):
        for expert, encode in ((1, formats.encode_packed), (2, formats.encode_dense)):
            stream = tensors.pop(name.format(expert))
            tensors |= encode(name.format(expert), formats.coded.decode(stream))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    sign(folder)
    assert same_weights(AutoModelForCausalLM.from_pretrained(folder), expected)


def test_summary(coded: Callable[..., Path]) -> None:
    folder = coded()
    summary = inspect_checkpoint(folder)
    assert (summary.checkpoint_format, summary.format_version) == ("coded", 2)
    packed = inspect_checkpoint(convert_checkpoint(folder, folder.parent / "packed", "packed"))
    assert (packed.checkpoint_format, packed.format_version) == ("packed", 1)
    assert install_command() in (folder / "README.md").read_text()


def test_a_reader_of_version_1_refuses_it(
    coded: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = coded()
    monkeypatch.setattr(formats, "FORMAT_VERSION", 1)
    message = "has checkpoint format version 2, but this optimum-cap reads up to 1"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        inspect_checkpoint(folder)


# Damage


def positions(file: Path) -> dict[str, list[int]]:
    """Return some bits of every kind of place in a coded file, by the name of their tensor."""
    rng = random.Random(0)
    header = read_header(file)
    start = min(tensor.start for tensor in header.values())
    places = {"": rng.sample(range(8 * start), 8)}
    for name in (UP_PROJ, "lm_head.weight", "model.norm.weight"):
        first, stop = 8 * header[name].start, 8 * header[name].stop
        kinds = (0, 40, 70, 200, 260, 330, 400, 500)  # bits of each field of a coded weight
        places[name] = [*(first + bit for bit in kinds if first + bit < stop), stop - 1]
        places[name] += rng.sample(range(first, stop), 4)
    return places


@pytest.mark.parametrize("record", [True, False])
def test_a_flipped_bit_is_found_with_file_and_tensor(
    record: bool, coded: Callable[..., Path]
) -> None:
    folder = coded(changes={"dtype": torch.bfloat16, "num_hidden_layers": 1})
    places = positions(folder / WEIGHTS)
    if not record:  # then only coded weights can be checked
        (folder / RECORD_NAME).unlink()
        places = {UP_PROJ: places[UP_PROJ]}
    for name, bits in places.items():
        for position in bits:
            flip(folder / WEIGHTS, position // 8, position % 8)
            # Both are named, in either order, so that one pattern does not say it.
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                AutoModelForCausalLM.from_pretrained(folder)
            assert WEIGHTS in str(caught.value)
            assert name in str(caught.value)
            flip(folder / WEIGHTS, position // 8, position % 8)
    AutoModelForCausalLM.from_pretrained(folder)


def test_conversion_and_verification_name_the_tensor(coded: Callable[..., Path]) -> None:
    folder = coded()
    flip(folder / WEIGHTS, read_header(folder / WEIGHTS)["model.norm.weight"].start, 3)
    with pytest.raises(ValueError, match=r"digest differs\), in model\.norm\.weight; download"):
        inspect_checkpoint(folder, verify=True)
    with pytest.raises(ValueError, match=r"digest differs\), in model\.norm\.weight; download"):
        convert_checkpoint(folder, folder.parent / "dense", "dense")


def test_a_bit_of_a_coded_weight_that_is_signed(coded: Callable[..., Path]) -> None:
    """Another writer may give a damaged file new digests: the weight has checksums of its own."""
    folder = coded()
    flip(folder / WEIGHTS, read_header(folder / WEIGHTS)[UP_PROJ].stop - 1, 3)
    sign(folder)
    with pytest.raises(ValueError, match=rf"^{UP_PROJ} is damaged: .* of its chunk 0 differs$"):
        AutoModelForCausalLM.from_pretrained(folder)
