"""Routers: tokens of removed experts go to those that are left."""

import pytest
import torch
from helpers.tiny_models import tiny_model

from optimum_cap.models import ModelView, RecordedCall, Router

NONE = torch.zeros(0, dtype=torch.long)


def router_of(architecture: str) -> tuple[Router, torch.Tensor]:
    model = tiny_model(architecture).eval()
    site = next(site for site in ModelView.of(model).sites if site.expert is not None)
    torch.manual_seed(0)
    return Router(model, site.block), torch.randn(1, 50, model.config.hidden_size)


@pytest.mark.parametrize("architecture", ["mixtral", "glm4_moe"])
def test_no_token_goes_to_removed_experts(architecture: str) -> None:
    router, hidden = router_of(architecture)
    with torch.no_grad():
        intact = router.route(RecordedCall(hidden), NONE)
        routed = router.route(RecordedCall(hidden), torch.tensor([0, 2]))
    assert set(intact.chosen.unique().tolist()) == {0, 1, 2, 3}
    assert set(routed.chosen.unique().tolist()) == {1, 3}
    assert routed.weights.isfinite().all()
    # Where neither was chosen, nothing changes.
    same = ((intact.chosen != 0) & (intact.chosen != 2)).all(dim=1)
    assert same.any()
    torch.testing.assert_close(
        routed.weights[same].sort(dim=1).values, intact.weights[same].sort(dim=1).values
    )


def test_router_is_restored() -> None:
    router, hidden = router_of("glm4_moe")  # with a bias that experts are chosen by
    with torch.no_grad():
        before = router.route(RecordedCall(hidden), NONE)
        with router.without(torch.tensor([1])):
            pass
        after = router.route(RecordedCall(hidden), NONE)
    assert torch.equal(before.chosen, after.chosen)
    assert torch.equal(before.weights, after.weights)


def test_unknown_router_is_refused() -> None:
    model = tiny_model("mixtral").eval()
    gate = model.model.layers[0].mlp.gate
    gate.weight = torch.nn.Parameter(torch.zeros(5, 24))
    with pytest.raises(ValueError, match="0 matrices with a row for each of its 4 experts"):
        Router(model, "model.layers.0.mlp.experts")
