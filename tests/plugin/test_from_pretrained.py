"""`from_pretrained` prunes and loads ordinary models; stock transformers stays safe."""

import copy
import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.calibration import ROWS
from helpers.checkpoints import pruned
from helpers.paths import ROOT
from helpers.processes import ranks
from helpers.tiny_models import ARCHITECTURES, MOE, tiny_model, tiny_tokenizer
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)

from optimum_cap import CAPConfig
from optimum_cap.config import effective
from optimum_cap.plugin import quantizer
from optimum_cap.plugin.from_pretrained import register
from optimum_cap.version import NEWEST_TRANSFORMERS

IDS = torch.arange(4, 24)[None]


def config(**changes: Any) -> CAPConfig:
    shared = {"sparsity": 0.3, "dataset": ROWS, "num_samples": 12}
    return CAPConfig(**effective(shared, changes))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A dense tiny Llama with its tokenizer, on disk."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def packed(base: Path, tmp_path: Path) -> Path:
    """The same, pruned and packed."""
    model = AutoModelForCausalLM.from_pretrained(base, pruning_config=config())
    model.save_pretrained(tmp_path / "packed")
    tiny_tokenizer().save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def assert_ordinary(model: PreTrainedModel) -> None:
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "quantization_method")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            assert not hasattr(module.config, "quantization_config")
            assert not getattr(module.config, "_is_quantized", False)


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize("keyword", ["pruning_config", "quantization_config"])
def test_prunes_while_loading(loader: Any, keyword: str, base: Path) -> None:
    model = loader.from_pretrained(base, **{keyword: config()})
    assert type(model) is LlamaForCausalLM
    assert model.pruning_record.zeros == round(0.3 * model.pruning_record.total)
    assert model.pruning_record.base_model == f"./{base.name}"
    assert not model.training
    assert_ordinary(model)


def test_all_ways_give_the_same_model(base: Path) -> None:
    from optimum_cap import CAPPruner

    ways = [
        AutoModelForCausalLM.from_pretrained(base, pruning_config=config()),
        AutoModelForCausalLM.from_pretrained(base, pruning_config=config().to_dict() | _rows(base)),
        AutoModelForCausalLM.from_pretrained(base, quantization_config=config()),
        CAPPruner(config()).prune(LlamaForCausalLM.from_pretrained(base), tiny_tokenizer()),
        pipeline(
            "text-generation", model=str(base), model_kwargs={"pruning_config": config()}
        ).model,
    ]
    for model in ways[1:]:
        pairs = zip(ways[0].state_dict().values(), model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b.cpu()) for a, b in pairs)


def _rows(base: Path) -> dict[str, Any]:
    """The same rows as a file: a dictionary of JSON values cannot hold them in memory."""
    file = base / "rows.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in ROWS]
    file.write_text("\n".join(lines))
    return {"dataset": str(file)}


def test_none_is_ignored(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, pruning_config=None)
    assert not hasattr(model, "pruning_record")


def test_none_is_ignored_on_a_pruned_model(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, pruning_config=None)
    assert model.pruning_record.zeros > 0
    assert model.config.pruning_config["sparsity"] == 0.3


def test_weights_and_config_in_memory_need_no_files(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    # With a network, this asks the Hub for a repository called "None", and raises.
    monkeypatch.setattr(quantizer, "cached_file", lambda *a, **k: pytest.fail("asked for a file"))
    again = LlamaForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.state_dict()
    )
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_recipes_without_data_need_no_tokenizer(base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()
    settings = CAPConfig(sparsity=0.3, recipe="magnitude")
    model = AutoModelForCausalLM.from_pretrained(base, pruning_config=settings)
    assert model.pruning_record.zeros == round(0.3 * model.pruning_record.total)


def test_loading_info_is_still_returned(base: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        base, pruning_config=config(), output_loading_info=True
    )
    assert model.pruning_record
    assert not info["missing_keys"]


def test_bfloat16_prunes(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, pruning_config=config()
    )
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    pairs = zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("bad", ["gsm8k", 0.2, object()])
def test_a_bad_pruning_config(bad: Any, base: Path) -> None:
    with pytest.raises(TypeError, match="pruning_config must be a CAPConfig or a dictionary"):
        AutoModelForCausalLM.from_pretrained(base, pruning_config=bad)


def test_both_configs(base: Path) -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        AutoModelForCausalLM.from_pretrained(
            base, pruning_config=config(), quantization_config=config()
        )


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM])
def test_pruning_what_is_already_pruned(loader: Any, packed: Path) -> None:
    with pytest.raises(ValueError, match=r"is already pruned to sparsity 0\.3: load it without"):
        loader.from_pretrained(packed, pruning_config=config())


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", [("optimum_cap", "transformers"), ("transformers", "optimum_cap")]
)
def test_the_order_of_imports_does_not_matter(order: tuple[str, str], packed: Path) -> None:
    imports = {
        "optimum_cap": "import optimum_cap",
        "transformers": "from transformers import AutoModelForCausalLM, LlamaForCausalLM",
    }
    result = run(
        f"""
{imports[order[0]]}
{imports[order[1]]}
config = optimum_cap.CAPConfig(sparsity=0.3)
for loader in (AutoModelForCausalLM, LlamaForCausalLM):
    for given in (config, config.to_dict()):
        try:
            loader.from_pretrained({str(packed)!r}, pruning_config=given)
        except ValueError as error:
            print(error)
"""
    )
    assert result.stdout.count("is already pruned to sparsity 0.3") == 4, result.stderr


def test_model_without_tokenizer(base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded from .*--tokenizer"):
        AutoModelForCausalLM.from_pretrained(base, pruning_config=config())
    given = config(tokenizer=tiny_tokenizer())
    assert AutoModelForCausalLM.from_pretrained(base, pruning_config=given).pruning_record


def test_a_tokenizer_by_name_is_not_looked_for_where_the_model_is(
    base: Path, tmp_path: Path
) -> None:
    # The subfolder and the revision are the model's; its own tokenizer is in the subfolder too.
    where = {"subfolder": base.name, "revision": "main"}
    load = functools.partial(AutoModelForCausalLM.from_pretrained, base.parent, **where)
    other = tmp_path / "other"
    tiny_tokenizer("{% for m in messages %}{{ m.content }}...{% endfor %}").save_pretrained(other)
    expected = load(pruning_config=config()).pruning_record.calibration
    named = load(pruning_config=config(tokenizer=str(other))).pruning_record.calibration
    assert named["digests"] == expected["digests"]
    assert named["tokens"] != expected["tokens"]


def test_model_without_language_head(base: Path) -> None:
    with pytest.raises(ValueError, match="load the model with AutoModelForCausalLM"):
        AutoModel.from_pretrained(base, pruning_config=config())


def test_the_signature_is_kept_and_registration_is_idempotent() -> None:
    wrapped = PreTrainedModel.from_pretrained
    register()
    assert PreTrainedModel.from_pretrained == wrapped
    parameters = inspect.signature(PreTrainedModel.from_pretrained).parameters
    assert {"config", "cache_dir", "token", "revision", "use_safetensors"} <= set(parameters)


# Loading packed checkpoints


def test_a_packed_checkpoint_is_an_ordinary_model(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert_ordinary(model)
    assert model.pruning_record.zeros > 0
    assert model.config.pruning_config["sparsity"] == 0.3


def test_other_heads_load_a_packed_checkpoint(packed: Path) -> None:
    full = AutoModelForCausalLM.from_pretrained(packed)
    backbone = AutoModel.from_pretrained(packed)
    with torch.no_grad():
        assert torch.equal(backbone(IDS).last_hidden_state, full.model(IDS).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(packed)
    up = classifier.model.layers[0].mlp.up_proj.weight
    assert torch.equal(up, full.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_map(device_map: Any, packed: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(packed)
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map)
    pairs = zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    assert all(torch.equal(a.cpu(), b) for a, b in pairs)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_disk_offload(name: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    from optimum_cap import CAPPruner

    CAPPruner(config()).prune(model, tokenizer).save_pretrained(tmp_path / "packed")
    stack = "transformer.h" if name == "gpt2" else "model.layers"
    device_map = {module: "cpu" for module, _ in model.named_modules() if module.count(".") == 1}
    device_map |= {"lm_head": "cpu", f"{stack}.0": "cpu"}
    device_map |= {f"{stack}.1": "disk", f"{stack}.2": "disk"}
    del device_map[stack]
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        torch.testing.assert_close(offloaded(IDS).logits, model(IDS).logits)


def test_an_ordinary_float_model(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    zeros = {name: tensor == 0 for name, tensor in model.state_dict().items()}
    for changed in (
        copy.deepcopy(model).half(),
        copy.deepcopy(model).to(torch.bfloat16),
        copy.deepcopy(model).double(),
    ):
        for name, tensor in changed.state_dict().items():
            assert (tensor[zeros[name]] == 0).all()
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape[1] <= IDS.shape[1] + 4


def test_lora(packed: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(packed)
    before = copy.deepcopy(model.state_dict())
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(loaded.state_dict()[name], before[name])
    assert torch.equal(loaded.state_dict()[name], merged.state_dict()[name])
    filled = {matrix.name: matrix.zeros for matrix in loaded.pruning_record.matrices}
    assert filled[name] == 0  # LoRA filled the zeros in, and the record does not claim otherwise


@pytest.mark.slow
def test_trainer(packed: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(packed)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    pairs = zip(model.state_dict().values(), saved.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_compile(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(torch.compile(model)(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpoint_format", ["packed", "coded"])
@pytest.mark.parametrize(("dtype", "sparsity"), [(torch.float32, 0.5), (torch.bfloat16, 0.2)])
def test_the_reader_in_the_documentation(
    dtype: torch.dtype, sparsity: float, checkpoint_format: str, tmp_path: Path
) -> None:
    from optimum_cap import CAPPruner

    settings = config(sparsity=sparsity, checkpoint_format=checkpoint_format)
    CAPPruner(settings).prune(tiny_model("llama", dtype=dtype), tiny_tokenizer()).save_pretrained(
        tmp_path
    )
    page = ROOT / "docs" / "checkpoint_format.md"
    scope: dict[str, Any] = {}
    exec(page.read_text().split("```python\n")[1].split("```")[0], scope)
    weights = scope["read"](tmp_path / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert expected[name].dtype == dtype
        assert torch.equal(torch.from_numpy(weight.copy()).view(dtype), expected[name])


@pytest.mark.parametrize(
    "first",
    [
        "transformers.modeling_utils",
        pytest.param("torch", marks=pytest.mark.slow),
        pytest.param("transformers.quantizers.auto", marks=pytest.mark.slow),
    ],
)
def test_an_installed_plugin_is_found_by_itself(first: str, packed: Path) -> None:
    """Torch loads it, whichever module of transformers was the one that imported torch."""
    result = run(
        f"""
import {first}
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM.from_pretrained({str(packed)!r}).pruning_record.sparsity > 0)
""",
        autoload=True,
    )
    assert result.stdout.strip() == "True", result.stderr


@pytest.mark.parametrize("order", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_method_is_known_before_models_are(order: int, packed: Path) -> None:
    """Programs read the method from config.json and hand it back, as lm-eval does."""
    imports = [
        "import optimum_cap",
        "from transformers.quantizers.auto import AutoQuantizationConfig",
    ]
    result = run(
        f"""
{imports[order]}
{imports[1 - order]}
import sys
from transformers import AutoConfig
if {order} == 0:
    assert "transformers.modeling_utils" not in sys.modules, "the test would not show anything"
saved = AutoConfig.from_pretrained({str(packed)!r}).quantization_config
method = AutoQuantizationConfig.from_dict(saved)
from transformers import AutoModelForCausalLM
loaded = AutoModelForCausalLM.from_pretrained({str(packed)!r}, quantization_config=method)
print(loaded.pruning_record.sparsity > 0)
"""
    )
    assert result.stdout.strip() == "True", result.stderr


def test_another_method_than_the_saved_one_is_no_loading(packed: Path) -> None:
    with pytest.raises(ValueError, match=r"is already pruned to sparsity 0\.3"):
        AutoModelForCausalLM.from_pretrained(packed, quantization_config=config(sparsity=0.4))


@pytest.mark.skipif(not hasattr(transformers, "SarvamMoEConfig"), reason="new in transformers 5.24")
def test_fused_projections_that_are_split_while_loading(tmp_path: Path) -> None:
    """On disk query, key and value of sarvam_moe are one matrix, packed as one."""
    from optimum_cap import CAPPruner

    settings = {**MOE, "num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.SarvamMoEConfig(**settings)).eval()
    CAPPruner(config(sparsity=0.5)).prune(model, tiny_tokenizer()).save_pretrained(tmp_path / "a")
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "model.layers.0.attention.query_key_value.weight_mask" in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    for again in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "b")):
        for name, weight in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], weight), name


def test_a_newer_transformers_that_fails_names_the_one_that_works(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer.transformers, "__version__", "5.99.0")
    monkeypatch.delattr(quantizer.CAPQuantizer.__mro__[1], "remove_quantization_config")
    with pytest.raises(RuntimeError, match=f"install transformers=={NEWEST_TRANSFORMERS}"):
        AutoModelForCausalLM.from_pretrained(packed)


# Where the plugin is not installed (torch does not load it)


def run(code: str, *, autoload: bool = False) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, in which torch loads the installed plugin or does not."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload))}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_format", ["packed", "coded"])
def test_without_the_plugin_checkpoints_that_need_it_stop_with_an_error(
    checkpoint_format: str, tmp_path: Path
) -> None:
    """All architectures: merged experts fail in another way than plain matrices."""
    from optimum_cap import CAPPruner

    settings = config(recipe="magnitude", checkpoint_format=checkpoint_format)
    for name in ARCHITECTURES:
        CAPPruner(settings).prune(tiny_model(name)).save_pretrained(tmp_path / name)
    result = run(
        f"""
import sys
from transformers import AutoModel, AutoModelForCausalLM
for name in {ARCHITECTURES!r}:
    for loader in (AutoModelForCausalLM, AutoModel):
        try:
            loader.from_pretrained({str(tmp_path)!r} + "/" + name)
        except Exception as error:
            print(name, "stopped:", type(error).__name__)
        else:
            print(name, "LOADED")
assert "optimum_cap" not in sys.modules
"""
    )
    assert result.returncode == 0, result.stderr
    assert "LOADED" not in result.stdout, result.stdout
    assert result.stdout.count("stopped") == 2 * len(ARCHITECTURES)


@pytest.mark.slow
def test_without_the_plugin_dense_exports_give_the_same_logits(tmp_path: Path) -> None:
    from optimum_cap import CAPPruner

    for name in ARCHITECTURES:
        model = tiny_model(name)
        settings = config(recipe="magnitude", checkpoint_format="dense")
        CAPPruner(settings).prune(model)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            torch.save(model(IDS).logits, tmp_path / name / "logits.pt")
    result = run(
        f"""
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads({torch.get_num_threads()})  # another number rounds differently
for name in {ARCHITECTURES!r}:
    folder = {str(tmp_path)!r} + "/" + name
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(4, 24)[None]).logits
    assert torch.equal(logits, torch.load(folder + "/logits.pt")), name
assert "optimum_cap" not in sys.modules
print("same")
"""
    )
    assert result.stdout.strip() == "same", result.stderr


SPLITTING = """
import sys, tempfile, torch
tempfile.tempdir = sys.argv[2]
import optimum_cap
from transformers import AutoModelForCausalLM
from optimum_cap import CAPConfig
torch.set_num_threads(1)
try:
    config = CAPConfig(sparsity=0.5, criterion="magnitude") if sys.argv[3] == "prune" else None
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], tp_plan="auto", pruning_config=config
    )
except (ValueError, OSError) as error:
    print(type(error).__name__, error)
    sys.exit()
weight = model.model.layers[1].mlp.up_proj.weight
local = weight.to_local() if hasattr(weight, "to_local") else weight
with torch.no_grad():
    logits = model(input_ids=torch.arange(4, 24)[None]).logits
print(len(local), float(logits.double().sum()), model.name_or_path == sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_format", ["packed", "coded"])
def test_a_checkpoint_is_split_over_ranks_while_it_is_loaded(
    checkpoint_format: str, tmp_path: Path
) -> None:
    """One of two real ranks decodes it to a folder, from which both read."""
    model = pruned(checkpoint_format=checkpoint_format)
    model.save_pretrained(tmp_path / "pruned")
    (tmp_path / "temporary").mkdir()
    with torch.no_grad():
        expected = float(model(input_ids=torch.arange(4, 24)[None]).logits.double().sum())
    rows = len(model.model.layers[1].mlp.up_proj.weight)
    done = ranks(tmp_path / "pruned", tmp_path / "temporary", "load", script=SPLITTING)
    for one in done:
        count, total, same_name = one.stdout.split()
        assert int(count) == rows // 2, one.stderr
        assert float(total) == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert same_name == "True"
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow
def test_what_cannot_be_split_is_said_by_every_rank(packed: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    done = ranks(tmp_path / "dense", tmp_path, "prune", script=SPLITTING)
    for one in done:
        assert "cannot prune a model whose matrices are split" in one.stdout, one.stderr
    damaged = packed / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-100] ^= 1
    damaged.write_bytes(data)
    done = ranks(packed, tmp_path, "load", script=SPLITTING)
    for one in done:
        assert "model.safetensors" in one.stdout, one.stderr
