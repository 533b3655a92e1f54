"""A grid: the values that a format can hold, one by one for every entry of a weight.

Every rounding works on every format through these few operations. Codes are whatever tensor the format finds handy
(NF4: uint8 0 … 15 in the order of the levels; int8: int8; bf16: the bf16 numbers themselves): a rounding never looks
inside, it asks the grid for the nearest code, the next level up or down, and the value of a code.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from qmerge.types import Rows

ColumnRounder = Callable[[int, Tensor], Tensor]

UP, DOWN = 1, -1
REACH, FAR = 16, 6.0


class Grid(ABC):
    """float32 levels with a scale for every entry, for a weight (or some rows of it).

    ``levels_count`` is how many levels there are: up to 16, sums over all levels are exact.
    """

    levels_count: int

    @property
    def row_step(self) -> int:
        """Rows can be taken from multiples of this on (blocks that straddle rows stay whole)."""
        return 1

    @abstractmethod
    def nearest(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        """float32 [O, I] → the code of the nearest level, ties as the format's own library breaks them.

        ``near`` are codes that are mostly right already (the base's, when the grid is kept). They may make it faster,
        and decide between codes of the same value; they never change the values.
        """

    @abstractmethod
    def decode(self, codes_OI: Tensor) -> Tensor:
        """Codes → float32 values, bit-identical to what the format's own library dequantizes to."""

    @abstractmethod
    def step(self, codes_OI: Tensor, direction: int) -> Tensor:
        """The neighbouring codes: ``UP`` or ``DOWN`` to the next other value; the last level is its own neighbour."""

    @abstractmethod
    def column_rounder(self, columns: Tensor, rows: Tensor) -> ColumnRounder:
        """For methods that decide column by column: (i, float32 values [len(rows)]) → the values of the levels nearest
        to them in column ``columns[i]``, as a loader knows them. ``columns``, ``rows``: int64 indices, in any order."""

    @abstractmethod
    def rows(self, rows: Rows) -> Grid:
        """The same grid for some of the rows."""

    def as_stored(self) -> Grid:
        """The grid as a loader knows it: what later values are rounded to when the scales are kept."""
        return self

    def gap(self, codes_OI: Tensor, direction_OI: Tensor) -> Tensor:
        """float32 [O, I]: distance from each level to its neighbour on the side that ``direction``'s sign names;
        infinite at the ends of the grid."""
        up = direction_OI > 0
        next_OI = torch.where(up, self.step(codes_OI, UP), self.step(codes_OI, DOWN))
        gap_OI = (self.decode(next_OI) - self.decode(codes_OI)).abs_()
        return gap_OI.masked_fill_(gap_OI == 0, math.inf)

    def floor(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        """The highest codes whose value is not above ``values`` (the lowest code where there is none)."""
        codes_OI = self.nearest(values_OI, near_OI)
        return torch.where(self.decode(codes_OI) > values_OI, self.step(codes_OI, DOWN), codes_OI)

    def expected_slope(self, values_OI: Tensor, sigma_O1: Tensor) -> Tensor:
        """float32 [O, I]: E[dQ(x + d)/dd] for d ~ N(0, sigma²): what nearest rounding keeps of a Gaussian delta.

        = Σ over thresholds t of gap(t)/sigma · φ((t − x)/sigma), by Stein's lemma E[Q(x + d) d] = sigma² E[Q'(x + d)].
        The sum leaves out thresholds more than ``FAR`` sigma away. Where ``REACH`` levels of a fine grid do not reach
        that far, its gaps are so narrow against sigma that the sum has become the integral of φ over the grid.
        """
        middle_OI = self.nearest(values_OI)
        fine = self.levels_count > REACH
        if fine and bool((self.gap(middle_OI, values_OI) * 4 < sigma_O1).all()):
            return self._inside(values_OI, sigma_O1)
        slope_OI, narrow = torch.zeros_like(values_OI), torch.zeros_like(values_OI, dtype=torch.bool)
        for direction in (UP, DOWN):
            codes_OI, level_OI = middle_OI, self.decode(middle_OI)
            for _ in range(min(REACH, self.levels_count)):
                codes_OI = self.step(codes_OI, direction)
                next_OI = self.decode(codes_OI)
                distance_OI = ((next_OI + level_OI) / 2 - values_OI) / sigma_O1
                slope_OI += (next_OI - level_OI).abs_() / sigma_O1 * torch.exp(-0.5 * distance_OI.square())
                near = (distance_OI.abs_() < FAR) & (next_OI != level_OI)
                level_OI = next_OI
                if not bool(near.any()):
                    break
            narrow |= near
        slope_OI /= math.sqrt(2 * math.pi)
        return torch.where(narrow, self._inside(values_OI, sigma_O1), slope_OI) if fine else slope_OI

    def _inside(self, values_OI: Tensor, sigma_O1: Tensor) -> Tensor:
        """The part of N(x, sigma²) that lies between the ends of the grid."""
        low, high = self.ends()
        below_OI, above_OI = (torch.special.ndtr((end - values_OI) / sigma_O1) for end in (low, high))
        inside_OI: Tensor = above_OI - below_OI
        return inside_OI

    def ends(self) -> tuple[Tensor, Tensor]:
        """float32, broadcast to [O, I]: lowest and highest value; values beyond are clipped. Infinite by default."""
        return torch.tensor(-math.inf), torch.tensor(math.inf)
