"""Grids of float8 numbers with a scale for every block of rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from qmerge.grids import ColumnRounder, Grid
from qmerge.types import Rows

FLOAT8 = torch.float8_e4m3fn
LARGEST, LAST = torch.finfo(FLOAT8).max, 0x7E
"""448, and its code; the one above it is NaN."""

SIGN, MAGNITUDE = 0x80, 0x7F


class ScaledFloatGrid(Grid):
    """E4M3 numbers times the scale of their block. Codes are their bits, uint8; ties round to even, as IEEE 754 does.

    Args:
        scale_RC: float32 [blocks of rows, blocks of columns]; 1 where all rows (columns) share a scale.
        shape: [O, I] of the weight.
        block: rows and columns of a block; the last ones may be short.
        inverse_RC: what values are multiplied with before rounding, where that is not 1 / scale to the last bit.
    """

    levels_count = 2 * LAST + 1

    def __init__(
        self, scale_RC: Tensor, shape: tuple[int, int], block: tuple[int, int], inverse_RC: Tensor | None = None
    ) -> None:  # fmt: skip
        self.scale_RC, self.shape, self.block = scale_RC, shape, block
        reciprocal_RC = torch.where(scale_RC == 0, 0.0, 1.0 / scale_RC) if inverse_RC is None else inverse_RC
        self.inverse_RC = reciprocal_RC.clamp(max=torch.finfo(torch.float32).max)

    @property
    def row_step(self) -> int:
        return self.block[0] if self.scale_RC.shape[0] > 1 else 1

    def nearest(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        scaled_OI = (values_OI * self._of(self.inverse_RC)).clamp_(-LARGEST, LARGEST)
        codes_OI = scaled_OI.to(FLOAT8).view(torch.uint8)
        if near_OI is None:
            return codes_OI
        same_OI = ((codes_OI | near_OI) & MAGNITUDE == 0) | self._of(self.scale_RC == 0)  # two zeros, or zeros only
        return torch.where(same_OI, near_OI, codes_OI)

    def decode(self, codes_OI: Tensor) -> Tensor:
        return codes_OI.view(FLOAT8).float() * self._of(self.scale_RC)

    def step(self, codes_OI: Tensor, direction: int) -> Tensor:
        magnitude_OI = (codes_OI & MAGNITUDE).short()
        places_OI = torch.where(codes_OI < SIGN, magnitude_OI, -magnitude_OI).add_(direction).clamp_(-LAST, LAST)
        return torch.where(places_OI < 0, SIGN - places_OI, places_OI).to(torch.uint8)

    def column_rounder(self, columns: Tensor, rows: Tensor) -> ColumnRounder:
        blocks_O = (rows // self.block[0]).clamp(max=self.scale_RC.shape[0] - 1)
        blocks_I = (columns // self.block[1]).clamp(max=self.scale_RC.shape[1] - 1)
        scale_IO, inverse_IO = (
            part_RC[blocks_O][:, blocks_I].T.contiguous() for part_RC in (self.scale_RC, self.inverse_RC)
        )
        return lambda i, values_O: (values_O * inverse_IO[i]).clamp_(-LARGEST, LARGEST).to(FLOAT8).float() * scale_IO[i]

    def ends(self) -> tuple[Tensor, Tensor]:
        last_OI = self._of(self.scale_RC * LARGEST)
        return -last_OI, last_OI

    def rows(self, rows: Rows) -> ScaledFloatGrid:
        part, shape = slice(0, 1), (len(rows), self.shape[1])
        if self.scale_RC.shape[0] > 1:
            part = slice(rows.start // self.block[0], -(-rows.stop // self.block[0]))
        return ScaledFloatGrid(self.scale_RC[part], shape, self.block, self.inverse_RC[part])

    def _of(self, parts_RC: Tensor) -> Tensor:
        """[R, C] → what broadcasts to [O, I]."""
        if parts_RC.shape[1] > 1:
            parts_RC = parts_RC.repeat_interleave(self.block[1], dim=1)[:, : self.shape[1]]
        return parts_RC.repeat_interleave(self.block[0], dim=0)[: self.shape[0]] if len(parts_RC) > 1 else parts_RC
