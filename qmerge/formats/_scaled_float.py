"""Grids of float8 numbers with a scale for every block of rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from qmerge.grids import ColumnRounder, Grid
from qmerge.types import Rows

FLOAT8 = torch.float8_e4m3fn

# 448.
LARGEST = torch.finfo(FLOAT8).max

# The code of the largest number; the next one is NaN.
LAST = 0x7E

# Bits of a code.
SIGN, MAGNITUDE = 0x80, 0x7F


class ScaledFloatGrid(Grid):
    """E4M3 numbers times the scale of their block. Codes are their bits, uint8; ties round to even, as IEEE 754 does.

    Args:
        scale_RC: float32 [blocks of rows, blocks of columns]; an axis has size 1 if all rows (columns) share a scale.
        shape: [O, I] of the weight.
        block: rows and columns of a block; the last ones may be short.
        inverse_RC: factor of values before rounding, if it is not 1 / scale to the last bit.
    """

    levels_count = 2 * LAST + 1

    def __init__(
        self, scale_RC: Tensor, shape: tuple[int, int], block: tuple[int, int], inverse_RC: Tensor | None = None
    ) -> None:
        self.scale_RC = scale_RC
        self.shape = shape
        self.block = block
        if inverse_RC is None:
            inverse_RC = torch.where(scale_RC == 0, 0.0, 1.0 / scale_RC)
        # The reciprocal of a very small scale would be infinite, and infinity times zero is NaN.
        self.inverse_RC = inverse_RC.clamp(max=torch.finfo(torch.float32).max)

    @property
    def row_step(self) -> int:
        return self.block[0] if self.scale_RC.shape[0] > 1 else 1

    def nearest(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        scaled_OI = (values_OI * self._per_entry(self.inverse_RC)).clamp_(-LARGEST, LARGEST)
        codes_OI = scaled_OI.to(FLOAT8).view(torch.uint8)
        if near_OI is None:
            return codes_OI
        both_zero_OI = (codes_OI | near_OI) & MAGNITUDE == 0
        same_value_OI = both_zero_OI | self._per_entry(self.scale_RC == 0)
        return torch.where(same_value_OI, near_OI, codes_OI)

    def decode(self, codes_OI: Tensor) -> Tensor:
        return codes_OI.view(FLOAT8).float() * self._per_entry(self.scale_RC)

    def step(self, codes_OI: Tensor, direction: int) -> Tensor:
        # Codes are sign and magnitude: as signed integers they are in the order of the values, with one zero.
        magnitude_OI = (codes_OI & MAGNITUDE).short()
        signed_OI = torch.where(codes_OI < SIGN, magnitude_OI, -magnitude_OI).add_(direction).clamp_(-LAST, LAST)
        return torch.where(signed_OI < 0, SIGN - signed_OI, signed_OI).to(torch.uint8)

    def column_rounder(self, columns: Tensor, rows: Tensor) -> ColumnRounder:
        blocks_O = (rows // self.block[0]).clamp(max=self.scale_RC.shape[0] - 1)
        blocks_I = (columns // self.block[1]).clamp(max=self.scale_RC.shape[1] - 1)
        scale_IO = self.scale_RC[blocks_O][:, blocks_I].T.contiguous()
        inverse_IO = self.inverse_RC[blocks_O][:, blocks_I].T.contiguous()

        def nearest(i: int, values_O: Tensor) -> Tensor:
            scaled_O = (values_O * inverse_IO[i]).clamp_(-LARGEST, LARGEST)
            return scaled_O.to(FLOAT8).float() * scale_IO[i]

        return nearest

    def ends(self) -> tuple[Tensor, Tensor]:
        last_OI = self._per_entry(self.scale_RC * LARGEST)
        return -last_OI, last_OI

    def rows(self, rows: Rows) -> ScaledFloatGrid:
        part = slice(0, 1)
        if self.scale_RC.shape[0] > 1:
            part = slice(rows.start // self.block[0], -(-rows.stop // self.block[0]))
        shape = (len(rows), self.shape[1])
        return ScaledFloatGrid(self.scale_RC[part], shape, self.block, self.inverse_RC[part])

    def _per_entry(self, values_RC: Tensor) -> Tensor:
        """[R, C] → a tensor that broadcasts to [O, I]."""
        if values_RC.shape[1] > 1:
            values_RC = values_RC.repeat_interleave(self.block[1], dim=1)[:, : self.shape[1]]
        if values_RC.shape[0] > 1:
            values_RC = values_RC.repeat_interleave(self.block[0], dim=0)[: self.shape[0]]
        return values_RC
