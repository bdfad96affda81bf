"""Causal scores for less: estimates of the masked losses, each with a standard error.

`exact` and `plain` (`attribution.py`) measure every masked loss. `first_order` replaces all of them
by one backward pass. `control_variate` corrects that by exact losses of some examples, and
`adaptive` goes on until the importances are known as well as was asked. See `docs/estimators.md`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from optimum_cap.config import CAPConfig
from optimum_cap.data import CalibrationExample
from optimum_cap.models import ModelView, check_compilable, check_in_memory
from optimum_cap.scoring.cache import ScoreCache
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.first_order import first_order_losses
from optimum_cap.scoring.plain import plain_losses
from optimum_cap.scoring.sampling import adaptive_losses, control_variate_losses
from optimum_cap.scoring.scores import UnitLosses

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Estimator:
    """How masked losses are found.

    Attributes:
        function: Takes a model, its sites, examples, a memory budget and units, and returns the
            losses.
        settings: The fields of `CAPConfig` that its losses depend on, which it takes as keywords.
        resumes: Whether it takes a cache, of finished chunks or of the memory budget alone.
        differentiates: Whether it needs all weights in memory, for a backward pass.
        compiles: Whether it takes `torch_compile`.
    """

    function: Callable[..., UnitLosses]
    settings: tuple[str, ...] = ()
    resumes: bool = True
    differentiates: bool = False
    compiles: bool = False

    def losses(
        self,
        view: ModelView,
        examples: list[CalibrationExample],
        config: CAPConfig,
    ) -> UnitLosses:
        """Measure or estimate the losses of the units that `config` names, as it says."""
        settings: dict[str, Any] = {name: getattr(config, name) for name in self.settings}
        # Before a cache reads all weights.
        if self.differentiates:
            check_in_memory(view.model)
        if self.compiles and config.torch_compile:
            check_compilable(view.model)
            settings["torch_compile"] = True
        if self.resumes and config.resume_dir is not None:
            settings["cache"] = ScoreCache(config.resume_dir, view.model)
        units = view.units(config.scored_units)
        return self.function(view, examples, config.memory_budget, units, **settings)


ESTIMATORS = {
    "exact": Estimator(exact_losses, compiles=True),
    "plain": Estimator(plain_losses, resumes=False),
    "first_order": Estimator(first_order_losses, differentiates=True),
    "control_variate": Estimator(
        control_variate_losses,
        ("exact_examples", "seed"),
        differentiates=True,
        compiles=True,
    ),
    "adaptive": Estimator(
        adaptive_losses,
        ("exact_examples", "precision", "seed"),
        differentiates=True,
        compiles=True,
    ),
}
