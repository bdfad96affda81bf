"""Mutants of saved checkpoints are refused in one sentence, or read as they were."""

from pathlib import Path

import pytest
from helpers.mutations import CHECKPOINTS, MUTATIONS, Campaign


@pytest.mark.parametrize(
    ("checkpoints", "mutants"),
    [
        (["packed", "coded", "dense", "experts"], 4 * len(MUTATIONS)),
        pytest.param(list(CHECKPOINTS), 20 * len(MUTATIONS), marks=pytest.mark.slow),
        pytest.param(list(CHECKPOINTS), 60 * len(MUTATIONS), marks=pytest.mark.exhaustive),
    ],
)
def test_mutants(checkpoints: list[str], mutants: int, tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, seed=1, checkpoints=checkpoints)
    campaign.run(mutants)
    assert not campaign.faults, "\n".join(campaign.faults)
    outcomes = {outcome for _, _, outcome in campaign.counts}
    assert {"refused by us", "equal"} <= outcomes
