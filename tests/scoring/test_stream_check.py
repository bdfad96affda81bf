"""Masked streams in which nothing is masked have the losses of the model, or whole passes run."""

from typing import Any

import pytest
import torch
from helpers.score_runs import examples
from helpers.tiny_models import SHARED_EXPERTS, tiny_model
from torch import nn
from transformers import PreTrainedModel

from optimum_cap.models.view import ModelView
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.plain import plain_losses
from optimum_cap.scoring.stream_check import check_streams


def check(model: PreTrainedModel, prefix: int = 0) -> None:
    with torch.no_grad():
        assert check_streams(ModelView.of(model).with_sites(set()), examples(), prefix)


def test_every_architecture_passes(model: PreTrainedModel) -> None:
    check(model)


@pytest.mark.parametrize("name", SHARED_EXPERTS)
def test_shared_experts_pass(name: str) -> None:
    check(tiny_model(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes(dtype: torch.dtype) -> None:
    check(tiny_model("llama", dtype=dtype))


def test_a_layer_that_depends_on_more_than_its_arguments_runs_in_whole_passes(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def shift(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append(1)
        return output + 0.1 * len(calls)

    llama.model.layers[1].mlp.register_forward_hook(shift)
    exact_losses(ModelView.of(llama), examples(2))
    assert "nats per token instead of" in caplog.text
    assert "(estimator 'plain')" in caplog.text


def test_a_model_whose_logits_depend_on_other_tokens_runs_in_whole_passes(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    def centred(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output - 0.9 * output.mean(dim=1, keepdim=True)

    llama.model.norm.register_forward_hook(centred)
    found = exact_losses(ModelView.of(llama), examples(2))
    expected = plain_losses(ModelView.of(llama), examples(2))
    assert torch.equal(found.masked, expected.masked)
    assert "computes something else when its layers run one at a time" in caplog.text
