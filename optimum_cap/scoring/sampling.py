"""First-order losses corrected by exact losses of some examples."""

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
_BY_EFFECTS = 0.25  # part of the chance to be drawn that follows the effects
_ROUNDING = 1e-9  # a probability that is nearer to 1 than this is 1


def control_variate_losses(
    view: ModelView,
    examples: list[CalibrationExample],
    units: list[SiteUnit] | None = None,
    settings: ScoringSettings | None = None,
    *,
    exact_examples: int = 16,
    seed: int = 0,
) -> UnitLosses:
    """Estimate the masked losses to first order, corrected by exact ones of some examples.

    The difference estimator of double sampling (Cochran 1977, Sampling Techniques, chapter 12), per
    example: the first-order loss, plus, where an example was drawn, the exact minus the first-order
    loss over the probability that it is drawn. Over the draw, every masked loss is unbiased, and so
    is every mean of them. The coefficient of the control variate is 1: one that is fitted to the
    same sample would bias the estimate. Examples on which masking has large effects to first order
    are drawn more often (`chances_of_drawing`).

    Args:
        view: As for `first_order_losses`.
        examples: The calibration examples.
        units: As for `first_order_losses`.
        settings: As for `exact_losses`.
        exact_examples: Number of examples with exact losses.
        seed: Seed of the draw.

    Raises:
        ValueError: There are fewer examples than that, or it is below 2.
    """
    _check_exact_examples(exact_examples, len(examples))
    sampled = SampledLosses(first_order_losses(view, examples, units, settings))
    chances = chances_of_drawing(sampled.first_order, exact_examples)
    drawn = draw_examples(chances, start=float(np.random.default_rng(seed).random()))
    rows = [examples[position] for position in drawn]
    exact = exact_losses(view, rows, sampled.units, settings)
    sampled.record(range(len(sampled.units)), drawn, exact.masked, chances)
    return sampled.losses()


def chances_of_drawing(first_order: UnitLosses, count: int) -> torch.Tensor:
    """Probability of each example to be among `count` drawn ones, float64 `[examples]`.

    Three quarters of it are the same for all examples. A quarter is in proportion to what masking
    does to the loss of the example to first order: its share of the sizes of a unit's effects on
    all examples, averaged over the units. The error of an effect tends to be large where the effect
    is. The equal part bounds the weight 1 / chance of an example by 4/3 of that with equal chances,
    whatever the first order does not see (a defensive mixture, Hesterberg 1995, Technometrics 37).
    Where more than 1 would come out, the example is certain and the others share what is left.
    """
    effects = _finite(first_order.masked - first_order.intact).abs().nan_to_num()
    effects = effects[effects.sum(dim=1) > 0]
    sizes = effects.new_full(effects.shape[1:], 1 / effects.shape[1])
    if len(effects):
        shares = (effects / effects.sum(dim=1, keepdim=True)).mean(dim=0)
        sizes = (1 - _BY_EFFECTS) * sizes + _BY_EFFECTS * shares
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    while True:
        left = count - int(certain.sum())
        chances = (left * sizes / sizes[~certain].sum()).where(~certain, 1.0)
        too_large = (chances > 1 - _ROUNDING) & ~certain
        if not too_large.any():
            return chances
        certain |= too_large


def draw_examples(chances: torch.Tensor, start: float) -> list[int]:
    """Draw positions of examples, each with its own chance, as many as the chances add up to.

    Systematic sampling (Madow 1949, Annals of Mathematical Statistics 20): the chances are laid end
    to end, and every example is drawn on whose part one of the points `start`, `start` + 1,
    `start` + 2, ... falls. So each run of consecutive examples, like a subset of the calibration
    set, gets its share.

    Args:
        chances: Probability of each example, `[examples]`, as of `chances_of_drawing`.
        start: A random number, at least 0 and below 1.
    """
    certain, rest = (chances == 1).nonzero()[:, 0], (chances < 1).nonzero()[:, 0]
    ends = chances[rest].cumsum(dim=0)
    count = round(float(chances[rest].sum()))
    points = start + torch.arange(count, dtype=torch.float64)
    # Without the last end, rounding cannot put a point behind it.
    found = rest[torch.searchsorted(ends[:-1], points, right=True)]
    return sorted([*certain.tolist(), *found.tolist()])


def _check_exact_examples(exact_examples: int, examples: int) -> None:
    if exact_examples < 2:
        raise ValueError(
            f"exact_examples is {exact_examples}, but a standard error takes at least 2"
        )
    if exact_examples > examples:
        raise ValueError(
            f"exact_examples is {exact_examples}, but there are only {examples} calibration "
            "examples"
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
    """Estimate as `control_variate_losses`, in rounds, until every importance is known well enough.

    Every round draws one more example from each block, without repetition, and measures the units
    whose interval is still wide. An interval is narrow when 1.96 standard errors of what the draw
    leaves open are at most `precision` times the range of the scores of all units, which is what an
    importance is relative to (Eq. 3). A unit that stays wide to the end is measured exactly.

    Args:
        view: As for `first_order_losses`.
        examples: The calibration examples.
        units: As for `first_order_losses`.
        settings: As for `exact_losses`.
        exact_examples: Number of examples of each round.
        precision: Half the width of the 95 % interval, as a fraction of the range of the scores.
        seed: Seed of the draw.

    Raises:
        ValueError: There are fewer examples than `exact_examples`, or it is below 2.
    """
    blocks = draw_blocks(len(examples), exact_examples, seed)
    sampled = SampledLosses(first_order_losses(view, examples, units, settings))
    wide = list(range(len(sampled.units)))
    # A limit of memory that one round meets holds for the next ones.
    settings = replace(settings or ScoringSettings(), memory_limit=MemoryLimit())
    for turn in range(max(map(len, blocks))):
        drawn = [block[turn] for block in blocks if turn < len(block)]
        rows = [examples[position] for position in drawn]
        still_wide = [sampled.units[index] for index in wide]
        exact = exact_losses(view, rows, still_wide, settings)
        sampled.record(wide, drawn, exact.masked, chances_in_blocks(blocks, turn + 1))
        narrow = sampled.narrow(precision)
        wide = [index for index in wide if not narrow[index]]
        if not wide:
            break
    return sampled.losses()


class SampledLosses:
    """First-order losses of all examples, and exact ones of those drawn so far.

    Attributes:
        units: The units.
        first_order: The first-order losses.
        exact: The exact masked losses, `[units, examples]`, NaN where none is known.
        drawn: Where there is one.
        chances: Probability with which each example has been drawn by now, `[units, examples]`.
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
        """Take in exact losses.

        Args:
            indices: The units, by index.
            positions: The examples.
            masked: Their losses, `[indices, positions]`.
            chances: With which probability each of all examples is drawn by now, `[examples]`.
        """
        where = torch.tensor(indices)[:, None], torch.tensor(positions)
        self.exact[where] = masked
        self.drawn[where] = True
        self.chances[indices] = chances

    def losses(self) -> UnitLosses:
        """Return the estimate, with standard errors for the draw and the choice of the examples."""
        standard_errors = (self._variance_of_examples() + self._variance_of_draw()).sqrt()
        return UnitLosses(self.units, self.first_order.intact, self._estimates(), standard_errors)

    def narrow(self, precision: float) -> torch.Tensor:
        """Whether the draw leaves little of a unit's importance open, bool `[units]`."""
        scores = _finite(self._estimates() - self.first_order.intact).nanmean(dim=1)
        scores = scores[scores.isfinite()]
        allowed = precision * float(scores.max() - scores.min()) if len(scores) else 0.0
        return _WITHIN * self._variance_of_draw().sqrt() <= allowed

    def _estimates(self) -> torch.Tensor:
        """Masked losses, `[units, examples]`; of an example that was certain, what was measured."""
        masked = self.first_order.masked
        corrections = ((self.exact - masked) / self.chances).where(self.drawn, 0)
        return (masked + corrections).where(self.chances < 1, self.exact)

    def _variance_of_examples(self) -> torch.Tensor:
        """Variance of the mean exact effect of a unit over choices of examples, `[units]`."""
        effects = _finite(self.exact - self.first_order.intact)
        return nanvar(effects, 1 / self.chances) / effects.shape[1]

    def _variance_of_draw(self) -> torch.Tensor:
        """Variance over the draw of the mean of a unit's estimate, `[units]`.

        Hájek 1964 (Annals of Mathematical Statistics 35), with the factor of Deville 1999 (Survey
        Methodology 25): it needs the chances of single examples only. That the draw is spread
        evenly over the positions is left out of account, because the examples come in random order.
        With equal chances it is that of drawing n of N without repetition, s^2 (1/n - 1/N). It is 0
        where all that is unknown was certain to be drawn, and NaN where one example alone was not.
        """
        weighted = _finite((self.exact - self.first_order.masked) / self.chances)
        open_share = (1 - self.chances).where(~weighted.isnan(), 0)
        squares = nanvar(weighted, open_share) * open_share.sum(dim=1)
        return squares / self.chances.shape[1] ** 2


def draw_blocks(examples: int, blocks: int, seed: int) -> list[list[int]]:
    """Cut the positions of examples into consecutive blocks, and put each in a random order.

    Raises:
        ValueError: There are fewer examples than blocks, or fewer than 2 blocks.
    """
    _check_exact_examples(blocks, examples)
    random = np.random.default_rng(seed)
    parts = np.array_split(np.arange(examples), blocks)
    return [random.permutation(part).tolist() for part in parts]


def chances_in_blocks(blocks: list[list[int]], turns: int) -> torch.Tensor:
    """Probability that an example is among the first `turns` of its block, `[examples]`.

    The blocks are those of `draw_blocks`, consecutive and in order.
    """
    chances = [min(turns / len(block), 1.0) for block in blocks for _ in block]
    return torch.tensor(chances, dtype=torch.float64)


def _finite(values: torch.Tensor) -> torch.Tensor:
    return values.where(values.isfinite(), torch.nan)
