"""The attention of the last layer: keys and values of all tokens, queries from the first scored on.

That its losses are those of one hooked pass per unit is what `test_wavefront.py` and
`test_exact.py` show for every architecture; here is what it spares, and when it does not.
"""

import functools
from typing import Any

import pytest
import torch
from helpers.score_runs import assert_exact
from helpers.shared_prefix import examples
from helpers.tiny_models import SAMPLED, SHARED_EXPERTS, tiny_model
from torch import nn
from transformers import Cache, PreTrainedModel

from optimum_cap.data.batches import batches
from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.hooks import replaced_forward
from optimum_cap.models.sites import SiteUnit
from optimum_cap.models.view import ModelView
from optimum_cap.scoring.last_attention import LastAttention
from optimum_cap.scoring.wavefront import Wavefront

SUFFIXES = (19, 14, 18)
FIRST = 14 // 2 - 1  # the first position that predicts a scored token


def wavefront_of(
    model: PreTrainedModel, rows: list[CalibrationExample], prefix: int = 0
) -> Wavefront:
    sites = find_sites(model)
    [batch] = batches(rows, len(rows), prefix)
    with torch.no_grad():
        return Wavefront(ModelView(model, sites), batch)


def last_attention(
    model: PreTrainedModel, rows: list[CalibrationExample], prefix: int = 0
) -> LastAttention:
    with torch.no_grad():
        return wavefront_of(model, rows, prefix)._last_attention


@pytest.mark.parametrize("prefix", [0, 12])
@pytest.mark.parametrize("name", [*SAMPLED, *SHARED_EXPERTS])
def test_every_architecture_asks_from_the_first_scored_position_on(name: str, prefix: int) -> None:
    model = tiny_model(name)
    assert last_attention(model, examples(prefix, SUFFIXES), prefix).start == FIRST
    assert_exact(model, examples(prefix, SUFFIXES))


@pytest.mark.parametrize("prefix", [0, 12])
def test_what_is_computed_of_the_last_attention(llama: PreTrainedModel, prefix: int) -> None:
    waves = wavefront_of(llama, examples(prefix, SUFFIXES), prefix)
    attention = llama.model.layers[2].self_attn
    tokens: dict[str, int] = {}

    def count(name: str, module: nn.Module) -> Any:
        own = module.forward

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            tokens[name] = tokens.get(name, 0) + hidden.shape[:2].numel()
            return own(hidden)

        return replaced_forward(module, forward)

    site = waves.blocks.attention[0]
    with torch.no_grad():
        _ = waves._last_attention  # the trial with the intact stream
        with (
            count("q", attention.q_proj),
            count("k", attention.k_proj),
            count("o", attention.o_proj),
        ):
            waves.masked_losses([SiteUnit(site, unit) for unit in site.units])
    longest = max(SUFFIXES) - (prefix > 0)  # the last token predicts nothing
    asking = 3 * (longest - FIRST)
    assert tokens["q"] == tokens["o"] == len(site.units) * asking
    assert tokens["k"] == len(site.units) * (prefix + 3 * longest)


@pytest.mark.parametrize("suffix", [8, 13, 15, 16, 17, 18, 20, 40])
@pytest.mark.parametrize("prefix", [0, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_sliding_windows_about_the_cut(name: str, prefix: int, suffix: int) -> None:
    model, rows = tiny_model(name, sliding_window=8), examples(prefix, (suffix,) * 3)
    assert last_attention(model, rows, prefix).start == suffix // 2 - 1
    assert_exact(model, rows)


def test_a_cut_near_the_start_does_not_pay(llama: PreTrainedModel) -> None:
    rows = examples(0, SUFFIXES)
    rows[1].scored[2:] = True
    assert last_attention(llama, rows).start == 0
    rows[1].scored[2] = False
    assert last_attention(llama, rows).start == 0  # 2 of 19 tokens
    rows[1].scored[3] = False
    assert last_attention(llama, rows).start == 3
    assert_exact(llama, rows)


def test_an_encoding_that_depends_on_the_length_is_not_cut() -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model = tiny_model("llama", max_position_embeddings=12, rope_parameters=scaling)
    assert last_attention(model, examples(0, SUFFIXES)).start == 0
    assert_exact(model, examples(0, SUFFIXES))


def test_a_model_that_cannot_continue_after_tokens_is_not_cut(llama: PreTrainedModel) -> None:
    own = llama.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, Cache) for value in kwargs.values()):
            raise AttributeError("'DynamicCache' object has no attribute 'key_cache'")
        return own(*args, **kwargs)

    with replaced_forward(llama, forward):
        assert last_attention(llama, examples(0, SUFFIXES)).start == 0
        assert_exact(llama, examples(0, SUFFIXES))


def test_an_attention_that_makes_no_use_of_a_cache_is_not_cut(llama: PreTrainedModel) -> None:
    attention = llama.model.layers[2].self_attn
    own = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        without = {
            name: None if isinstance(value, Cache) else value for name, value in kwargs.items()
        }
        return own(*args, **without)

    with replaced_forward(attention, forward):
        assert last_attention(llama, examples(0, SUFFIXES)).start == 0
        assert_exact(llama, examples(0, SUFFIXES))
