"""Fixtures for all tests: no network, tiny models, nothing left behind."""

import os
import re
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub: a test that reaches for the Hub fails at once, and no
# test finds what another run has left in the caches.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="optimum-cap-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(os.environ["HF_HOME"], "torchinductor")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch starts its threads: one thread in each worker of pytest-xdist and in each process
# that a test starts, as there are as many workers as cores. The last bits of a sum depend on it.
os.environ["OMP_NUM_THREADS"] = "1"
# Where a test takes more, those that wait for work sleep instead of taking the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, SAMPLED, tiny_model, tiny_tokenizer
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from optimum_cap.models import compilation
from optimum_cap.scoring import wavefront

# In these folders and modules, whose tests compute, the default run takes the first and the last
# parameter set of a test, `-m slow` one more, and `-m exhaustive` the others.
_COMPUTING = re.compile(
    r"(pruning|scoring|estimation|models|methods|study)/|"
    r"test_(recipes|default_recipe|offload|devices|classifiers|shared_layers|models_with_images)\."
)
_MOST_SETS = 2
_MOST_SLOW_SETS = 1


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all but a few parameter sets of tests that compute as slow, and most as exhaustive."""
    sets: dict[str, list[pytest.Item]] = {}
    for item in items:
        test, parametrized, _ = item.nodeid.removeprefix("tests/").partition("[")
        if parametrized and _COMPUTING.match(test):
            sets.setdefault(test, []).append(item)
    for test, each in sets.items():
        quick = [item for item in each if item.get_closest_marker("slow") is None]
        last = max(len(quick) - 1, 0)
        kept = {round(place * last / (_MOST_SETS - 1)) for place in range(_MOST_SETS)}
        for place, item in enumerate(quick):
            if len(quick) > _MOST_SETS and place not in kept:
                item.add_marker(pytest.mark.slow)
        slow = [item for item in each if item.get_closest_marker("slow") is not None]
        # Each test begins elsewhere, so that all architectures get their share.
        step, start = len(slow) / _MOST_SLOW_SETS, zlib.crc32(test.encode())
        kept = {
            (start + round(step * place)) % len(slow) for place in range(_MOST_SLOW_SETS) if slow
        }
        for place, item in enumerate(slow):
            if len(slow) > _MOST_SLOW_SETS and place not in kept:
                item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "slow"]
                if item.get_closest_marker("slow") is None:  # else its whole module is
                    item.add_marker(pytest.mark.exhaustive)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist, or with -p no:xdist
def pytest_xdist_auto_num_workers() -> int:
    """One worker for each core that this process may use, but at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(usable or 1, 8)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(params=SAMPLED)
def architecture(request: pytest.FixtureRequest) -> str:
    """Name of a supported architecture of each kind; the others are slow or exhaustive."""
    return request.param


@pytest.fixture(params=ARCHITECTURES)
def every_architecture(request: pytest.FixtureRequest) -> str:
    """Name of each supported architecture, for tests that depend on details of transformers."""
    return request.param


@pytest.fixture
def model(architecture: str) -> PreTrainedModel:
    """A tiny random model of an architecture of each kind; the others are slow or exhaustive."""
    return tiny_model(architecture)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A test may have changed it, or what it imports."""
    torch.set_num_threads(1)


@pytest.fixture
def torch_that_compiles() -> None:
    """Skip where torch is too old for `torch_compile`."""
    if Version(torch.__version__) < Version(compilation.OLDEST_TORCH):
        pytest.skip(f"torch_compile needs torch {compilation.OLDEST_TORCH}")


@pytest.fixture
def compiled_calls(torch_that_compiles: None, monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes that compiled layers get from now on; what was compiled before is forgotten."""
    torch.compiler.reset()
    return counted(monkeypatch, compilation.call_compiled)


@pytest.fixture
def calls_to_compile(
    torch_that_compiles: None, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Size]:
    """Shapes that layers get from now on which are to be compiled, but are not, to save time."""
    return counted(monkeypatch, compilation.call_layer)


def counted(monkeypatch: pytest.MonkeyPatch, call: compilation.LayerCall) -> list[torch.Size]:
    shapes: list[torch.Size] = []

    def counting(layer: nn.Module, hidden: torch.Tensor, *rest: Any) -> Any:
        shapes.append(hidden.shape)
        return call(layer, hidden, *rest)

    monkeypatch.setattr(wavefront, "call_compiled", counting)
    return shapes


@pytest.fixture
def empty_presets(tmp_path: Path) -> Path:
    """A data folder with an empty file of each preset."""
    from optimum_cap.data.sources import PRESETS

    for preset in PRESETS.values():
        file = tmp_path / "presets" / preset.files[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "presets"
