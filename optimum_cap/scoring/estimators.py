"""The estimators of the masked losses from which causal scores are computed.

`exact` and `plain` measure every masked loss. `first_order` estimates all of them with one backward
pass. `control_variate` corrects these estimates with exact losses of some examples, and `adaptive`
measures more examples until the importances reach the requested precision. See
`docs/estimators.md`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers.utils import logging

from optimum_cap.config import CAPConfig
from optimum_cap.data import CalibrationExample
from optimum_cap.models import ModelView, check_compilable, check_in_memory
from optimum_cap.runtime import ProcessGroup
from optimum_cap.scoring.cache import ScoreCache
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.first_order import first_order_losses
from optimum_cap.scoring.plain import plain_losses
from optimum_cap.scoring.sampling import adaptive_losses, control_variate_losses
from optimum_cap.scoring.scores import UnitLosses
from optimum_cap.scoring.settings import ScoringSettings

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Estimator:
    """A way to measure or estimate masked losses.

    Attributes:
        function: Takes a model, examples, units and `ScoringSettings`, and returns the losses.
        fields: The fields of `CAPConfig` that its losses depend on; they are passed to `function`
            as keyword arguments.
        resumes: Whether it uses a cache for finished chunks or for the memory budget.
        differentiates: Whether it runs a backward pass, which needs all weights in memory.
        compiles: Whether it can compile the decoder layers.
    """

    function: Callable[..., UnitLosses]
    fields: tuple[str, ...] = ()
    resumes: bool = True
    differentiates: bool = False
    compiles: bool = False

    def losses(
        self,
        view: ModelView,
        examples: list[CalibrationExample],
        config: CAPConfig,
        process_group: ProcessGroup,
    ) -> UnitLosses:
        """Measure or estimate the losses of the units selected by `config`.

        Args:
            view: The model.
            examples: The calibration examples.
            config: Defines the units, the memory budget, the resume folder and the estimator's
                fields.
            process_group: The processes that share the work.
        """
        # Check first, because creating a cache hashes all weights.
        if self.differentiates:
            check_in_memory(view.model, alternative="estimator 'exact'")
        torch_compile = self.compiles and config.torch_compile
        if torch_compile:
            check_compilable(view.model)
        cache = None
        if self.resumes and config.resume_dir is not None:
            cache = ScoreCache(config.resume_dir, view.model)
        settings = ScoringSettings(config.memory_budget, cache, torch_compile, process_group)
        fields = {name: getattr(config, name) for name in self.fields}
        return self.function(view, examples, view.units(config.scored_units), settings, **fields)


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
