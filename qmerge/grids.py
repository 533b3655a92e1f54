"""A grid: the values that a format can store, for every entry of a weight.

Every rounding works on every format through the few operations of ``Grid``. Codes are whatever tensor suits the format (NF4:
uint8 0 … 15 in ascending order of the levels; int8: int8; bf16: the bf16 numbers themselves). A rounding never looks inside a
code. It asks the grid for the nearest code, for the next code up or down, and for the value of a code.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qmerge.types import Rows

# (i, float32 values of one column) → float32 values of the nearest levels. See ``Grid.column_rounder``.
ColumnRounder = Callable[[int, Tensor], Tensor]

UP, DOWN = 1, -1

# Most levels of a coarse grid: sums over all of its levels are exact. Of a finer grid, this many levels on either side of a
# value are summed.
FINE_LEVELS = 16

# Standard deviations beyond which the density of a Gaussian is ignored (1e-8 of its peak).
FAR = 6.0

# Where this many gaps of the grid fit into one standard deviation, a sum over its levels is an integral.
MUCH_FINER = 4


@dataclass(frozen=True, kw_only=True)
class ScaleTable:
    """A grid as plain tensors, for kernels that round column by column: value = (level − zero) · scale.

    The scale of an entry is at position ``(row · row_stride + column_offset_I[column]) // divisor``. A value is multiplied by
    the inverse there. With a table of levels it becomes the level above as many edges as are below it. Without one, the zero
    is added, and it becomes the nearest integer from ``first`` to ``last`` (ties to even).

    Attributes:
        scale: float32, flat, contiguous.
        inverse: float32, as many; 0 where a scale is 0.
        zero: float32, as many; unused with a table of levels.
        row_stride: see above.
        column_offset_I: int64.
        divisor: see above.
        levels_L: float32, ascending; empty if levels are integers.
        edges: float32 [L − 1].
        first: lowest integer.
        last: highest integer.
    """

    scale: Tensor
    inverse: Tensor
    zero: Tensor
    row_stride: int
    column_offset_I: Tensor
    divisor: int = 1
    levels_L: Tensor
    edges: Tensor
    first: int = 0
    last: int = 0

    @property
    def level_bits(self) -> int:
        """Bits that count the levels; 0 if levels are integers."""
        return (max(len(self.levels_L), 1) - 1).bit_length()

    def padded(self) -> ScaleTable:
        """The same with a power of 2 of levels: those that are added are never reached."""
        if not self.level_bits:
            return self
        count = 2**self.level_bits
        levels_L = torch.cat([self.levels_L, self.levels_L[-1:].expand(count - len(self.levels_L))])
        edges = torch.cat([self.edges, self.edges.new_full((count - 1 - len(self.edges),), math.inf)])
        return replace(self, levels_L=levels_L.contiguous(), edges=edges.contiguous())


class Grid(ABC):
    """float32 levels with a scale for every entry, for a weight or for some rows of it."""

    levels_count: int
    """Number of levels."""

    @property
    def row_step(self) -> int:
        """Rows can be taken from multiples of this on, so that blocks that span rows stay whole."""
        return 1

    @abstractmethod
    def nearest(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        """Codes [O, I] of the nearest levels of float32 values; the format's own library decides ties.

        Args:
            near_OI: codes that are mostly right already (the base's, if its grid is kept). They may make the search faster,
                and they decide between codes of the same value. They never change a value.
        """

    @abstractmethod
    def decode(self, codes_OI: Tensor) -> Tensor:
        """float32 values of codes, bit-identical to those of the format's own library."""

    @abstractmethod
    def step(self, codes_OI: Tensor, direction: int) -> Tensor:
        """The codes of the next other values, ``UP`` or ``DOWN``. The last level is its own neighbour."""

    @abstractmethod
    def column_rounder(self, columns: Tensor, rows: Tensor) -> ColumnRounder:
        """Nearest rounding of one column at a time, for methods that decide column by column.

        Args:
            columns: int64 indices of the columns in the order in which they are rounded.
            rows: int64 indices of the rows, in any order.

        Returns:
            A function of i and the float32 values [len(rows)] of column ``columns[i]``. It returns the float32 values of the
            nearest levels, as a loader dequantizes them.
        """

    def scale_table(self, columns: int) -> ScaleTable | None:
        """What ``column_rounder`` computes, as tensors for a kernel on a GPU; None if this grid has no such form.

        Args:
            columns: I.
        """
        return None

    @abstractmethod
    def rows(self, rows: Rows) -> Grid:
        """The grid of some of the rows."""

    def as_stored(self) -> Grid:
        """The grid as a loader reads it: later values are rounded to it if the scales are kept."""
        return self

    def gap(self, codes_OI: Tensor, direction_OI: Tensor) -> Tensor:
        """float32 [O, I]: distance from each level to the next one on the side of ``direction_OI``'s sign.

        Infinite at the ends of the grid.
        """
        above_OI, below_OI = self.step(codes_OI, UP), self.step(codes_OI, DOWN)
        next_OI = torch.where(direction_OI > 0, above_OI, below_OI)
        gap_OI = (self.decode(next_OI) - self.decode(codes_OI)).abs_()
        return gap_OI.masked_fill_(gap_OI == 0, math.inf)

    def floor(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        """The highest codes whose values are not above ``values_OI``; the lowest code if there are none."""
        codes_OI = self.nearest(values_OI, near_OI)
        return torch.where(self.decode(codes_OI) > values_OI, self.step(codes_OI, DOWN), codes_OI)

    def expected_slope(self, values_OI: Tensor, sigma_O1: Tensor) -> Tensor:
        """float32 [O, I]: E[dQ(x + d)/dd] for d ~ N(0, sigma²), the fraction of a Gaussian delta that nearest rounding keeps.

        By Stein's lemma, E[Q(x + d) d] = sigma² E[Q'(x + d)]. Q' is a sum over the thresholds t between levels, so the result
        is Σ gap(t)/sigma · φ((t − x)/sigma). Thresholds more than ``FAR`` sigma away are left out.

        Args:
            values_OI: float32, the values x.
            sigma_O1: float32, standard deviation of the delta in each row.
        """
        nearest_OI = self.nearest(values_OI)
        is_fine = self.levels_count > FINE_LEVELS
        if is_fine and bool((self.gap(nearest_OI, values_OI) * MUCH_FINER < sigma_O1).all()):
            return self._fraction_inside(values_OI, sigma_O1)
        slope_OI = torch.zeros_like(values_OI)
        incomplete_OI = self._add_thresholds(slope_OI, UP, nearest_OI, values_OI, sigma_O1=sigma_O1)
        incomplete_OI |= self._add_thresholds(slope_OI, DOWN, nearest_OI, values_OI, sigma_O1=sigma_O1)
        slope_OI /= math.sqrt(2 * math.pi)
        if not is_fine:
            return slope_OI
        # The levels that were walked do not reach FAR sigma: the gaps are so narrow that the sum is an integral.
        return torch.where(incomplete_OI, self._fraction_inside(values_OI, sigma_O1), slope_OI)

    def _add_thresholds(
        self, slope_OI: Tensor, direction: int, nearest_OI: Tensor, values_OI: Tensor, *, sigma_O1: Tensor
    ) -> Tensor:
        """Add the terms of the thresholds on one side to ``slope_OI``, without the factor 1/√(2π).

        Returns:
            bool [O, I]: whether more thresholds follow within ``FAR`` sigma.
        """
        codes_OI = nearest_OI
        level_OI = self.decode(nearest_OI)
        for _ in range(min(FINE_LEVELS, self.levels_count)):
            codes_OI = self.step(codes_OI, direction)
            next_OI = self.decode(codes_OI)
            distance_OI = ((next_OI + level_OI) / 2 - values_OI) / sigma_O1
            slope_OI += (next_OI - level_OI).abs_() / sigma_O1 * torch.exp(-0.5 * distance_OI.square())
            goes_on_OI = (distance_OI.abs_() < FAR) & (next_OI != level_OI)
            level_OI = next_OI
            if not bool(goes_on_OI.any()):
                break
        return goes_on_OI

    def _fraction_inside(self, values_OI: Tensor, sigma_O1: Tensor) -> Tensor:
        """The fraction of N(x, sigma²) between the ends of the grid: values beyond them are clipped, and keep no delta."""
        low, high = self.ends()
        below_OI = torch.special.ndtr((low - values_OI) / sigma_O1)
        above_OI = torch.special.ndtr((high - values_OI) / sigma_O1)
        inside_OI: Tensor = above_OI - below_OI
        return inside_OI

    def ends(self) -> tuple[Tensor, Tensor]:
        """float32, broadcast to [O, I]: the lowest and the highest value, to which others are clipped. Infinite by default."""
        return torch.tensor(-math.inf), torch.tensor(math.inf)
