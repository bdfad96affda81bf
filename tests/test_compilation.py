"""Scores by compiled layers equal those of one hooked pass per unit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from test_wavefront import examples
from tiny_models import tiny_model
from torch import nn

from optimum_cap import compilation, wavefront
from optimum_cap.architectures import decoder_layers, find_sites
from optimum_cap.attribution import exact_losses, plain_losses
from optimum_cap.calibration import batches
from optimum_cap.score_cache import ScoreCache

BUDGET = 10_000  # makes chunks of one stream, which pass all layers but their own whole


@pytest.fixture
def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes that compiled layers get from now on; what was compiled before is forgotten."""
    shapes: list[torch.Size] = []

    def counting(layer: nn.Module, hidden: torch.Tensor, *rest: Any) -> Any:
        shapes.append(hidden.shape)
        return compilation.call_compiled(layer, hidden, *rest)

    monkeypatch.setattr(wavefront, "call_compiled", counting)
    torch.compiler.reset()
    compilation._program.cache_clear()
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prefix"), [("llama", 0), ("gemma2", 12), ("gpt2", 12), ("mixtral", 0)]
)
def test_compiled_equals_plain(name: str, prefix: int, compiled_calls: list[torch.Size]) -> None:
    model, rows = tiny_model(name), examples(prefix)
    sites = find_sites(model)
    plain = plain_losses(model, sites, rows)
    exact = exact_losses(model, sites, rows, BUDGET, torch_compile=True)
    assert len(compiled_calls) >= 4  # of each head of the first layer, through the second one
    torch.testing.assert_close(exact.masked, plain.masked, rtol=1e-5, atol=0)
    torch.testing.assert_close(exact.intact, plain.intact, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_all_layers_are_one_program(compiled_calls: list[torch.Size]) -> None:
    from torch._dynamo.utils import counters

    found = []
    for layers in (4, 12):
        torch.compiler.reset()
        counters.clear()
        model = tiny_model("llama", num_hidden_layers=layers)
        exact_losses(model, find_sites(model), examples(), BUDGET, torch_compile=True)
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] == found[1] > 0


def test_offloaded_layers_are_not_compiled(tmp_path: Path) -> None:
    model = disk_offload(tiny_model("llama"), tmp_path)
    with pytest.raises(ValueError, match=r"torch_compile takes layers .* leave torch_compile out"):
        exact_losses(model, find_sites(model), examples(), torch_compile=True)


def test_a_layer_that_cannot_be_compiled_is_named(compiled_calls: list[torch.Size]) -> None:
    model = tiny_model("llama")
    sites = find_sites(model)
    for layer in decoder_layers(model, sites):
        layer.register_forward_pre_hook(lambda module, args: print(args))
    message = r"torch_compile: LlamaDecoderLayer cannot be compiled here .* leave torch_compile out"
    with pytest.raises(ValueError, match=message):
        exact_losses(model, sites, examples(), BUDGET, torch_compile=True)
    exact_losses(model, sites, examples(), BUDGET)


def test_losses_of_compiled_layers_are_kept_apart(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache, batch = ScoreCache(tmp_path, model), batches(examples(), 2)[0]
    cache.keep(batch, [], torch.tensor([1.0]), compiled=True)
    assert cache.losses(batch, []) is None
    cache.keep(batch, [], torch.tensor([2.0]))
    assert cache.losses(batch, [], compiled=True) == 1
    assert cache.losses(batch, []) == 2
