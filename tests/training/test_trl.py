"""The trainers of TRL keep the zeros of a pruned model. Needs `trl`."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from helpers.checkpoints import pruned
from helpers.tiny_models import tiny_tokenizer
from helpers.training import same_masks, zero_masks

from optimum_cap.training import KeepSparsity, SparseLoraConfig, merge_and_keep_sparsity

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

TEXTS = ["one two three", "four five six", "seven eight nine", "ten one two"]


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
    }


@pytest.mark.parametrize("lora", [False, True])
def test_sft(lora: bool, tmp_path: Path) -> None:
    model = pruned()
    before = zero_masks(model)
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tiny_tokenizer(),
        peft_config=SparseLoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if lora else None,
        callbacks=[] if lora else [KeepSparsity()],
    )
    trainer.train()
    if lora:
        model, lost = merge_and_keep_sparsity(trainer.model)
        assert lost == 0
    assert same_masks(before, zero_masks(model))


def test_dpo(tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path / "pruned")  # from where the trainer loads the reference
    before = zero_masks(model)
    rows = {"prompt": TEXTS, "chosen": TEXTS[::-1], "rejected": TEXTS}
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny_tokenizer(),
        callbacks=[KeepSparsity()],
    )
    trainer.train()
    assert same_masks(before, zero_masks(model))
