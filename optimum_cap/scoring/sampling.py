"""First-order losses corrected by exact losses of a sample of the examples."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from optimum_cap.data import CalibrationExample
from optimum_cap.models import ModelView, SiteUnit
from optimum_cap.runtime import MemoryLimit
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.first_order import first_order_losses
from optimum_cap.scoring.scores import UnitLosses, nanvar
from optimum_cap.scoring.settings import ScoringSettings

_WITHIN = 1.96  # standard errors on either side of a 95 % interval
_BY_EFFECTS = 0.25  # part of an example's probability that is proportional to its effects
_ROUNDING = 1e-9  # probabilities closer to 1 than this count as 1


def control_variate_losses(
    view: ModelView,
    examples: list[CalibrationExample],
    units: list[SiteUnit] | None = None,
    settings: ScoringSettings | None = None,
    *,
    exact_examples: int = 16,
    seed: int = 0,
) -> UnitLosses:
    """Estimate the masked losses to first order, corrected by exact losses of some examples.

    This is the difference estimator of double sampling (Cochran 1977, Sampling Techniques, chapter
    12). The estimate for an example is its first-order loss; if the example was drawn, the exact
    minus the first-order loss is added, divided by the probability of drawing it. Over the draw,
    every masked loss is unbiased, and so is every mean of them. The coefficient of the control
    variate is 1, because a coefficient fitted to the same sample would bias the estimate. Examples
    on which masking has large first-order effects are drawn more often (`chances_of_drawing`).

    Args:
        view: As for `first_order_losses`.
        examples: The calibration examples.
        units: As for `first_order_losses`.
        settings: As for `exact_losses`.
        exact_examples: Number of examples with exact losses.
        seed: Seed of the draw.

    Raises:
        ValueError: `exact_examples` is below 2, or there are fewer examples.
    """
    _check_exact_examples(exact_examples, len(examples))
    sampled = SampledLosses(first_order_losses(view, examples, units, settings))
    chances = chances_of_drawing(sampled.first_order, exact_examples)
    drawn = draw_examples(chances, start=float(np.random.default_rng(seed).random()))
    drawn_examples = [examples[position] for position in drawn]
    exact = exact_losses(view, drawn_examples, sampled.units, settings)
    sampled.record(range(len(sampled.units)), drawn, exact.masked, chances)
    return sampled.losses()


def chances_of_drawing(first_order: UnitLosses, count: int) -> torch.Tensor:
    """Return the probability that each example is among `count` drawn ones, float64 `[examples]`.

    Three quarters of the probability are the same for all examples. One quarter is proportional to
    the first-order effects of masking on the example: its share of a unit's absolute effects on all
    examples, averaged over the units. Large effects tend to have large errors. The equal part
    limits the weight 1 / probability of an example to 4/3 of the weight under equal probabilities,
    however wrong the first-order effects are (a defensive mixture, Hesterberg 1995, Technometrics
    37). An example whose probability would exceed 1 is certain to be drawn; the others share the
    rest.
    """
    effects = _finite(first_order.masked - first_order.intact).abs().nan_to_num()
    effects = effects[effects.sum(dim=1) > 0]
    sizes = effects.new_full(effects.shape[1:], 1 / effects.shape[1])
    if len(effects):
        shares = (effects / effects.sum(dim=1, keepdim=True)).mean(dim=0)
        sizes = (1 - _BY_EFFECTS) * sizes + _BY_EFFECTS * shares
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    while True:
        remaining = count - int(certain.sum())
        chances = (remaining * sizes / sizes[~certain].sum()).where(~certain, 1.0)
        too_large = (chances > 1 - _ROUNDING) & ~certain
        if not too_large.any():
            return chances
        certain |= too_large


def draw_examples(chances: torch.Tensor, start: float) -> list[int]:
    """Draw positions of examples with given probabilities, whose sum is the number drawn.

    Systematic sampling (Madow 1949, Annals of Mathematical Statistics 20): the probabilities are
    intervals laid end to end, and an example is drawn if one of the points `start`, `start` + 1,
    `start` + 2, ... falls into its interval. Each run of consecutive examples, such as a subset of
    the calibration set, therefore gets its share.

    Args:
        chances: Probability of each example, `[examples]`, as from `chances_of_drawing`.
        start: A random number, at least 0 and below 1.
    """
    certain, rest = (chances == 1).nonzero()[:, 0], (chances < 1).nonzero()[:, 0]
    ends = chances[rest].cumsum(dim=0)
    count = round(float(chances[rest].sum()))
    points = start + torch.arange(count, dtype=torch.float64)
    # Omit the last end, so that rounding cannot place a point beyond it.
    drawn = rest[torch.searchsorted(ends[:-1], points, right=True)]
    return sorted([*certain.tolist(), *drawn.tolist()])


def _check_exact_examples(exact_examples: int, examples: int) -> None:
    if exact_examples < 2:
        raise ValueError(
            f"exact_examples is {exact_examples}, but a standard error takes at least 2 examples: "
            "raise exact_examples"
        )
    if exact_examples > examples:
        raise ValueError(
            f"exact_examples is {exact_examples}, but there are only {examples} calibration "
            "examples: lower exact_examples, or add examples"
        )


def adaptive_losses(
    view: ModelView,
    examples: list[CalibrationExample],
    units: list[SiteUnit] | None = None,
    settings: ScoringSettings | None = None,
    *,
    exact_examples: int = 16,
    precision: float = 0.1,
    seed: int = 0,
) -> UnitLosses:
    """Estimate masked losses in rounds, until every importance reaches the requested precision.

    The estimate is that of `control_variate_losses`. Each round draws one more example from each
    block, without replacement, and measures the units whose interval is still wide. An interval is
    narrow when 1.96 standard errors over the draw are at most `precision` times the range of the
    scores of all units, to which importances are relative (Eq. 3). Units whose interval is still
    wide after the last round have been measured exactly.

    Args:
        view: As for `first_order_losses`.
        examples: The calibration examples.
        units: As for `first_order_losses`.
        settings: As for `exact_losses`.
        exact_examples: Number of examples of each round.
        precision: Half the width of the 95 % interval, as a fraction of the range of the scores.
        seed: Seed of the draw.

    Raises:
        ValueError: `exact_examples` is below 2, or there are fewer examples.
    """
    blocks = draw_blocks(len(examples), exact_examples, seed)
    sampled = SampledLosses(first_order_losses(view, examples, units, settings))
    wide = list(range(len(sampled.units)))
    # A memory limit found in one round applies to the next ones.
    settings = replace(settings or ScoringSettings(), memory_limit=MemoryLimit())
    for turn in range(max(map(len, blocks))):
        drawn = [block[turn] for block in blocks if turn < len(block)]
        drawn_examples = [examples[position] for position in drawn]
        still_wide = [sampled.units[index] for index in wide]
        exact = exact_losses(view, drawn_examples, still_wide, settings)
        sampled.record(wide, drawn, exact.masked, chances_in_blocks(blocks, turn + 1))
        narrow = sampled.narrow(precision)
        wide = [index for index in wide if not narrow[index]]
        if not wide:
            break
    return sampled.losses()


class SampledLosses:
    """First-order losses of all examples, and exact losses of the examples drawn so far.

    Attributes:
        units: The units.
        first_order: The first-order losses.
        exact: The exact masked losses, `[units, examples]`; NaN where not measured.
        drawn: Whether the example was drawn for the unit, bool `[units, examples]`.
        chances: Probability that the example has been drawn so far, `[units, examples]`.
    """

    def __init__(self, first_order: UnitLosses) -> None:
        self.units = first_order.units
        self.first_order = first_order
        self.exact = torch.full_like(first_order.masked, torch.nan)
        self.drawn = torch.zeros_like(first_order.masked, dtype=torch.bool)
        self.chances = torch.zeros_like(first_order.masked)

    def record(
        self,
        indices: Sequence[int],
        positions: Sequence[int],
        masked: torch.Tensor,
        chances: torch.Tensor,
    ) -> None:
        """Record exact losses.

        Args:
            indices: Indices of the units.
            positions: Positions of the examples.
            masked: Their losses, `[indices, positions]`.
            chances: Probability that each of all examples has been drawn so far, `[examples]`.
        """
        where = torch.tensor(indices)[:, None], torch.tensor(positions)
        self.exact[where] = masked
        self.drawn[where] = True
        self.chances[indices] = chances

    def losses(self) -> UnitLosses:
        """Return the estimates, with standard errors over the draw and the choice of examples."""
        standard_errors = (self._variance_of_examples() + self._variance_of_draw()).sqrt()
        return UnitLosses(self.units, self.first_order.intact, self._estimates(), standard_errors)

    def narrow(self, precision: float) -> torch.Tensor:
        """Return which units have reached this precision of their importance, bool `[units]`."""
        scores = _finite(self._estimates() - self.first_order.intact).nanmean(dim=1)
        scores = scores[scores.isfinite()]
        allowed = precision * float(scores.max() - scores.min()) if len(scores) else 0.0
        return _WITHIN * self._variance_of_draw().sqrt() <= allowed

    def _estimates(self) -> torch.Tensor:
        """Return the masked losses, `[units, examples]`; the exact ones where chances are 1."""
        masked = self.first_order.masked
        corrections = ((self.exact - masked) / self.chances).where(self.drawn, 0)
        return (masked + corrections).where(self.chances < 1, self.exact)

    def _variance_of_examples(self) -> torch.Tensor:
        """Return the variance of each unit's mean effect over choices of examples, `[units]`."""
        effects = _finite(self.exact - self.first_order.intact)
        return nanvar(effects, 1 / self.chances) / effects.shape[1]

    def _variance_of_draw(self) -> torch.Tensor:
        """Return the variance over the draw of the mean of each unit's estimates, `[units]`.

        The estimator is that of Hájek 1964 (Annals of Mathematical Statistics 35) with the factor
        of Deville 1999 (Survey Methodology 25), which needs only the probabilities of single
        examples. It ignores that the draw is spread evenly over the positions, because the examples
        come in random order. With equal probabilities it is the variance of drawing n of N without
        replacement, s^2 (1/n - 1/N). It is 0 where all drawn examples were certain to be drawn, and
        NaN where exactly one was not.
        """
        weighted = _finite((self.exact - self.first_order.masked) / self.chances)
        open_share = (1 - self.chances).where(~weighted.isnan(), 0)
        squares = nanvar(weighted, open_share) * open_share.sum(dim=1)
        return squares / self.chances.shape[1] ** 2


def draw_blocks(examples: int, blocks: int, seed: int) -> list[list[int]]:
    """Cut the positions of examples into consecutive blocks, and shuffle each block.

    Raises:
        ValueError: There are fewer than 2 blocks, or fewer examples than blocks.
    """
    _check_exact_examples(blocks, examples)
    random = np.random.default_rng(seed)
    parts = np.array_split(np.arange(examples), blocks)
    return [random.permutation(part).tolist() for part in parts]


def chances_in_blocks(blocks: list[list[int]], turns: int) -> torch.Tensor:
    """Return the probability that an example is among the first `turns` of its block.

    Args:
        blocks: The blocks, as from `draw_blocks`.
        turns: Number of examples drawn from each block.

    Returns:
        float64 `[examples]`.
    """
    chances = [min(turns / len(block), 1.0) for block in blocks for _ in block]
    return torch.tensor(chances, dtype=torch.float64)


def _finite(values: torch.Tensor) -> torch.Tensor:
    return values.where(values.isfinite(), torch.nan)
