"""Small prunings, and what they leave."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from helpers.calibration import ROWS
from helpers.tiny_models import tiny_tokenizer
from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.config import effective

FIELDS: dict[str, Any] = {"sparsity": 0.5, "dataset": ROWS, "num_samples": 8, "subsets": 2}


def config(**changes: Any) -> CAPConfig:
    """Settings of a small pruning by the paper's recipe."""
    values = {"sparsity": 0.3, "recipe": "paper", "dataset": ROWS, "num_samples": 12}
    return CAPConfig(**effective(values, changes))


def pruned(model: PreTrainedModel, folder: Path | None, **fields: Any) -> PreTrainedModel:
    config = CAPConfig(**effective({**FIELDS, "resume_dir": folder}, fields))
    return CAPPruner(config).prune(model, tiny_tokenizer())


def weights(model: PreTrainedModel) -> list[bytes]:
    return [tensor.view(torch.uint8).numpy().tobytes() for tensor in model.state_dict().values()]


def layer_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/layers/*/*.safetensors"))
