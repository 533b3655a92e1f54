"""Round up or down at random, right on average: keeps the delta in expectation, adds noise (arXiv 1502.02551)."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from qmerge.grids import UP, Grid
from qmerge.rounding.base import Rounding, RoundingContext

NUMBERS_PER_STEP = 4
"""64-bit numbers that one step of Philox's counter gives."""


class Stochastic(Rounding):
    """The level above with probability (value − below) / (above − below), else the level below."""

    def choose(self, values_OI: Tensor, grid: Grid, context: RoundingContext) -> Tensor:
        below_OI = grid.floor(values_OI, context.base_codes_OI)
        above_OI = grid.step(below_OI, UP)
        low_OI = grid.decode(below_OI)
        gap_OI = grid.decode(above_OI) - low_OI
        # The highest level has no level above: its gap is 0, and it stays.
        probability_OI = torch.where(gap_OI > 0, (values_OI - low_OI) / gap_OI, torch.zeros_like(gap_OI))
        draws_OI = uniform(values_OI, seed=context.seed, name=context.name, start_row=context.rows.start)
        return torch.where(draws_OI < probability_OI, above_OI, below_OI)


ROUNDING = Stochastic()


def uniform(like_OI: Tensor, *, seed: int, name: str, start_row: int) -> Tensor:
    """float32 [O, I] in [0, 1), of the shape and on the device of ``like_OI``.

    A function of seed, name and the position of the entry alone, whatever the device, the order of the work or the grouping of
    rows: Philox (Salmon et al. 2011) can start anywhere in its sequence.

    Args:
        seed: of the run.
        name: of the weight, or of a purpose and a weight: each name has its own sequence.
        start_row: position of the first row in the weight.
    """
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(key[:16], "little"))
    first = start_row * like_OI.shape[1]
    generator.advance(first // NUMBERS_PER_STEP)
    # The first row may begin in the middle of a step of the generator.
    skip = first % NUMBERS_PER_STEP
    numbers = np.random.Generator(generator).random(skip + like_OI.numel())[skip:]
    # Rounding a double just below 1 to float32 may give 1. A value then rounds down, as it does for the double: harmless.
    return torch.from_numpy(numbers.astype(np.float32)).view(like_OI.shape).to(like_OI.device)
