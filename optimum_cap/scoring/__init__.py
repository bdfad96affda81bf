"""Causal scores: losses with each unit masked, measured exactly or estimated."""

from optimum_cap.scoring.batch_sizes import tokens_per_chunk
from optimum_cap.scoring.cache import ScoreCache
from optimum_cap.scoring.estimators import ESTIMATORS
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.first_order import examples_per_pass
from optimum_cap.scoring.plain import example_losses, plain_losses
from optimum_cap.scoring.prefix import WORTHWHILE_SHARE
from optimum_cap.scoring.sampling import (
    SampledLosses,
    chances_in_blocks,
    chances_of_drawing,
    draw_blocks,
    draw_examples,
)
from optimum_cap.scoring.score_file import DECISIVE, read_scores, save_scores, tensors_of
from optimum_cap.scoring.scores import CausalScores, UnitLosses, causal_scores
from optimum_cap.scoring.settings import ScoringSettings

__all__ = [
    "DECISIVE",
    "ESTIMATORS",
    "WORTHWHILE_SHARE",
    "CausalScores",
    "SampledLosses",
    "ScoreCache",
    "ScoringSettings",
    "UnitLosses",
    "causal_scores",
    "chances_in_blocks",
    "chances_of_drawing",
    "draw_blocks",
    "draw_examples",
    "exact_losses",
    "example_losses",
    "examples_per_pass",
    "plain_losses",
    "read_scores",
    "save_scores",
    "tensors_of",
    "tokens_per_chunk",
]
