"""Packed and coded checkpoints are quantized while they are loaded, by way of a dense copy."""

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import pruned
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

IDS = torch.arange(4, 24)[None]


@pytest.fixture
def rounding() -> Iterator[type[QuantizationConfigMixin]]:
    """A method that rounds weights to multiples of 1/64 after loading, as a quantizer might."""

    @register_quantization_config("rounding")
    class RoundingConfig(QuantizationConfigMixin):
        def __init__(self, **kwargs: Any) -> None:
            self.quant_method = "rounding"

    @register_quantizer("rounding")
    class RoundingQuantizer(HfQuantizer):
        def _process_model_after_weight_loading(
            self, model: PreTrainedModel, **kwargs: Any
        ) -> PreTrainedModel:
            assert not self.pre_quantized
            for weight in model.parameters():
                weight.data.mul_(64).round_().div_(64)
            return model

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    yield RoundingConfig
    del AUTO_QUANTIZER_MAPPING["rounding"], AUTO_QUANTIZATION_CONFIG_MAPPING["rounding"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("checkpoint_format", ["packed", "coded", "dense"])
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM])
def test_any_format_can_be_quantized(
    loader: Any, checkpoint_format: str, rounding: Any, temporary: Path, tmp_path: Path
) -> None:
    model = pruned(checkpoint_format=checkpoint_format)
    model.save_pretrained(tmp_path / "pruned")
    loaded = loader.from_pretrained(tmp_path / "pruned", quantization_config=rounding())
    for name, weight in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight.mul(64).round().div(64)), name
    assert loaded.name_or_path == loaded.config.name_or_path == str(tmp_path / "pruned")
    assert loaded.pruning_record.matrices == model.pruning_record.matrices
    assert not list(temporary.iterdir())


def test_other_keywords_and_loading_info(rounding: Any, temporary: Path, tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path / "in" / "side")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "in",
        subfolder="side",
        quantization_config=rounding(),
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    assert loaded.dtype == torch.bfloat16
    assert not info["missing_keys"]
    assert not list(temporary.iterdir())


def test_a_failure_leaves_no_copy(rounding: Any, temporary: Path, tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path / "pruned")
    with pytest.raises(TypeError, match="no_such_keyword"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "pruned", quantization_config=rounding(), no_such_keyword=1
        )
    assert not list(temporary.iterdir())


def test_damage_is_named(rounding: Any, temporary: Path, tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path / "pruned")
    file = tmp_path / "pruned/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", quantization_config=rounding())
    assert not list(temporary.iterdir())


def test_a_full_disk_is_named_before_anything_is_decoded(
    rounding: Any, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned().save_pretrained(tmp_path / "pruned")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"takes .* where 10 bytes are free: set TMPDIR"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", quantization_config=rounding())
    assert not list(temporary.iterdir())


def config_of(method: str) -> Any:
    """A config of a method whose package is installed."""
    transformers = importlib.import_module("transformers")
    if method == "torchao":
        int8 = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
        return transformers.TorchAoConfig(int8)
    if method == "quanto":
        pytest.importorskip("optimum.quanto")
        return transformers.QuantoConfig(weights="int8")
    pytest.importorskip("bitsandbytes")
    if method == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=method)


def dequantized(module: Any) -> torch.Tensor:
    weight = module.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        return importlib.import_module("bitsandbytes.functional").dequantize_4bit(weight, state)
    if (scale := getattr(weight, "SCB", None)) is not None:
        return weight * scale[:, None]
    return weight.dequantize()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", ["torchao", "quanto", "int8", "fp4", "nf4"])
def test_zeros_stay_zeros(method: str, temporary: Path, tmp_path: Path) -> None:
    config = config_of(method)
    model = pruned(hidden_size=128, intermediate_size=256)
    model.save_pretrained(tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", quantization_config=config, device_map="cpu"
    )
    zeros = model.model.layers[1].mlp.up_proj.weight == 0
    weights = dequantized(loaded.model.layers[1].mlp.up_proj)
    assert (weights[zeros] == 0).all()
    logits = loaded(input_ids=IDS).logits
    if method != "quanto":  # transformers cannot save it
        loaded.save_pretrained(tmp_path / "quantized")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map="cpu")
        torch.testing.assert_close(again(input_ids=IDS).logits, logits)
