"""Examples that begin with the same tokens."""

import torch

from optimum_cap.data.calibration import CalibrationExample


def example(ids: torch.Tensor, first_scored: int) -> CalibrationExample:
    scored = torch.zeros(len(ids), dtype=torch.bool)
    scored[first_scored:] = True
    return CalibrationExample(ids, scored, "random", 0, "")


def examples(
    prefix: int = 12, suffixes: tuple[int, ...] = (9, 4, 2, 7, 5), seed: int = 0
) -> list[CalibrationExample]:
    """Examples that share a prefix and then differ at once; the last half of the rest is scored."""
    generator = torch.Generator().manual_seed(seed)
    begin = torch.randint(4, 60, (prefix,), generator=generator)
    made = []
    for index, suffix in enumerate(suffixes):
        own = torch.randint(4, 60, (suffix - 1,), generator=generator)
        ids = torch.cat([begin, torch.tensor([4 + index]), own])
        made.append(example(ids, prefix + suffix // 2))
    return made
