"""Grids of a short table of levels (FP4's 15 numbers, say) with a scale for every row and group of columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qmerge.grids import DOWN, UP, ColumnRounder, Grid, ScaleTable
from qmerge.types import Rows

# The largest float32.
LARGEST = torch.finfo(torch.float32).max

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# FP4's values by their codes on disk: a sign, two bits of exponent, one of mantissa.
FP4 = (*E2M1, *(-value for value in E2M1))


@dataclass(frozen=True)
class Levels:
    """A table of values. Codes are positions in ascending order, so that arithmetic on them makes sense."""

    values_L: Tensor
    """float32, ascending; −0 comes before 0."""

    edges: Tensor
    """float32 [L − 1]: a value above edge k belongs to level k + 1 or higher."""

    disk_L: Tensor
    """uint8: the code on disk of every level."""

    order_D: Tensor
    """uint8, the reverse of ``disk_L``: the level of every code on disk."""

    def to(self, device: torch.device) -> Levels:
        """The same on another device."""
        return Levels(self.values_L.to(device), self.edges.to(device), self.disk_L.to(device), self.order_D.to(device))

    def nearest(self, scaled: Tensor) -> Tensor:
        """uint8 codes of the levels nearest to float32 values."""
        return torch.bucketize(scaled, self.edges, out_int32=True).to(torch.uint8)

    def rounded(self, scaled: Tensor) -> Tensor:
        """float32 values of the levels nearest to float32 values."""
        return self.values_L[torch.bucketize(scaled, self.edges, out_int32=True)]

    @cached_property
    def next_up(self) -> Tensor:
        """uint8 [L]: the next code of a higher value (two zeros are one value); the last one is its own neighbour."""
        return next_codes(self.values_L, UP)

    @cached_property
    def next_down(self) -> Tensor:
        """uint8 [L]: the next code of a lower value."""
        return next_codes(self.values_L, DOWN)


def next_codes(values_L: Tensor, direction: int) -> Tensor:
    """uint8 [L]: for every code of an ascending table, the nearest code of another value in this direction.

    A code without one is its own neighbour.
    """
    table = values_L.tolist()
    neighbours = []
    for code, value in enumerate(table):
        neighbour = code
        # Codes may share a value (0 and −0): walk on until it changes.
        while 0 <= neighbour < len(table) and table[neighbour] == value:
            neighbour += direction
        has_neighbour = 0 <= neighbour < len(table)
        neighbours.append(neighbour if has_neighbour else code)
    return torch.tensor(neighbours, dtype=torch.uint8, device=values_L.device)


def levels_of(table: Sequence[float]) -> Levels:
    """Levels of values that are given by their codes on disk.

    Values halfway between two levels go to the even code, as IEEE 754 rounds.
    """
    order = sorted(range(len(table)), key=lambda code: (table[code], math.copysign(1.0, table[code])))
    values_L = torch.tensor([table[code] for code in order], dtype=torch.float32)
    middles = (values_L[1:] + values_L[:-1]) / 2
    # bucketize puts a value that equals an edge below it. If the level above has the even code, its edge is one float lower.
    upper_is_even = torch.tensor([code % 2 == 0 for code in order[1:]])
    edges = torch.where(upper_is_even, torch.nextafter(middles, torch.tensor(-torch.inf)), middles)
    disk_L = torch.tensor(order, dtype=torch.uint8)
    return Levels(values_L, edges, disk_L, torch.argsort(disk_L.int()).to(torch.uint8))


FP4_LEVELS = levels_of(FP4)


class LevelsGrid(Grid):
    """Codes are uint8, in the order of the levels; a value is its level times the scale of its row and group.

    Args:
        levels: at most 256.
        scale_OG: float32; may be zero (all codes then mean 0) or negative.
        group_size: columns that share a scale; the last group may have fewer. Ignored if there is one group for all.
    """

    def __init__(self, levels: Levels, scale_OG: Tensor, group_size: int) -> None:
        self.levels = levels.to(scale_OG.device)
        self.scale_OG = scale_OG
        self.group_size = group_size
        self.levels_count = len(levels.values_L)

    @cached_property
    def _divisor_OG(self) -> Tensor:
        """Divisors of values: infinity for a scale of zero, so that every value becomes zero."""
        return torch.where(self.scale_OG == 0, torch.inf, self.scale_OG)

    def nearest(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        codes_OI = self.levels.nearest(values_OI / self._per_column(self._divisor_OG, values_OI))
        if near_OI is None:
            return codes_OI
        return torch.where(self.decode(codes_OI) == self.decode(near_OI), near_OI, codes_OI)

    def decode(self, codes_OI: Tensor) -> Tensor:
        return self.levels.values_L[codes_OI.int()].mul_(self._per_column(self.scale_OG, codes_OI))

    def step(self, codes_OI: Tensor, direction: int) -> Tensor:
        higher_OI = self.levels.next_up[codes_OI.int()]
        lower_OI = self.levels.next_down[codes_OI.int()]
        forward_OI, backward_OI = (higher_OI, lower_OI) if direction == UP else (lower_OI, higher_OI)
        if not bool((self.scale_OG < 0).any()):
            return forward_OI
        # With a negative scale the higher level has the lower value.
        return torch.where(self._per_column(self.scale_OG, codes_OI) < 0, backward_OI, forward_OI)

    def column_rounder(self, columns: Tensor, rows: Tensor) -> ColumnRounder:
        groups = columns // self.group_size
        if self.scale_OG.shape[1] == 1:
            groups = torch.zeros_like(columns)
        scale_IO = self.scale_OG[rows][:, groups].T.contiguous()
        divisor_IO = self._divisor_OG[rows][:, groups].T.contiguous()

        def nearest(i: int, values_O: Tensor) -> Tensor:
            return self.levels.rounded(values_O / divisor_IO[i]).mul_(scale_IO[i])

        return nearest

    def scale_table(self, columns: int) -> ScaleTable:
        column_offset_I = torch.arange(columns, device=self.scale_OG.device) // self.group_size
        if self.scale_OG.shape[1] == 1:
            column_offset_I = torch.zeros_like(column_offset_I)
        # The reciprocal of a very small scale would be infinite, and infinity times zero is NaN.
        inverse_OG = (1.0 / self._divisor_OG).clamp(-LARGEST, LARGEST)
        return ScaleTable(
            scale=self.scale_OG.flatten(),
            inverse=inverse_OG.flatten(),
            zero=torch.zeros_like(inverse_OG).flatten(),
            row_stride=self.scale_OG.shape[1],
            column_offset_I=column_offset_I,
            levels_L=self.levels.values_L,
            edges=self.levels.edges,
        )

    def ends(self) -> tuple[Tensor, Tensor]:
        first_OG = self.levels.values_L[0] * self.scale_OG
        last_OG = self.levels.values_L[-1] * self.scale_OG
        low_OG, high_OG = torch.minimum(first_OG, last_OG), torch.maximum(first_OG, last_OG)
        width = 1 if low_OG.shape[1] == 1 else self.group_size
        return low_OG.repeat_interleave(width, dim=1), high_OG.repeat_interleave(width, dim=1)

    def rows(self, rows: Rows) -> LevelsGrid:
        return LevelsGrid(self.levels, self.scale_OG[rows.start : rows.stop], self.group_size)

    def _per_column(self, values_OG: Tensor, like_OI: Tensor) -> Tensor:
        """[O, G] → [O, I], for as many columns as ``like_OI`` has; a single group broadcasts."""
        if values_OG.shape[1] == 1:
            return values_OG
        return values_OG.repeat_interleave(self.group_size, dim=1)[:, : like_OI.shape[1]]
