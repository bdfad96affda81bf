"""Sites and units: masking equals zeroing columns, regions partition the prunable weights."""

import re

import pytest
import torch
from helpers.tiny_models import tiny_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from optimum_cap.models.architectures import find_sites
from optimum_cap.models.hooks import masked_unit
from optimum_cap.models.sites import Site, Unit, prunable_matrices

INPUT = torch.randint(4, 60, (2, 20), generator=torch.Generator().manual_seed(1))

# Parameters of two or more dimensions in decoder layers that belong to no site: routers, and what
# mixes the hidden states of a token in Gemma 3n.
BESIDE_THE_SITES = r"\.gate\.weight$|\.altup\."


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT).logits


def _mixing_columns(model: PreTrainedModel, site: Site, unit: Unit) -> torch.Tensor:
    """The columns of the output projection for the unit, found without `WeightSlice`."""
    start, stop = unit.channels
    holder = model.get_submodule(site.projection.rpartition(".")[0])
    projection = getattr(holder, site.projection.rpartition(".")[2])
    if site.expert is not None:  # experts: [experts, hidden, channels]
        return projection.data[site.expert][:, start:stop]
    if type(projection).__name__ == "Conv1D":  # stored [in, out]
        return projection.weight.data[start:stop]
    return projection.weight.data[:, start:stop]


def test_masking_equals_zeroing_columns(model: PreTrainedModel) -> None:
    for site in find_sites(model, mlp_unit_size=8):
        for unit in (site.units[0], site.units[-1]):
            intact = logits(model)
            with masked_unit(model, site, unit):
                masked = logits(model)
            columns = _mixing_columns(model, site, unit)
            saved = columns.clone()
            columns.zero_()
            expected = logits(model)
            columns.copy_(saved)
            torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-6)
            assert not torch.equal(masked, intact), f"{site.name} unit {unit.index} had no effect"
            assert torch.equal(logits(model), intact), "the mask left a trace"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_masking_a_whole_expert_equals_routing_no_weight_to_it(name: str) -> None:
    model = tiny_model(name)
    site = next(site for site in find_sites(model) if site.kind == "expert" and site.expert == 2)
    experts = model.get_submodule(site.block)

    def without_expert(module: nn.Module, args: tuple) -> tuple:
        hidden, index, weights = args
        return hidden, index, weights.masked_fill(index == site.expert, 0)

    handle = experts.register_forward_pre_hook(without_expert)
    expected = logits(model)
    handle.remove()
    with masked_unit(model, site, site.units[0]):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_a_head_of_the_projection_input_is_a_head_of_the_attention(architecture: str) -> None:
    """Independent of the projection: zeroing a head's value rows silences just its channels."""
    if architecture in ("gpt2", "gpt_neox", "phi3"):
        pytest.skip("values are fused with queries and keys; the region test below covers them")
    model = tiny_model(architecture, num_key_value_heads=None if architecture == "opt" else 4)
    site = next(site for site in find_sites(model) if site.kind == "attention")
    block = model.get_submodule(site.block)
    unit = site.units[2]
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(site.projection).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    rows = next(b for b in unit.region if b.parameter.endswith("v_proj.weight"))
    with torch.no_grad():
        rows.of(block.v_proj.weight).zero_()
        if block.v_proj.bias is not None:
            block.v_proj.bias[rows.start : rows.stop] = 0
    logits(model)
    handle.remove()
    silent = (seen[0] == 0).all(dim=(0, 1))
    assert silent.nonzero().flatten().tolist() == list(range(*unit.channels))


def test_regions_cover_exactly_the_prunable_weights(model: PreTrainedModel) -> None:
    sites = find_sites(model, mlp_unit_size=8)
    covered = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for site in sites:
        for unit in site.units:
            for piece in unit.region:
                piece.of(covered[piece.parameter]).add_(1)

    decoder = model.get_decoder()
    inside = {
        id(parameter)
        for layers in (getattr(decoder, "layers", None) or decoder.h,)
        for parameter in layers.parameters()
    }
    for name, parameter in model.named_parameters():
        matrix_of_a_layer = id(parameter) in inside and parameter.ndim >= 2
        prunable = matrix_of_a_layer and not re.search(BESIDE_THE_SITES, name)
        assert covered[name].bool().all() == prunable, name
        assert covered[name].bool().any() == prunable, name
    assert {m.parameter for m in prunable_matrices(sites)} == {
        name for name, count in covered.items() if count.any()
    }


def test_only_key_and_value_rows_are_shared(model: PreTrainedModel) -> None:
    covered = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for site in find_sites(model, mlp_unit_size=8):
        for unit in site.units:
            for piece in unit.region:
                piece.of(covered[piece.parameter]).add_(1)
    shared = {name.rpartition(".weight")[0] for name, count in covered.items() if count.max() > 1}
    assert {name.rpartition(".")[2] for name in shared} <= {"k_proj", "v_proj", "qkv_proj"}


def test_units_cover_the_channels_in_order(model: PreTrainedModel) -> None:
    for site in find_sites(model, mlp_unit_size=7):
        ends = [channel for unit in site.units for channel in unit.channels]
        assert ends[0] == 0
        assert ends[-1] == site.width
        assert ends[1:-1:2] == ends[2::2]


def test_encoder_is_refused() -> None:
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(ValueError, match="BertForMaskedLM is not a decoder-only causal language"):
        find_sites(BertForMaskedLM(config))


def test_model_without_language_head_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="load the model with AutoModelForCausalLM"):
        find_sites(llama.model)
