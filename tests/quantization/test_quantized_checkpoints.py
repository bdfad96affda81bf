"""Pruned checkpoints that are saved quantized, and how others load them."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import pruned, saved
from helpers.command_line import run_cap
from helpers.tiny_models import tiny_tokenizer
from huggingface_hub import EvalResult, ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from optimum_cap import CAPConfig
from optimum_cap.checkpoint.model_card import with_results
from optimum_cap.progress import progress_bar
from optimum_cap.pruning import layer_by_layer
from optimum_cap.quantization import check_reaches, get_scheme, quantize_checkpoint
from optimum_cap.quantization.card import quantized_card
from optimum_cap.quantization.packing import pack
from optimum_cap.quantization.schemes import SCHEMES

IDS = torch.arange(4, 24)[None]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1}


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration data in a file."""
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{n}+{n + 1}=", "completion": f"{2 * n + 1}"} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A packed checkpoint with a tokenizer."""
    folder = tmp_path / "sparse"
    pruned(**SIZES).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_results_of_the_sparse_weights_are_not_on_the_card_of_the_quantized_ones(
    sparse: Path,
) -> None:
    card = sparse / "README.md"
    result = EvalResult("text-generation", "openai/gsm8k", "gsm8k", "accuracy", 0.5)
    card.write_text(with_results(card.read_text(), "gsm8k: 50 %", [result], "sparse"))
    text = quantized_card(sparse, "int8", SCHEMES["int8"], "AutoModelForCausalLM")
    data = ModelCard(text).data
    assert data.eval_results is None
    assert "model_name" not in text
    assert "50 %" not in text
    assert data.tags == ModelCard(card.read_text()).data.tags
    limits = text.partition("## Limits\n\n")[2]
    assert limits.startswith("- Results of the pruned model are not those of the quantized one")
    assert "Pruned models may answer at greater length" in limits
    assert "files smaller" not in limits  # as those of the sparse formats are


def test_a_card_that_cannot_be_read_is_refused_before_work(
    sparse: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sparse / "README.md").write_text("---\nlicense: [\n---\n")
    monkeypatch.delattr("optimum_cap.quantization.checkpoints.round_model_")
    with pytest.raises(ValueError, match=r"README.md cannot be read .*: correct it"):
        quantize_checkpoint(sparse, tmp_path / "new", "int4", calibration=calibration(sums))


def calibration(sums: Path) -> CAPConfig:
    return CAPConfig(sparsity=0.5, recipe="wanda", dataset=str(sums), num_samples=6)


def unpacked(folder: Path, name: str) -> torch.Tensor:
    """Decode a matrix of a packed file, without compressed-tensors."""
    tensors = load_file(folder / "model.safetensors")
    words, scales = tensors[f"{name}_packed"], tensors[f"{name}_scale"]
    codes = (words[..., None] >> (4 * torch.arange(8))) & 15
    rows, columns = tensors[f"{name}_shape"].tolist()
    codes = codes.flatten(1) - 8
    assert codes.shape == (rows, columns)
    return codes * scales.repeat_interleave(columns // scales.shape[1], dim=1)


def test_integers_are_packed_lowest_bits_first() -> None:
    codes = torch.tensor([[-8, -7, 0, 1, 2, 3, 4, 7]], dtype=torch.int8)
    assert pack(codes).tolist() == [[0xFCBA9810 - (1 << 32)]]
    assert pack(codes).dtype == torch.int32


def test_int4_keeps_zeros_and_the_other_files(sparse: Path, sums: Path, tmp_path: Path) -> None:
    target = tmp_path / "quantized"
    quantize_checkpoint(sparse, target, "int4", calibration=calibration(sums))
    dense = AutoModelForCausalLM.from_pretrained(sparse)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        weight = dense.get_parameter(f"model.layers.1.{name}.weight")
        rounded = unpacked(target, f"model.layers.1.{name}.weight")
        assert (rounded[weight == 0] == 0).all()
        assert (rounded - weight).norm() < 0.2 * weight.norm()
    stored = load_file(target / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], dense.lm_head.weight)
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert AutoTokenizer.from_pretrained(target).vocab_size == tiny_tokenizer().vocab_size
    assert not (target / "pruning_record.json").exists()
    card = (target / "README.md").read_text()
    assert "| Quantized | `int4`" in card
    assert "prunable weights are zero" in card
    assert "compressed-tensors>=0.15" in card


def test_int4_of_a_model_in_several_files(sparse: Path, sums: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(sparse)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    tiny_tokenizer().save_pretrained(tmp_path / "sharded")
    target = tmp_path / "quantized"
    quantize_checkpoint(
        tmp_path / "sharded", target, "int4", calibration=calibration(sums), max_shard_size="500KB"
    )
    index = json.loads((target / "model.safetensors.index.json").read_text())
    names = set()
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        names |= tensors.keys()
    assert names == index["weight_map"].keys()
    assert "model.layers.0.mlp.up_proj.weight_packed" in names


def test_the_command_writes_both_checkpoints(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    dense = saved(tmp_path / "dense", **SIZES)
    output = tmp_path / "out"
    command = ["prune", "-m", dense, "-o", output, "--sparsity", 0.5, "--recipe", "wanda"]
    command += ["--dataset", sums, "--num-samples", 6, "--device-map", "cpu"]
    command += ["--then-quantize", "int4"]
    steps: list[str] = []

    def recorded(*args: Any, **options: Any) -> Any:
        steps.append(options["desc"])
        return progress_bar(*args, **options)

    monkeypatch.setattr(layer_by_layer, "progress_bar", recorded)
    status, text, errors = run_cap(monkeypatch, capfd, command)
    assert status == 0, errors
    assert f"quantized     {output}-int4" in text
    weight = AutoModelForCausalLM.from_pretrained(output).model.layers[2].mlp.up_proj.weight
    rounded = unpacked(tmp_path / "out-int4", "model.layers.2.mlp.up_proj.weight")
    assert (rounded[weight == 0] == 0).all()
    assert "Rounding" in steps
    # The folder is not replaced, even with --overwrite.
    status, _, errors = run_cap(monkeypatch, capfd, [*command, "--overwrite"])
    assert status == 1
    assert f"{output}-int4, where the quantized model would be saved, exists already" in errors


@pytest.mark.parametrize(
    ("scheme", "flags", "status", "message"),
    [
        ("in4", [], 2, "'in4' is unknown (did you mean 'int4'?): choose int4, int8, nf4, fp4"),
        ("int8", [], 1, "needs torchao>=0.15, which is not installed: pip install 'torchao>=0.15'"),
        ("int4", ["--recipe", "magnitude"], 2, "this recipe takes none: choose a recipe with data"),
        ("int4", ["--answers", "model"], 2, "cannot be calibrated on answers of the model: write"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    scheme: str,
    flags: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("optimum_cap.quantization.schemes.is_torchao_available", lambda: False)
    dense = saved(tmp_path / "dense", **SIZES)
    command = ["prune", "-m", dense, "-o", tmp_path / "out", "--sparsity", 0.5, "--device-map"]
    command += ["cpu", "--then-quantize", scheme, *flags]
    result = run_cap(monkeypatch, capfd, command)
    assert (result[0], message in result[2]) == (status, True), result[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_failure_says_where_the_pruned_model_is(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no space")

    monkeypatch.setattr("optimum_cap.quantization.quantize_checkpoint", fail)
    dense, output = saved(tmp_path / "dense", **SIZES), tmp_path / "out"
    command = ["prune", "-m", dense, "-o", output, "--sparsity", 0.5, "--recipe", "wanda"]
    command += ["--dataset", sums, "--num-samples", 6, "--device-map", "cpu"]
    status, _, errors = run_cap(monkeypatch, capfd, [*command, "--then-quantize", "int4"])
    assert status == 1
    assert f"the pruned model is saved in {output}, but not quantized to int4" in errors
    assert "no space" in errors
    AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2"])
def test_models_without_linear_layers_are_refused(architecture: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(saved(tmp_path / "dense", architecture))
    with pytest.raises(ValueError, match=r"'int4' reaches \d+% of the weights"):
        check_reaches(get_scheme("int4"), "int4", config, "AutoModelForCausalLM")


def test_int4_of_models_that_see_images_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(saved(tmp_path / "dense"))
    with pytest.raises(ValueError, match="'int4' packs causal language models and classifiers"):
        check_reaches(get_scheme("int4"), "int4", config, "AutoModelForImageTextToText")


def test_int4_in_bfloat16(sparse: Path, sums: Path, tmp_path: Path) -> None:
    target = tmp_path / "quantized"
    options = {"calibration": calibration(sums), "dtype": torch.bfloat16}
    quantize_checkpoint(sparse, target, "int4", **options)
    stored = load_file(target / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    assert stored["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("scheme", "package"),
    [
        ("int4", "compressed_tensors"),
        ("int8", "torchao"),
        ("nf4", "bitsandbytes"),
        ("fp4", "bitsandbytes"),
    ],
)
@pytest.mark.parametrize("is_classifier", [False, True])
def test_the_package_loads_it(
    scheme: str, package: str, is_classifier: bool, sums: Path, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    transformers: Any = importlib.import_module("transformers")
    auto_class = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    load = getattr(transformers, auto_class).from_pretrained
    load(saved(tmp_path / "dense", **SIZES)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    target = tmp_path / "quantized"
    quantize_checkpoint(
        tmp_path / "model",
        target,
        scheme,
        auto_class,
        calibration=calibration(sums),
        device_map="cpu",
    )
    original, quantized = load(tmp_path / "model"), load(target, device_map="cpu")
    expected, logits = original(input_ids=IDS).logits, quantized(input_ids=IDS).logits
    assert 0 < (logits - expected).norm() < 0.7 * expected.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compressed_tensors_reads_the_values_that_were_written(
    sparse: Path, sums: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    target = tmp_path / "quantized"
    quantize_checkpoint(sparse, target, "int4", calibration=calibration(sums))
    model = AutoModelForCausalLM.from_pretrained(sparse)
    for name in load_file(target / "model.safetensors"):
        if name.endswith("_packed"):
            parameter = name.removesuffix("_packed")
            model.get_parameter(parameter).data = unpacked(target, parameter)
    logits = AutoModelForCausalLM.from_pretrained(target)(input_ids=IDS).logits
    torch.testing.assert_close(logits, model(input_ids=IDS).logits)
