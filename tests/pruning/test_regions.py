"""Importances of heads and weights (paper, Eq. 3-4)."""

import pytest
import torch
from helpers.tiny_models import tiny_model

from optimum_cap.methods.criteria import CriterionInputs, magnitude_times_importance
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.sites import Matrix
from optimum_cap.pruning.regions import region_importances, scaled_importances, unit_importances


def test_scores_map_linearly_to_one_to_ten() -> None:
    importances = scaled_importances(torch.tensor([-0.5, 0.0, 1.5, 0.5]))
    assert importances.tolist() == pytest.approx([1.0, 3.25, 10.0, 5.5])


def test_equal_scores_give_one() -> None:
    assert scaled_importances(torch.full((3,), 0.7)).tolist() == [1.0, 1.0, 1.0]


def test_a_head_that_breaks_the_model_is_needed_most() -> None:
    assert scaled_importances(torch.tensor([0.0, float("nan"), 1.0])).tolist() == [1.0, 10.0, 10.0]
    assert scaled_importances(torch.tensor([2.0, float("nan")])).tolist() == [1.0, 10.0]


def test_region_importances_of_grouped_query_attention() -> None:
    model = tiny_model("llama")  # 4 query heads of 8 channels share 2 key/value heads
    sites = find_sites(model)
    heads = {
        (site.name, unit.index): float(10 * site.layer + unit.index)
        for site in sites
        if site.kind == "attention"
        for unit in site.units
    }
    importances = unit_importances(sites, heads)
    path = "model.layers.1.{}.weight"
    mean = region_importances(sites, importances, "mean")
    largest = region_importances(sites, importances, "max")
    by_head = torch.arange(10.0, 14.0).repeat_interleave(8)
    assert torch.equal(mean[Matrix(path.format("self_attn.q_proj"))], by_head[:, None])
    assert torch.equal(mean[Matrix(path.format("self_attn.o_proj"))], by_head[None, :])
    for name in ("self_attn.k_proj", "self_attn.v_proj"):
        rows = mean[Matrix(path.format(name))]
        assert torch.equal(rows, torch.tensor([10.5, 12.5]).repeat_interleave(8)[:, None])
        rows = largest[Matrix(path.format(name))]
        assert torch.equal(rows, torch.tensor([11.0, 13.0]).repeat_interleave(8)[:, None])
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert mean[Matrix(path.format(name))].unique().tolist() == [11.5]


def test_importances_broadcast_against_every_matrix(architecture: str) -> None:
    model = tiny_model(architecture)
    sites = find_sites(model, mlp_unit_size=8)
    heads = {
        (site.name, unit.index): 1.0
        for site in sites
        if site.kind == "attention"
        for unit in site.units
    }
    for matrix, importance in region_importances(sites, unit_importances(sites, heads)).items():
        weight = matrix.of(model.get_parameter(matrix.parameter))
        before = weight.detach().clone()
        product = magnitude_times_importance(weight, CriterionInputs("", regions=importance))
        assert product.dtype == torch.float32
        torch.testing.assert_close(product, before.abs())
        assert torch.equal(weight, before)
