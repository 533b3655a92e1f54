"""Grids of a short table of levels (FP4's 15 numbers, say) with a scale for every row and group of columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qmerge.grids import UP, ColumnRounder, Grid
from qmerge.types import Rows

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = (*E2M1, *(-value for value in E2M1))
"""FP4's values by their codes on disk: a sign, two bits of exponent, one of mantissa."""


@dataclass(frozen=True)
class Levels:
    """Codes are places in ascending order, so that arithmetic on them makes sense; ``disk_L`` says how they are stored.

    values_L    float32, ascending; −0 comes before 0
    edges       float32 [L − 1]: a value above edge k belongs to level k + 1 or higher
    disk_L      uint8: code on disk of every level; ``order_D`` is the reverse
    """

    values_L: Tensor
    edges: Tensor
    disk_L: Tensor
    order_D: Tensor

    def to(self, device: torch.device) -> Levels:
        parts = (part.to(device) for part in (self.values_L, self.edges, self.disk_L, self.order_D))
        return Levels(*parts)

    def nearest(self, scaled: Tensor) -> Tensor:
        return torch.bucketize(scaled, self.edges, out_int32=True).to(torch.uint8)

    def rounded(self, scaled: Tensor) -> Tensor:
        """The value of the nearest level."""
        return self.values_L[torch.bucketize(scaled, self.edges, out_int32=True)]

    @cached_property
    def neighbours(self) -> tuple[Tensor, Tensor]:
        """uint8 [L], upwards and downwards: the next code of another value (two zeros are one value)."""
        table = self.values_L.tolist()
        up = [next((c for c in range(len(table)) if table[c] > value), code) for code, value in enumerate(table)]
        down = [
            next((c for c in reversed(range(len(table))) if table[c] < value), code) for code, value in enumerate(table)
        ]
        first, second = (torch.tensor(codes, dtype=torch.uint8, device=self.values_L.device) for codes in (up, down))
        return first, second


def levels_of(table: Sequence[float]) -> Levels:
    """Values by their codes on disk → levels; values halfway between two go to the even code, as IEEE rounds."""
    order = sorted(range(len(table)), key=lambda code: (table[code], math.copysign(1.0, table[code])))
    values_L = torch.tensor([table[code] for code in order], dtype=torch.float32)
    middles = (values_L[1:] + values_L[:-1]) / 2
    goes_up = torch.tensor([code % 2 == 0 for code in order[1:]])
    edges = torch.where(goes_up, torch.nextafter(middles, torch.tensor(-torch.inf)), middles)
    disk_L = torch.tensor(order, dtype=torch.uint8)
    return Levels(values_L, edges, disk_L, torch.argsort(disk_L.int()).to(torch.uint8))


FP4_LEVELS = levels_of(FP4)


class LevelsGrid(Grid):
    """Codes are uint8, in the order of the levels; a value is its level times the scale of its row and group.

    Args:
        levels: at most 256.
        scale_OG: float32 [O, G]; may be zero (all codes then mean 0) or negative.
        group_size: columns that share a scale; the last group may have fewer. One group for all: any size.
    """

    def __init__(self, levels: Levels, scale_OG: Tensor, group_size: int) -> None:
        self.levels, self.scale_OG, self.group_size = levels.to(scale_OG.device), scale_OG, group_size
        self.levels_count = len(levels.values_L)

    @cached_property
    def _divisor_OG(self) -> Tensor:
        """A scale of zero leaves nothing but zero."""
        return torch.where(self.scale_OG == 0, torch.inf, self.scale_OG)

    def nearest(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        codes_OI = self.levels.nearest(values_OI / self._of(self._divisor_OG, values_OI))
        if near_OI is None:
            return codes_OI
        return torch.where(self.decode(codes_OI) == self.decode(near_OI), near_OI, codes_OI)

    def decode(self, codes_OI: Tensor) -> Tensor:
        return self.levels.values_L[codes_OI.int()].mul_(self._of(self.scale_OG, codes_OI))

    def step(self, codes_OI: Tensor, direction: int) -> Tensor:
        up, down = (neighbours[codes_OI.int()] for neighbours in self.levels.neighbours)
        forward_OI, backward_OI = (up, down) if direction == UP else (down, up)
        if not bool((self.scale_OG < 0).any()):
            return forward_OI
        return torch.where(self._of(self.scale_OG, codes_OI) < 0, backward_OI, forward_OI)

    def column_rounder(self, columns: Tensor, rows: Tensor) -> ColumnRounder:
        groups = columns // self.group_size if self.scale_OG.shape[1] > 1 else torch.zeros_like(columns)
        scale_IO, divisor_IO = (
            part_OG[rows][:, groups].T.contiguous() for part_OG in (self.scale_OG, self._divisor_OG)
        )
        values_L, edges = self.levels.values_L, self.levels.edges

        def nearest(i: int, values_O: Tensor) -> Tensor:
            return values_L[torch.bucketize(values_O / divisor_IO[i], edges, out_int32=True)].mul_(scale_IO[i])

        return nearest

    def ends(self) -> tuple[Tensor, Tensor]:
        first_OG, last_OG = (self.levels.values_L[end] * self.scale_OG for end in (0, -1))
        low_OG, high_OG = torch.minimum(first_OG, last_OG), torch.maximum(first_OG, last_OG)
        size = 1 if low_OG.shape[1] == 1 else self.group_size
        return low_OG.repeat_interleave(size, dim=1), high_OG.repeat_interleave(size, dim=1)

    def rows(self, rows: Rows) -> LevelsGrid:
        return LevelsGrid(self.levels, self.scale_OG[rows.start : rows.stop], self.group_size)

    def _of(self, parts_OG: Tensor, like_OI: Tensor) -> Tensor:
        """[O, G] → [O, I]; one group for all columns broadcasts."""
        if parts_OG.shape[1] == 1:
            return parts_OG
        return parts_OG.repeat_interleave(self.group_size, dim=1)[:, : like_OI.shape[1]]
