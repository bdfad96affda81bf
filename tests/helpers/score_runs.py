"""Small scorings, what they leave in a cache, and what they must agree with."""

import hashlib
from pathlib import Path

import torch
from transformers import PreTrainedModel

from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.view import ModelView
from optimum_cap.runtime.distributed import ProcessGroup
from optimum_cap.scoring.cache import ScoreCache
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.plain import plain_losses
from optimum_cap.scoring.scores import UnitLosses
from optimum_cap.scoring.settings import ScoringSettings

BUDGET = 20_000  # makes several batches of several chunks
ONE_STREAM_BUDGET = 10_000  # makes chunks of one stream, which pass all layers but their own whole


def examples(count: int = 6) -> list[CalibrationExample]:
    """Examples of three lengths whose second half is scored."""
    made = []
    for index in range(count):
        ids = torch.arange(12 + 4 * (index % 3)) * (index + 7) % 60 + 4
        scored = torch.arange(len(ids)) >= len(ids) // 2
        made.append(CalibrationExample(ids, scored, "sums", index, f"{index:064x}"))
    return made


def score(model: PreTrainedModel, folder: Path | None, count: int = 6) -> UnitLosses:
    cache = ScoreCache(folder, model) if folder else None
    return exact_losses(
        ModelView.of(model),
        examples(count),
        settings=ScoringSettings(
            memory_budget=BUDGET, cache=cache, process_group=ProcessGroup.current()
        ),
    )


def same_bytes(first: UnitLosses, second: UnitLosses) -> bool:
    return all(
        one.numpy().tobytes() == other.numpy().tobytes()
        for one, other in ((first.intact, second.intact), (first.masked, second.masked))
    )


def chunk_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def digest(losses: UnitLosses) -> str:
    return hashlib.sha256(losses.masked.numpy().tobytes()).hexdigest()


def assert_exact(
    model: PreTrainedModel,
    rows: list[CalibrationExample],
    memory_budget: int | str = "auto",
    mlp_unit_size: int | None = 8,
) -> None:
    sites = find_sites(model, mlp_unit_size)
    exact = exact_losses(
        ModelView(model, sites), rows, settings=ScoringSettings(memory_budget=memory_budget)
    )
    plain = plain_losses(ModelView(model, sites), rows)
    torch.testing.assert_close(exact.masked, plain.masked, rtol=1e-5, atol=0)
    torch.testing.assert_close(exact.intact, plain.intact, rtol=1e-5, atol=0)
    # The agreement means something: masking moves the losses by much more than the tolerance.
    assert (plain.masked - plain.intact).abs().max() > 1e-2
