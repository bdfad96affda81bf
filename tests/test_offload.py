"""Models with weights on disk: scored, pruned and saved as they are in memory."""

import gc
import hashlib
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from helpers.checkpoints import contents, half_on_disk, on_disk, saved
from helpers.paths import TESTS
from helpers.pruning_runs import config
from helpers.tiny_models import tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.commands.base import CAPSubcommand
from optimum_cap.commands.parser import CommandParser
from optimum_cap.commands.prune import PruneCommand
from optimum_cap.data.calibration import build_calibration_set
from optimum_cap.methods.masks import REMOVED_PARTS
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.hooks import masked_unit
from optimum_cap.models.modes import float32_on_cpu
from optimum_cap.models.offload import offloading_hook
from optimum_cap.models.sites import SiteUnit
from optimum_cap.models.view import ModelView
from optimum_cap.scoring.cache import ScoreCache
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.first_order import first_order_losses
from optimum_cap.scoring.plain import example_losses, plain_losses
from optimum_cap.scoring.settings import ScoringSettings
from optimum_cap.scoring.wavefront import Wavefront

RECIPES: list[dict[str, Any]] = [
    {"recipe": "causal"},
    {"recipe": "causal_fast"},
    {
        "recipe": "causal_fast",
        "allocation": "interventional",
        "target": "dense",
        "order": "projection",
    },
    {"recipe": "paper"},
    {"recipe": "magnitude"},
    {"recipe": "magnitude_global"},
    {"recipe": "random"},
    {"recipe": "wanda"},
    {"recipe": "sparsegpt"},
    {"recipe": "owl_wanda"},
    {"recipe": "owl_sparsegpt"},
    {"recipe": "wanda", "pattern": "2:4", "sparsity": 0.5},
    {"recipe": "sparsegpt", "pattern": "2:4", "sparsity": 0.5},
]


def pruned(model: PreTrainedModel, target: Path, settings: CAPConfig) -> dict[str, bytes]:
    CAPPruner(settings).prune(model).save_pretrained(target)
    return contents(target)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each weight is read from disk."""
    from accelerate.utils import OffloadedWeightsLoader

    counts: Counter[str] = Counter()
    own = OffloadedWeightsLoader.__getitem__

    def counted(self: OffloadedWeightsLoader, key: str) -> torch.Tensor:
        counts[key] += 1
        return own(self, key)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)
    return counts


# Scoring


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_in_memory(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", architecture, dtype=dtype)
    in_memory = AutoModelForCausalLM.from_pretrained(folder)
    examples = build_calibration_set(config(), tiny_tokenizer()).examples
    expected = plain_losses(ModelView.of(in_memory), examples)
    model = on_disk(folder, tmp_path / "offload")
    losses = exact_losses(ModelView.of(model), examples)
    torch.testing.assert_close(losses.intact, expected.intact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.masked, expected.masked, rtol=1e-4, atol=1e-6)
    same = exact_losses(ModelView.of(in_memory), examples)
    assert torch.equal(losses.masked, same.masked)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_an_offloaded_expert_is_not_masked_in_vain(tmp_path: Path) -> None:
    model = on_disk(saved(tmp_path / "model", "mixtral"), tmp_path / "offload")
    site = next(site for site in find_sites(model) if site.kind == "expert")
    with (
        pytest.raises(ValueError, match=r"cannot mask .*down_proj\[0\]: its weights are offloaded"),
        masked_unit(model, site, site.units[0]),
    ):
        pass


def test_chunks_of_an_offloaded_model_serve_it_in_memory(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    model, in_memory = (
        on_disk(folder, tmp_path / "offload"),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    examples = build_calibration_set(config(), tiny_tokenizer()).examples
    cache = ScoreCache(tmp_path / "cache", model)
    losses = exact_losses(
        ModelView.of(model), examples, settings=ScoringSettings(memory_budget="1MB", cache=cache)
    )
    same = ScoreCache(tmp_path / "cache", in_memory)
    kept = sorted((tmp_path / "cache").rglob("*.safetensors"))
    again = exact_losses(
        ModelView.of(in_memory), examples, settings=ScoringSettings(memory_budget="1MB", cache=same)
    )
    assert torch.equal(losses.masked, again.masked)
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == kept


def test_first_order_needs_the_weights_in_memory(tmp_path: Path) -> None:
    model = on_disk(saved(tmp_path / "model"), tmp_path / "offload")
    examples = build_calibration_set(config(), tiny_tokenizer()).examples
    with pytest.raises(ValueError, match=r"needs all weights in memory .* use estimator 'exact'"):
        first_order_losses(ModelView.of(model), examples)


def test_each_layer_is_brought_in_once_per_chunk(
    loads: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_disk(saved(tmp_path / "model"), tmp_path / "offload")
    examples = build_calibration_set(config(), tiny_tokenizer()).examples
    chunks = []
    own = Wavefront.masked_losses

    def watched(self: Wavefront, units: list[SiteUnit]) -> torch.Tensor:
        loads.clear()
        losses = own(self, units)
        chunks.append(len(units))
        for name in model.state_dict():
            in_layer = name.startswith("model.layers.")
            passed = in_layer and int(name.split(".")[2]) < units[0][0].layer
            unused = passed or name.startswith("model.embed_tokens")
            assert loads[name] == (0 if unused else 1), name
        return losses

    monkeypatch.setattr(Wavefront, "masked_losses", watched)
    exact_losses(ModelView.of(model), examples, settings=ScoringSettings(memory_budget="1MB"))
    assert len(chunks) > 3
    assert max(chunks) > 1


def test_weights_come_in_once_per_layer_and_pass_when_pruning_by_inputs(
    loads: Counter[str], tmp_path: Path
) -> None:
    model = on_disk(saved(tmp_path / "model"), tmp_path / "offload")
    CAPPruner(config(recipe="wanda", memory_budget=1)).prune(model)  # one example after the other
    # Besides those of the first layer, which is observed: only projections stay out of memory then.
    norms = [n for n in model.state_dict() if "layernorm" in n and ".layers.0." not in n]
    # The check that they are finite, a pass that sees how layers return, one that checks that they
    # can run one at a time, one for the statistics, one with the pruned weights.
    assert {loads[name] for name in norms} == {5}


# Pruning and saving


@pytest.mark.parametrize(
    "changes", RECIPES, ids=lambda changes: "-".join(map(str, changes.values()))
)
@pytest.mark.parametrize(
    ("checkpoint_format", "dtype"),
    [
        ("packed", torch.float32),
        pytest.param("dense", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_same_bytes_as_in_memory(
    changes: dict[str, Any], checkpoint_format: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    settings = config(checkpoint_format=checkpoint_format, **changes)
    folder = saved(tmp_path / "model", dtype=dtype)
    expected = pruned(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a", settings)
    model = half_on_disk(folder, tmp_path / "offload")
    assert pruned(model, tmp_path / "b", settings) == expected


@pytest.mark.parametrize("pattern", REMOVED_PARTS)
def test_parts_of_offloaded_models_are_not_removed(pattern: str, tmp_path: Path) -> None:
    model = half_on_disk(saved(tmp_path / "model"), tmp_path / "offload")
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="weights of this one are offloaded: load it without"):
        CAPPruner(CAPConfig(0.5, recipe="random", pattern=pattern)).prune(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["causal", "paper", "sparsegpt"])
@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "qwen3_moe", "phi3"])
def test_same_bytes_where_weights_are_transposed_or_shared_by_experts(
    architecture: str, recipe: str, tmp_path: Path
) -> None:
    settings = config(recipe=recipe)
    folder = saved(tmp_path / "model", architecture)
    expected = pruned(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a", settings)
    assert pruned(on_disk(folder, tmp_path / "offload"), tmp_path / "b", settings) == expected
    if architecture != "gpt2":
        model = half_on_disk(folder, tmp_path / "loaded")
        assert pruned(model, tmp_path / "c", settings) == expected


def test_pruning_while_loading(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    expected = pruned(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a", config())
    model = half_on_disk(folder, tmp_path / "offload", pruning_config=config())
    model.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "b") == expected


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "model")
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}+1=", "completion": "{n + 1}"}}\n' for n in range(9)))
    common = ["-m", folder, "--dataset", data, "--sparsity", "0.4", "--num-samples", "6"]
    command(PruneCommand, *common, "-o", tmp_path / "a", "--device-map", "cpu")
    small = ["--max-memory", "cpu=40KB", "--offload-folder", tmp_path / "offload"]
    command(PruneCommand, *common, "-o", tmp_path / "b", *small)
    assert (tmp_path / "offload").is_dir(), "something was offloaded"
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def command(kind: type[CAPSubcommand], *arguments: Any) -> None:
    parser = CommandParser()
    kind.parse_args(parser)
    args = parser.parse_args(list(map(str, arguments)))
    kind(None, args=args, from_defaults_factory=True, parser=parser).run()


def test_evaluation(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    examples = build_calibration_set(config(), tiny_tokenizer()).examples
    in_memory = AutoModelForCausalLM.from_pretrained(folder)
    model = half_on_disk(folder, tmp_path / "offload")
    assert torch.equal(example_losses(model, examples), example_losses(in_memory, examples))


def test_a_model_without_an_offload_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    expected = pruned(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a", config())
    model = half_on_disk(folder, None)
    assert pruned(model, tmp_path / "b", config()) == expected


def test_weights_that_are_offloaded_to_the_cpu(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    expected = pruned(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a", config())
    model = cpu_offload(AutoModelForCausalLM.from_pretrained(folder))
    assert pruned(model, tmp_path / "b", config()) == expected


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tie_word_embeddings=True)
    expected = pruned(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a", config())
    assert pruned(on_disk(folder, tmp_path / "offload"), tmp_path / "b", config()) == expected


def test_several_files_of_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    model = half_on_disk(folder, tmp_path / "offload", pruning_config=config())
    in_memory = AutoModelForCausalLM.from_pretrained(folder, pruning_config=config())
    for name, either in (("a", in_memory), ("b", model)):
        either.save_pretrained(tmp_path / name, max_shard_size="20KB")
    assert sharded_tensors(tmp_path / "a") == sharded_tensors(tmp_path / "b")
    # Releases of transformers differ in how they share out the weights of an offloaded model.
    others = [
        {name: data for name, data in contents(folder).items() if "safetensors" not in name}
        for folder in (tmp_path / "a", tmp_path / "b")
    ]
    assert others[0] == others[1]


def sharded_tensors(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """All tensors of several files, which the index covers."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert len(shards) > 1
    assert index["weight_map"] == {name: file for file, own in shards.items() for name in own}
    tensors = {name: tensor for own in shards.values() for name, tensor in own.items()}
    assert sum(map(len, shards.values())) == len(tensors), "no tensor is in two files"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return {
        name: (tensor.dtype, tensor.shape, tensor.view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def test_the_pruned_model_runs(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    model = half_on_disk(folder, tmp_path / "offload", pruning_config=config())
    in_memory = AutoModelForCausalLM.from_pretrained(folder, pruning_config=config())
    tokens = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, in_memory(tokens).logits)
        with float32_on_cpu(model):
            assert torch.equal(model(tokens).logits, in_memory(tokens).logits)


@pytest.mark.parametrize("load", [half_on_disk, on_disk])
def test_the_files_of_the_model_never_change(load: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    model = load(folder, tmp_path / "offload")
    before = digests(folder) | digests(tmp_path / "offload")
    pruned(model, tmp_path / "out", config())
    pruned(model, tmp_path / "out", config(sparsity=0.6, recipe="sparsegpt"))
    after = digests(folder) | digests(tmp_path / "offload")
    assert before.items() <= after.items()
    assert all("pruned-" in name for name in after.keys() - before.keys())
    assert offloading_hook(model.model.layers[1].mlp.up_proj) is not None, "it is still offloaded"
    del model
    gc.collect()
    assert digests(folder) | digests(tmp_path / "offload") == before, "the copies are gone"


def digests(folder: Path) -> dict[str, str]:
    return (
        {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}
        if folder.exists()
        else {}
    )


# Faults

PRUNE_IN_A_PROCESS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from helpers.checkpoints import half_on_disk
from helpers.pruning_runs import config
from optimum_cap import CAPPruner
model = half_on_disk(Path({folder!r}), Path({offload!r}))
{before_pruning}
try:
    CAPPruner(config()).prune(model)
    {before_saving}
    model.save_pretrained({target!r})
except OSError as error:
    print("OSError:", error)
"""


def run(tmp_path: Path, before_pruning: str = "", before_saving: str = "pass") -> Any:
    code = PRUNE_IN_A_PROCESS.format(
        tests=str(TESTS),
        folder=str(tmp_path / "model"),
        offload=str(tmp_path / "offload"),
        target=str(tmp_path / "out"),
        before_pruning=before_pruning,
        before_saving=before_saving,
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# A limit on the size of files stands in for a disk that is really full.
FULL_DISK = (
    "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"
)


@pytest.mark.slow
def test_a_full_disk_when_pruning(tmp_path: Path) -> None:
    before = digests(saved(tmp_path / "model"))
    result = run(tmp_path, before_pruning=FULL_DISK.format(1000))
    assert "OSError: " in result.stdout, result.stderr
    assert "could not store the pruned model.layers.1." in result.stdout
    assert "choose another offload_folder" in result.stdout
    assert digests(tmp_path / "model") == before
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_full_disk_when_saving(tmp_path: Path) -> None:
    before = digests(saved(tmp_path / "model"))
    result = run(tmp_path, before_saving=FULL_DISK.format(20_000))
    assert f"could not save to {tmp_path / 'out'}" in result.stdout, result.stderr
    assert digests(tmp_path / "model") == before
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        "checkpoint.transcoding.save_file",
        pytest.param("checkpoint.transcoding.read_json", marks=pytest.mark.slow),
        pytest.param("pruning.run.apply_mask_", marks=pytest.mark.slow),
    ],
)
def test_kill_9_leaves_the_old_checkpoint(point: str, tmp_path: Path) -> None:
    before = digests(saved(tmp_path / "model"))
    model = half_on_disk(tmp_path / "model", tmp_path / "offload")
    old = pruned(model, tmp_path / "out", config(sparsity=0.5))
    # Fails where there is no such name; where it is not reached, the process ends with 0.
    kill = (
        "import os; from unittest import mock; "
        f"mock.patch('optimum_cap.{point}', lambda *a, **k: os.kill(os.getpid(), 9)).start()"
    )
    killed = run(tmp_path, before_pruning=kill)
    assert killed.returncode == -signal.SIGKILL, f"{point} is not reached: {killed.stderr}"
    assert contents(tmp_path / "out") == old
    assert digests(tmp_path / "model") == before
    pruned(model, tmp_path / "out", config(sparsity=0.6))
    in_memory = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert in_memory.pruning_record.sparsity == pytest.approx(0.6, abs=0.01)
