"""Training of tiny pruned models: rows, a Trainer, and what of the zeros is left."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from optimum_cap.training.sparsity import pruned_parameters

IDS = torch.randint(4, 60, (32, 12), generator=torch.Generator().manual_seed(0))


def rows() -> list[dict[str, torch.Tensor]]:
    """Examples for a Trainer."""
    return [{"input_ids": ids, "labels": ids} for ids in IDS]


needs_trainer = pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.3"), reason="Trainer needs accelerate 1.3"
)


def trainer(model: PreTrainedModel, folder: Path, **options: Any) -> Trainer:
    """A Trainer for a few steps on the CPU; keywords of `TrainingArguments`, and `callbacks`.

    Tests that train with it have the mark `needs_trainer`.
    """
    others = {name: options.pop(name) for name in ("callbacks", "eval_dataset") if name in options}
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**{**settings, **options})
    return Trainer(model=model, args=arguments, train_dataset=rows(), **others)


def zero_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Where each pruned weight is zero."""
    return {name: weight.detach() == 0 for name, weight in pruned_parameters(model).items()}


def same_masks(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    """Whether exactly the same weights are zero."""
    return before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
