"""Calibration data: pairs of prompt and answer, and examples of random tokens."""

import torch

from optimum_cap.data.calibration import CalibrationExample

ROWS = [(f"{a}+{b}=?", f"{a + b}") for a in range(9) for b in range(9)]


def examples(count: int = 7, longest: int = 24, seed: int = 0) -> list[CalibrationExample]:
    """Random examples of different lengths whose second half is scored."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        tokens = int(torch.randint(6, longest, (1,), generator=generator))
        scored = torch.zeros(tokens, dtype=torch.bool)
        scored[tokens // 2 :] = True
        ids = torch.randint(4, 60, (tokens,), generator=generator)
        made.append(CalibrationExample(ids, scored, "random", index, f"{index:064x}"))
    return made
