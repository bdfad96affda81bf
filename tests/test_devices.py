"""The same work on the CPU and on a GPU, where there is one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from helpers.calibration import examples
from helpers.checkpoints import contents, same_weights
from helpers.pruning_runs import FIELDS, pruned
from helpers.score_runs import ONE_STREAM_BUDGET, chunk_files, same_bytes, score
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.config import RECIPES
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.sites import matrices_by_layer, oriented, prunable_matrices
from optimum_cap.models.view import ModelView
from optimum_cap.pruning.fisher import estimate_sensitivities
from optimum_cap.pruning.sensitivity import measure_sensitivities
from optimum_cap.scoring.cache import ScoreCache
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.first_order import first_order_losses
from optimum_cap.scoring.plain import plain_losses
from optimum_cap.scoring.sampling import control_variate_losses
from optimum_cap.scoring.settings import ScoringSettings

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = [
    # What the CPU gives other tests look at more closely; here it shows that the tests are right.
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=on_cuda),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
of_each_kind = pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])


@on_each_device
@of_each_kind
def test_scores_are_those_of_the_cpu(name: str, device: str) -> None:
    model, rows = tiny_model(name), examples(6)
    expected = plain_losses(ModelView.of(model), rows)
    model.to(device)
    sites = find_sites(model)
    for losses in (
        exact_losses(ModelView(model, sites), rows),
        plain_losses(ModelView(model, sites), rows),
    ):
        torch.testing.assert_close(losses.intact, expected.intact, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(losses.masked, expected.masked, rtol=1e-4, atol=1e-6)


@on_each_device
@of_each_kind
def test_scores_within_a_small_budget(name: str, device: str) -> None:
    model, rows = tiny_model(name).to(device), examples(6)
    sites = find_sites(model, mlp_unit_size=8)
    whole, parts = (
        exact_losses(ModelView(model, sites), rows, settings=ScoringSettings(memory_budget=budget))
        for budget in ("1GB", 10_000)
    )
    torch.testing.assert_close(parts.masked, whole.masked, rtol=1e-4, atol=1e-6)


@on_each_device
@of_each_kind
def test_estimated_scores_are_those_of_the_cpu(name: str, device: str) -> None:
    model, rows = tiny_model(name), examples(6)
    options: dict[str, Any] = {"exact_examples": 3, "seed": 1}
    expected = [
        first_order_losses(ModelView.of(model), rows),
        control_variate_losses(ModelView.of(model), rows, **options),
    ]
    model.to(device)
    found = [
        first_order_losses(ModelView.of(model), rows),
        control_variate_losses(ModelView.of(model), rows, **options),
    ]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.masked, other.masked, rtol=1e-3, atol=1e-5)


@on_each_device
@of_each_kind
def test_sensitivities_are_those_of_the_cpu(name: str, device: str) -> None:
    model, rows = tiny_model(name), examples(6)
    found = []
    for place in ("cpu", device):
        moved = copy.deepcopy(model).to(place)
        sites = find_sites(moved)
        layers = matrices_by_layer(sites)
        uniform_zeros = {m: oriented(moved, m).numel() // 2 for m in prunable_matrices(sites)}
        found.append(
            [
                *measure_sensitivities(
                    ModelView(moved, sites),
                    layers,
                    rows,
                    lambda m, _, own=moved: 0.5 * oriented(own, m),
                ),
                *estimate_sensitivities(
                    ModelView(moved, sites), layers, rows, uniform_zeros
                ).sensitivities,
            ]
        )
    for one, other in zip(*found, strict=True):
        assert one.divergence == pytest.approx(other.divergence, rel=1e-2, abs=1e-7)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_prunes_saves_and_loads(
    recipe: str, dtype: torch.dtype, device: str, tmp_path: Path
) -> None:
    model = pruned(tiny_model("llama", dtype=dtype).to(device), None, recipe=recipe)
    record = model.pruning_record
    assert record.zeros == round(FIELDS["sparsity"] * record.total)
    for matrix in record.matrices:
        weight = model.get_parameter(matrix.name)
        assert weight.device.type == device
        assert weight.dtype == dtype
        assert int((weight == 0).sum()) == matrix.zeros
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(device)
    assert same_weights(loaded, model)


@on_each_device
def test_the_default_recipe_keeps_what_it_keeps_on_the_cpu(device: str) -> None:
    rows = examples(6)
    dense = tiny_model("llama")
    intact = exact_losses(ModelView.of(dense), rows).intact
    found = []
    for place in ("cpu", device):
        model = pruned(copy.deepcopy(dense).to(place), None)
        found.append(exact_losses(ModelView.of(model), rows).intact - intact)
    # Another order of sums can decide between two weights, and the rest follows.
    torch.testing.assert_close(found[0].mean(), found[1].mean(), rtol=0.2, atol=0.02)


@on_each_device
@of_each_kind
def test_scoring_resumes_with_the_same_bytes(name: str, device: str, tmp_path: Path) -> None:
    model = tiny_model(name).to(device)
    expected = score(model, tmp_path)
    for file in chunk_files(tmp_path)[::2]:
        file.unlink()
    assert same_bytes(score(model, tmp_path), expected)
    assert same_bytes(score(model, None), expected)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers_give_the_same_scores(
    dtype: torch.dtype, device: str, tmp_path: Path, compiled_calls: list[torch.Size]
) -> None:
    model, rows = tiny_model("llama", dtype=dtype).to(device), examples(6)
    sites, cache = find_sites(model), ScoreCache(tmp_path, model)
    compiled: dict[str, Any] = {"memory_budget": ONE_STREAM_BUDGET, "torch_compile": True}
    expected = exact_losses(
        ModelView(model, sites), rows, settings=ScoringSettings(cache=cache, **compiled)
    )
    assert compiled_calls
    # Rounded where the layer itself rounds, but sums are in another order.
    tolerance = 1e-4 if dtype == torch.float32 or device == "cpu" else 2e-2
    plain = plain_losses(ModelView(model, sites), rows)
    torch.testing.assert_close(expected.masked, plain.masked, rtol=tolerance, atol=1e-6)
    for file in chunk_files(tmp_path)[::2]:
        file.unlink()
    again = exact_losses(
        ModelView(model, sites), rows, settings=ScoringSettings(cache=cache, **compiled)
    )
    torch.testing.assert_close(again.masked, expected.masked, rtol=tolerance, atol=1e-6)


@on_each_device
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_second_prune_gives_the_same_bytes(recipe: str, device: str, tmp_path: Path) -> None:
    for turn in ("first", "second"):
        pruned(tiny_model("llama").to(device), None, recipe=recipe).save_pretrained(tmp_path / turn)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


@on_each_device
@pytest.mark.parametrize("recipe", ["paper", "causal", "sparsegpt"])
def test_weights_on_disk_are_pruned_as_in_memory(recipe: str, device: str, tmp_path: Path) -> None:
    models = {
        "memory": tiny_model("llama").to(device),
        "disk": disk_offload(tiny_model("llama"), tmp_path / "weights", torch.device(device)),
    }
    for place, model in models.items():
        pruned(model, None, recipe=recipe).save_pretrained(tmp_path / place)
    assert contents(tmp_path / "memory") == contents(tmp_path / "disk")


@on_cuda
def test_scores_outlive_a_full_cuda_device(caplog: pytest.LogCaptureFixture) -> None:
    model, rows = tiny_model("llama").to("cuda"), examples(512, longest=60)
    sites = find_sites(model)
    torch.cuda.reset_peak_memory_stats()
    expected = exact_losses(ModelView(model, sites), rows)
    needed = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties("cuda").total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * needed / total)
    try:
        losses = exact_losses(
            ModelView(model, sites), rows, settings=ScoringSettings(memory_budget=total)
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "memory ran out" in caplog.text
    torch.testing.assert_close(losses.intact, expected.intact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.masked, expected.masked, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="no CUDA device of capability 8.0, which computes with 2:4",
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
def test_pattern_2_4_runs_on_sparse_kernels() -> None:
    # Multiples of 64, as the sparse kernels want them.
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    model = tiny_model("llama", dtype=torch.float16, **sizes).to("cuda")
    CAPPruner(CAPConfig(0.5, pattern="2:4", recipe="magnitude")).prune(model, tiny_tokenizer())
    tokens = torch.arange(128, device="cuda").view(2, 64) % 60 + 3
    with torch.no_grad():
        expected = model(tokens).logits
        pruned_matrices = [matrix.name for matrix in model.pruning_record.matrices]
        for name in pruned_matrices:
            weight = model.get_parameter(name)
            module = model.get_submodule(name.removesuffix(".weight"))
            sparse = torch.sparse.to_sparse_semi_structured(weight.detach())
            assert torch.equal(sparse.to_dense(), weight)
            module.weight = torch.nn.Parameter(sparse, requires_grad=False)
        found = model(tokens).logits
    assert len(pruned_matrices) == 7 * model.config.num_hidden_layers
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
