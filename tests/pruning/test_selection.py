"""What stays dense is said: in the log, the record, `cap inspect` and the model card."""

import logging
from pathlib import Path

import pytest
from helpers.pruning_runs import config
from helpers.tiny_models import tiny_model, tiny_tokenizer

from optimum_cap import CAPPruner
from optimum_cap.checkpoint import PruningRecord, inspect_checkpoint
from optimum_cap.commands.summary import summary_rows


def test_unsupported_weights_are_said_everywhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("gemma3n")
    settings = config(recipe="magnitude", modules_to_leave_dense=["k_proj"])
    CAPPruner(settings).prune(model, tiny_tokenizer())
    record = model.pruning_record
    names = [weights.name for weights in record.unsupported]
    assert {"altup.prediction_coefs", "per_layer_model_projection"} <= set(names)
    assert [weights.name for weights in record.dense if weights.prunable] == ["self_attn.k_proj"]
    everything = sum(
        parameter.numel()
        for name, parameter in model.model.named_parameters()
        if parameter.ndim > 1 and "embed_tokens" not in name and "router" not in name
    )
    share = sum(weights.weights for weights in record.unsupported) / everything
    assert record.share_of(record.unsupported) == pytest.approx(share)
    assert PruningRecord.from_dict(record.to_dict()) == record

    [warning] = [each for each in caplog.records if "stay dense" in each.message]
    assert warning.levelno == logging.WARNING
    assert f"{share:.1%} of the linear weights" in warning.message
    assert all(name in warning.message for name in names)

    model.save_pretrained(tmp_path)
    rows = dict(summary_rows(inspect_checkpoint(tmp_path)))
    assert rows["unsupported"].startswith(f"{share:.1%} of the linear weights: ")
    assert "self_attn.k_proj" in rows["left dense"]
    card = (tmp_path / "README.md").read_text()
    assert f"| Not supported, left dense | {share:.1%} of the decoder's linear weights" in card


def test_a_model_without_unsupported_weights_is_not_bothered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("llama")
    CAPPruner(config(recipe="magnitude")).prune(model, tiny_tokenizer())
    assert model.pruning_record.dense == []
    assert "stay dense" not in caplog.text
