"""Models without some of their parts, in engines other than transformers (docs/serving.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_gguf import gguf_model, write_gguf
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner

TOKENS = torch.arange(3, 27).view(2, 12)
PARTS = {"channels": 0.4, "layers": 0.3, "heads": 0.5, "experts": 0.5}

each_part = pytest.mark.parametrize("pattern", PARTS)
# The first export of a process takes a minute, and warns of what torch itself does.
exports = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]


def architecture(pattern: str) -> str:
    """Return an architecture that has such parts."""
    return "mixtral" if pattern == "experts" else "llama"


def without(pattern: str, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Remove parts of a model, save it and load it again."""
    CAPPruner(CAPConfig(PARTS[pattern], pattern=pattern, recipe="random")).prune(
        model, tiny_tokenizer()
    )
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "runtime", [pytest.param("onnx", marks=exports), pytest.param("openvino", marks=exports)]
)
@each_part
def test_exported_model_gives_the_same_logits(pattern: str, runtime: str, tmp_path: Path) -> None:
    if runtime == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    else:
        pytest.importorskip("openvino")
    exporters = pytest.importorskip("transformers.exporters")
    model = without(pattern, tiny_model(architecture(pattern)), tmp_path / "model")
    if runtime == "onnx":
        exporter, config = exporters.OnnxExporter(), exporters.OnnxConfig()
    else:
        exporter, config = exporters.OpenVINOExporter(), exporters.OpenVINOConfig()
    inputs = {"input_ids": TOKENS, "use_cache": False}
    exporter.export(model, inputs, config).save_pretrained(tmp_path / "exported")
    loaded = exporters.ExportedModel.from_pretrained(tmp_path / "exported", device="cpu")
    with torch.no_grad():
        expected = model(TOKENS).logits
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@each_part
def test_llama_cpp_gives_the_same_probabilities(pattern: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    xllamacpp = pytest.importorskip("xllamacpp")
    model = without(pattern, gguf_model(architecture(pattern)), tmp_path / "model")
    write_gguf(model, tmp_path / "model.gguf", quantized=False)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(tmp_path / "model.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 64, 1, 0
    for cache in ("cache_type_k", "cache_type_v"):
        setattr(parameters, cache, xllamacpp.ggml_type.GGML_TYPE_F32)
    # Fused attention computes in half precision.
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    size = model.config.vocab_size
    prompt = TOKENS[0].tolist()
    # The server says nothing of a token that is no text, so let it be a letter.
    letter = 64
    answer = server.handle_completions(
        {"prompt": prompt, "max_tokens": 1, "logprobs": size, "logit_bias": {str(letter): 1000}}
    )
    (first,) = answer["choices"][0]["logprobs"]["content"]
    found = {token["id"]: token["logprob"] for token in first["top_logprobs"]}
    with torch.no_grad():
        expected = model(TOKENS[:1]).logits[0, -1].log_softmax(0)
    assert len(found) == size
    np.testing.assert_allclose([found[token] for token in range(size)], expected, atol=1e-4)
