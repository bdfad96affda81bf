"""The keyword `pruning_config` of `pipeline` prunes, or says why not; it is never dropped."""

import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import pipeline, pipelines

from optimum_cap import CAPConfig
from optimum_cap.plugin.pipelines import register

CONFIG = CAPConfig(sparsity=0.3, recipe="magnitude")


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("kind", [str, Path])
def test_prunes_the_model_that_it_loads(base: str, kind: type) -> None:
    model = pipeline("text-generation", kind(base), pruning_config=CONFIG).model
    assert model.pruning_record.zeros == round(0.3 * model.pruning_record.total)


def test_none_is_ignored(base: str) -> None:
    model = pipeline("text-generation", base, pruning_config=None).model
    assert not hasattr(model, "pruning_record")


@pytest.mark.parametrize(
    "options", [{"pruning_config": CONFIG}, {"model_kwargs": {"pruning_config": CONFIG}}]
)
def test_a_loaded_model_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"loaded LlamaForCausalLM: prune it first with CAPPruner"):
        pipeline("text-generation", tiny_model("llama"), tokenizer=tiny_tokenizer(), **options)


@pytest.mark.slow
def test_a_pipeline_imported_before_the_plugin_names_the_remedy(base: str) -> None:
    program = f"""
from transformers import AutoModelForCausalLM, pipeline
import optimum_cap
config = optimum_cap.CAPConfig(sparsity=0.3, recipe="magnitude")
try:
    stock = getattr(pipeline, "__wrapped__", pipeline)
    stock("text-generation", model={base!r}, pruning_config=config)
except TypeError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "pass model_kwargs={'pruning_config': config}" in run.stdout


def test_registers_once() -> None:
    register()
    assert not hasattr(pipelines.pipeline.__wrapped__, "__wrapped__")
    assert transformers.pipeline is pipelines.pipeline
