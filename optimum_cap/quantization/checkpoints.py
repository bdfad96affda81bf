"""Quantization of a saved checkpoint into a new one."""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from optimum_cap.checkpoint import atomic_folder, copy_other_files
from optimum_cap.config import CAPConfig
from optimum_cap.data import load_tokenizer_of
from optimum_cap.models import sees_images
from optimum_cap.quantization.card import quantized_card
from optimum_cap.quantization.coverage import check_reaches
from optimum_cap.quantization.packing import replace_weights
from optimum_cap.quantization.rounding import round_model_
from optimum_cap.quantization.schemes import SCHEMES, get_scheme


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scheme: str,
    auto_class: str = "AutoModelForCausalLM",
    calibration: CAPConfig | None = None,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    **load_options: Any,
) -> None:
    """Quantize a pruned checkpoint with a package that transformers supports, and save the result.

    The new folder contains the tokenizer, the processor and the other files next to the weights, a
    config that names the package, and a model card. It contains no pruning record, because that
    describes other weights.

    Args:
        source: Folder of the checkpoint, in any format.
        target: New or empty folder.
        scheme: Name of the scheme, a key of `SCHEMES`.
        auto_class: Auto class of transformers that loads the model.
        calibration: For `int4`, the config whose calibration data is used, such as the one the
            model was pruned with.
        tokenizer: For `int4`, the tokenizer or processor; `None` loads it from `source`.
        max_shard_size: Largest weight file, before packing.
        **load_options: Arguments of `from_pretrained`, such as `device_map`.

    Raises:
        ValueError: The scheme is unknown, leaves most weights of the model unquantized, or cannot
            be calibrated, or the model card cannot be read.
        ImportError: The package of the scheme is not installed.
        FileExistsError: The target already contains files.
        OSError: The target cannot be written.
    """
    source, target = Path(source), Path(target)
    chosen = get_scheme(scheme)
    check_new(target)
    trust = {"trust_remote_code": load_options.get("trust_remote_code", False)}
    config = AutoConfig.from_pretrained(source, **trust)
    check_reaches(chosen, scheme, config, auto_class, **trust)
    card = quantized_card(source, scheme, chosen, auto_class)
    load = getattr(transformers, auto_class).from_pretrained
    options = {"dtype": "auto", **load_options}
    rounded = {}
    if chosen.config is None:
        check_calibration(scheme, calibration)
        assert calibration is not None
        model = load(source, **options)
        if tokenizer is None:
            tokenizer = load_tokenizer_of(str(source), sees_images(type(model).__name__))
        rounded = round_model_(model, tokenizer, calibration)
    else:
        quantization = chosen.config(config.dtype or torch.float32)
        model = load(source, **options, quantization_config=quantization)
    with atomic_folder(target) as folder:
        # Not the instance's method, which writes sparse checkpoints.
        type(model).save_pretrained(model, folder, max_shard_size=max_shard_size)
        if rounded:
            replace_weights(folder, model, rounded)
        copy_other_files(source, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def check_calibration(scheme: str, calibration: CAPConfig | None) -> None:
    """Check that a scheme that needs calibration has data, and that the data has answers.

    Raises:
        ValueError: Data or answers are missing.
    """
    if SCHEMES[scheme].config is not None:
        return
    if calibration is None or not calibration.method.needs_data:
        raise ValueError(
            f"quantization scheme {scheme!r} is calibrated on the data that the model is pruned "
            "with, but this recipe takes none: choose a recipe with data, such as 'causal', or "
            "another scheme"
        )
    if calibration.answers == "model":
        raise ValueError(
            f"quantization scheme {scheme!r} cannot be calibrated on answers of the model: write "
            "them to a file with `cap generate`, and prune with that file as the data set"
        )


def check_new(target: Path) -> None:
    """Check that a folder for a quantized checkpoint does not exist, or is empty.

    Raises:
        FileExistsError: It contains files, or is a file.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(
            f"{target}, where the quantized model would be saved, exists already: delete it, or "
            "choose another folder"
        )
