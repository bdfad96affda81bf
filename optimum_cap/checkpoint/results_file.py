"""The results file of a checkpoint, valid only for the weights that were measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from optimum_cap.checkpoint.digests import RESULTS_NAME
from optimum_cap.checkpoint.model_card import CARD_NAME, results_in, with_results
from optimum_cap.checkpoint.reading import read_json
from optimum_cap.runtime import digest_of, write_atomically

logger = logging.get_logger(__name__)

_LAYOUT = 1


def weights_digest(digests: Mapping[str, Any]) -> str:
    """Return a digest of the weight files of a checkpoint.

    Args:
        digests: The files in its record, with their digests.
    """
    weights = {name: file["sha256"] for name, file in digests.items() if "checksum" in file}
    return digest_of("weights", sorted(weights.items()))


def read_results(folder: Path, digests: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of the weights in a folder, by task; empty if they are of other weights.

    Args:
        folder: The checkpoint.
        digests: The files in its record, with their digests.

    Raises:
        ValueError: The file is damaged, or has a newer layout.
    """
    file = folder / RESULTS_NAME
    if not file.is_file():
        return {}
    values = read_json(file)
    if values.get("layout") != _LAYOUT or not isinstance(values.get("tasks"), dict):
        raise ValueError(
            f"{file} cannot be read (layout {values.get('layout')!r:.80}, expected {_LAYOUT}): "
            "upgrade optimum-cap, or delete the file and measure again"
        )
    return dict(values["tasks"]) if values.get("weights") == weights_digest(digests) else {}


def write_results(folder: Path, digests: Mapping[str, Any], tasks: Mapping[str, Any]) -> None:
    """Write the results of the weights in a folder.

    Args:
        folder: The checkpoint.
        digests: The files in its record, with their digests.
        tasks: JSON values by task.
    """
    values = {"layout": _LAYOUT, "weights": weights_digest(digests), "tasks": tasks}
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / RESULTS_NAME, text.encode())


def carry_results(
    source: Path, old: Mapping[str, Any], target: Path, new: Mapping[str, Any]
) -> None:
    """Copy the results of a checkpoint to a version with the same weights in another format.

    An unreadable file is skipped with a warning, because it must not fail a conversion.

    Args:
        source: The checkpoint.
        old: The files in its record, with their digests.
        target: The new checkpoint, with a new card.
        new: The files in the new record, with their digests.
    """
    (target / RESULTS_NAME).unlink(missing_ok=True)  # it refers to other files
    try:
        if not (tasks := read_results(source, old)):
            return
        write_results(target, new, tasks)
        found = results_in((source / CARD_NAME).read_text(encoding="utf-8"))
        if found is not None:
            card = target / CARD_NAME
            text = with_results(card.read_text(encoding="utf-8"), *found)
            card.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        logger.warning(f"the results were not taken over: {error}")
