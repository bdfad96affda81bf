"""Scores by compiled layers equal those of one hooked pass per unit."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from helpers.calibration import ROWS
from helpers.score_runs import ONE_STREAM_BUDGET
from helpers.shared_prefix import examples
from helpers.tiny_models import spread_out, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.commands.parser import CommandParser
from optimum_cap.commands.prune import config_values
from optimum_cap.commands.score import ScoreCommand
from optimum_cap.config import COMPILING, effective
from optimum_cap.data.batches import batches
from optimum_cap.models import compilation
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.sites import all_units
from optimum_cap.models.view import ModelView
from optimum_cap.scoring.cache import ScoreCache
from optimum_cap.scoring.estimators import ESTIMATORS
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.plain import plain_losses
from optimum_cap.scoring.settings import ScoringSettings

FIELDS: dict[str, Any] = {
    "sparsity": 0.2,
    "recipe": "paper",
    "dataset": ROWS,
    "num_samples": 6,
    "subsets": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prefix"), [("llama", 0), ("gemma2", 12), ("gpt2", 12), ("mixtral", 0)]
)
def test_compiled_equals_plain(name: str, prefix: int, compiled_calls: list[torch.Size]) -> None:
    model, rows = tiny_model(name), examples(prefix)
    sites = find_sites(model)
    plain = plain_losses(ModelView(model, sites), rows)
    exact = exact_losses(
        ModelView(model, sites),
        rows,
        settings=ScoringSettings(memory_budget=ONE_STREAM_BUDGET, torch_compile=True),
    )
    assert len(compiled_calls) >= 4  # of each head of the first layer, through the second one
    torch.testing.assert_close(exact.masked, plain.masked, rtol=1e-5, atol=0)
    torch.testing.assert_close(exact.intact, plain.intact, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [0, 12])
def test_all_layers_are_one_program(prefix: int, compiled_calls: list[torch.Size]) -> None:
    from torch._dynamo.utils import counters

    found = []
    for layers in (4, 12):
        torch.compiler.reset()
        counters.clear()
        model = tiny_model("llama", num_hidden_layers=layers)
        exact_losses(
            ModelView.of(model),
            examples(prefix),
            settings=ScoringSettings(memory_budget=ONE_STREAM_BUDGET, torch_compile=True),
        )
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_that_compile(estimator: str, calls_to_compile: list[torch.Size]) -> None:
    shared = {**FIELDS, "exact_examples": 2, "memory_budget": ONE_STREAM_BUDGET}
    fields = effective(shared, {"estimator": estimator})
    losses = []
    for torch_compile in (False, True) if estimator in COMPILING else (False,):
        config = CAPConfig(torch_compile=torch_compile, **fields)
        losses.append(CAPPruner(config).measure(tiny_model("llama"), tiny_tokenizer()))
        assert bool(calls_to_compile) == torch_compile
    assert torch.equal(losses[0].masked, losses[-1].masked)
    assert ESTIMATORS[estimator].compiles == (estimator in COMPILING)


@pytest.mark.usefixtures("calls_to_compile")
def test_scores_of_compiled_layers_serve_a_prune(tmp_path: Path) -> None:
    config = CAPConfig(torch_compile=True, **FIELDS)
    file, model = tmp_path / "scores", tiny_model("llama")
    CAPPruner(config).measure(model, tiny_tokenizer(), save_to=file)
    config = CAPConfig(scores=file, **FIELDS)
    pruned = CAPPruner(config).prune(tiny_model("llama"), tiny_tokenizer())
    assert pruned.pruning_record.zeros > 0


def test_the_flag_of_the_command_line() -> None:
    parser = CommandParser()
    ScoreCommand.parse_args(parser)
    needed = ["-m", "model", "-o", "file"]
    assert "torch_compile" not in config_values(vars(parser.parse_args(needed)))
    given = config_values(vars(parser.parse_args([*needed, "--torch-compile"])))
    assert given["torch_compile"] is True


def on_disk(folder: Path) -> PreTrainedModel:
    return disk_offload(tiny_model("llama"), folder)


@pytest.mark.usefixtures("torch_that_compiles")
@pytest.mark.parametrize("place", [on_disk, lambda folder: spread_out(tiny_model("llama"))])
def test_a_model_that_is_moved_about_is_not_compiled(place: Any, tmp_path: Path) -> None:
    model = place(tmp_path / "weights")
    config = CAPConfig(torch_compile=True, resume_dir=tmp_path / "cache", **FIELDS)
    message = r"torch_compile needs the whole model on one device, .* leave torch_compile out"
    with pytest.raises(ValueError, match=message):
        CAPPruner(config).measure(model, tiny_tokenizer())
    with pytest.raises(ValueError, match=message):
        exact_losses(ModelView.of(model), examples(), settings=ScoringSettings(torch_compile=True))
    assert not (tmp_path / "cache").exists()


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.raises(ValueError, match=r"torch_compile needs torch 2\.7 or newer, .* 2\.6\.0"):
        exact_losses(
            ModelView(tiny_model("llama"), []),
            examples(),
            settings=ScoringSettings(torch_compile=True),
        )


def test_a_layer_that_cannot_be_compiled_is_named(compiled_calls: list[torch.Size]) -> None:
    model = tiny_model("llama")
    sites = find_sites(model)
    for layer in ModelView(model, sites).layers:
        layer.register_forward_pre_hook(lambda module, args: print(args))
    message = r"torch_compile: LlamaDecoderLayer cannot be compiled here .* leave torch_compile out"
    with pytest.raises(ValueError, match=message):
        exact_losses(
            ModelView(model, sites),
            examples(),
            settings=ScoringSettings(memory_budget=ONE_STREAM_BUDGET, torch_compile=True),
        )
    exact_losses(
        ModelView(model, sites),
        examples(),
        settings=ScoringSettings(memory_budget=ONE_STREAM_BUDGET),
    )


@pytest.mark.slow
def test_too_many_programs_are_named(
    compiled_calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "_MOST_PROGRAMS", 1)
    model = tiny_model("llama")
    sites, rows = find_sites(model), examples(0)
    of_first_layer = all_units(sites)[:2]
    # A single row, and then more.
    exact_losses(
        ModelView(model, sites),
        rows[:1],
        units=of_first_layer[:1],
        settings=ScoringSettings(torch_compile=True),
    )
    with pytest.raises(ValueError, match="needed more than 1 programs in this process"):
        exact_losses(
            ModelView(model, sites),
            rows,
            units=of_first_layer,
            settings=ScoringSettings(torch_compile=True),
        )


def test_losses_of_compiled_layers_are_kept_apart(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache, batch = ScoreCache(tmp_path, model), batches(examples(), 2)[0]
    compiled, eager = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    cache.put(batch, [], compiled, torch_compile=True)
    assert cache.get(batch, []) is None
    cache.put(batch, [], eager)
    assert torch.equal(cache.get(batch, [], torch_compile=True), compiled)
    assert torch.equal(cache.get(batch, []), eager)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about the memory of glibc")
def test_freed_memory_is_kept() -> None:
    program = """if True:
        import resource
        import torch
        from optimum_cap.runtime.memory import keep_freed_memory

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                tensors = [torch.ones(5 * 2**20) for _ in range(3)]  # 20 MB each
                del tensors
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        first = faults()
        keep_freed_memory()
        faults()
        print(first, faults())
    """
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    before, after = map(int, run.stdout.split())
    assert after < before / 10
