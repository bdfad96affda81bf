"""Quantizes the weights of a saved checkpoint, and saves them as another one."""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from optimum_cap.checkpoint import atomic_folder, copy_other_files
from optimum_cap.quantization.card import quantized_card
from optimum_cap.quantization.coverage import check_reaches
from optimum_cap.quantization.schemes import get_scheme


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scheme: str,
    auto_class: str = "AutoModelForCausalLM",
    **load_options: Any,
) -> None:
    """Quantize a pruned checkpoint by a package that transformers loads, and save the result.

    The new folder has the tokenizer, the processor and what else lies beside the weights, a config
    that names the package, and a model card. It has no pruning record, which describes other
    weights.

    Args:
        source: Folder of the checkpoint, in any format.
        target: New or empty folder.
        scheme: Name of the scheme, a key of `SCHEMES`.
        auto_class: Class of transformers that loads the model.
        **load_options: Keywords of `from_pretrained`, such as `device_map`.

    Raises:
        ValueError: There is no such scheme, or it leaves most weights of the model as they are.
        ImportError: The package of the scheme is not installed.
        FileExistsError: The target has files already.
        OSError: The target cannot be written.
    """
    source, target = Path(source), Path(target)
    chosen = get_scheme(scheme)
    check_new(target)
    trust = {"trust_remote_code": load_options.get("trust_remote_code", False)}
    config = AutoConfig.from_pretrained(source, **trust)
    check_reaches(chosen, scheme, config, auto_class, **trust)
    model = getattr(transformers, auto_class).from_pretrained(
        source,
        **{"dtype": "auto", **load_options},
        quantization_config=chosen.config(config.dtype or torch.float32),
    )
    card = quantized_card(source, scheme, chosen, auto_class)
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        copy_other_files(source, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def check_new(target: Path) -> None:
    """Check that a folder for a quantized checkpoint does not exist, or is empty.

    Raises:
        FileExistsError: It has files, or is a file.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(
            f"{target}, where the quantized model would be saved, exists already: delete it, or "
            "choose another folder"
        )
