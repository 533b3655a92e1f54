"""Grids of GGUF's block types: value = (code − offset) · scale − minimum, with a scale for every 16 or 32 columns of a row.

Both grids remember the bytes that their scales come from, so that a block type packs codes with exactly these bytes.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from qmerge.formats._levels import Levels, LevelsGrid
from qmerge.grids import ColumnRounder, Grid, ScaleTable
from qmerge.types import Rows

# A group is flat where its minimum is this many times its scale, or its scale is 0: float32 can hardly tell its values apart.
FLAT = 2.0**18


class BlockGrid(Grid):
    """Codes 0 … ``levels_count`` − 1, as uint8.

    Args:
        scale_OG: float32; may be zero (all codes then have the value −minimum) or negative.
        minimum_OG: float32, subtracted from every value; None for types without one.
        group_size: columns that share a scale.
        offset: the code that means 0 where there is no minimum.
        levels_count: number of codes.
        scales_OS: uint8, the bytes in the file that scales and minima come from.
    """

    def __init__(
        self, scale_OG: Tensor, minimum_OG: Tensor | None, *, group_size: int, offset: int, levels_count: int,
        scales_OS: Tensor,
    ) -> None:  # fmt: skip
        self.scale_OG = scale_OG
        self.minimum_OG = minimum_OG
        self.group_size = group_size
        self.offset = offset
        self.levels_count = levels_count
        self.scales_OS = scales_OS

    @cached_property
    def _inverse_OG(self) -> Tensor:
        return torch.where(self.scale_OG == 0, 0.0, 1.0 / self.scale_OG)

    @cached_property
    def _is_flat_OG(self) -> Tensor:
        """bool: groups in which several codes may have one value."""
        if self.minimum_OG is None:
            return self.scale_OG == 0
        return (self.scale_OG == 0) | (self.minimum_OG.abs() > self.scale_OG.abs() * FLAT)

    @cached_property
    def _has_flat_groups(self) -> bool:
        return bool(self._is_flat_OG.any())

    def nearest(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        position_OGN = self._grouped(values_OI)
        if self.minimum_OG is None:
            position_OGN = position_OGN * self._inverse_OG[..., None]
        else:
            position_OGN = (position_OGN + self.minimum_OG[..., None]).mul_(self._inverse_OG[..., None])
        position_OGN.add_(self.offset).round_().clamp_(0, self.levels_count - 1)
        codes_OI = position_OGN.to(torch.uint8).view(values_OI.shape)
        if near_OI is None or not self._has_flat_groups:
            return codes_OI
        return torch.where(self.decode(codes_OI) == self.decode(near_OI), near_OI, codes_OI)

    def decode(self, codes_OI: Tensor) -> Tensor:
        # The order of operations is that of gguf-py: the product is rounded before the minimum is subtracted.
        values_OGN = self._grouped(codes_OI).float()
        if self.offset:
            values_OGN -= self.offset
        values_OGN *= self.scale_OG[..., None]
        if self.minimum_OG is not None:
            values_OGN -= self.minimum_OG[..., None]
        return values_OGN.view(codes_OI.shape)

    def step(self, codes_OI: Tensor, direction: int) -> Tensor:
        # With a negative scale the higher code has the lower value.
        signed_OG1 = self.scale_OG.sign().short()[..., None] * direction
        stepped_OGN = (self._grouped(codes_OI).short() + signed_OG1).clamp_(0, self.levels_count - 1)
        return stepped_OGN.to(torch.uint8).view(codes_OI.shape)

    def column_rounder(self, columns: Tensor, rows: Tensor) -> ColumnRounder:
        # The arithmetic of the kernels. With a minimum it may be a rounding error away from ``decode``.
        groups = columns // self.group_size
        shape = self.scale_OG.shape
        scale_IO = self._table.scale.view(shape)[rows][:, groups].T.contiguous()
        inverse_IO = self._table.inverse.view(shape)[rows][:, groups].T.contiguous()
        zero_IO = self._table.zero.view(shape)[rows][:, groups].T.contiguous()
        last = self.levels_count - 1

        def nearest(i: int, values_O: Tensor) -> Tensor:
            codes_O = torch.addcmul(zero_IO[i], values_O, inverse_IO[i]).clamp_(0, last).round_()
            return codes_O.sub_(zero_IO[i]).mul_(scale_IO[i])

        return nearest

    def scale_table(self, columns: int) -> ScaleTable:
        return self._table

    @cached_property
    def _table(self) -> ScaleTable:
        """A minimum becomes a zero that is a fraction. Codes of a flat group become one value, −minimum."""
        scale_OG, inverse_OG = self.scale_OG, self._inverse_OG
        zero_OG = torch.full_like(scale_OG, self.offset)
        if self.minimum_OG is not None:
            # A position of ``FLAT`` is clamped to the last level, which is then FLAT − last steps below zero.
            flat_scale_OG = self.minimum_OG / (FLAT - (self.levels_count - 1))
            zero_OG = torch.where(self._is_flat_OG, FLAT, self.minimum_OG * inverse_OG)
            scale_OG = torch.where(self._is_flat_OG, flat_scale_OG, scale_OG)
            inverse_OG = torch.where(self._is_flat_OG, 0.0, inverse_OG)
        columns = torch.arange(scale_OG.shape[1] * self.group_size, device=scale_OG.device)
        return ScaleTable(
            scale=scale_OG.flatten(),
            inverse=inverse_OG.flatten(),
            zero=zero_OG.flatten(),
            row_stride=scale_OG.shape[1],
            column_offset_I=columns // self.group_size,
            levels_L=scale_OG.new_empty(0),
            edges=scale_OG.new_empty(0),
            last=self.levels_count - 1,
        )

    def ends(self) -> tuple[Tensor, Tensor]:
        first_OG = -self.offset * self.scale_OG
        last_OG = (self.levels_count - 1 - self.offset) * self.scale_OG
        low_OG, high_OG = torch.minimum(first_OG, last_OG), torch.maximum(first_OG, last_OG)
        if self.minimum_OG is not None:
            low_OG, high_OG = low_OG - self.minimum_OG, high_OG - self.minimum_OG
        return low_OG.repeat_interleave(self.group_size, dim=1), high_OG.repeat_interleave(self.group_size, dim=1)

    def rows(self, rows: Rows) -> BlockGrid:
        part = slice(rows.start, rows.stop)
        minimum_OG = self.minimum_OG
        if minimum_OG is not None:
            minimum_OG = minimum_OG[part]
        return BlockGrid(
            self.scale_OG[part],
            minimum_OG,
            group_size=self.group_size,
            offset=self.offset,
            levels_count=self.levels_count,
            scales_OS=self.scales_OS[part],
        )

    def _grouped(self, values_OI: Tensor) -> Tensor:
        """[O, I] → [O, G, N], the N columns of every group."""
        return values_OI.reshape(*self.scale_OG.shape, self.group_size)


class BlockLevelsGrid(LevelsGrid):
    """The same with a table of levels in place of integers, without minima.

    Args:
        scales_OS: uint8, the bytes in the file that scales come from.
    """

    def __init__(self, levels: Levels, scale_OG: Tensor, group_size: int, scales_OS: Tensor) -> None:
        super().__init__(levels, scale_OG, group_size)
        self.scales_OS = scales_OS

    def rows(self, rows: Rows) -> BlockLevelsGrid:
        part = slice(rows.start, rows.stop)
        return BlockLevelsGrid(self.levels, self.scale_OG[part], self.group_size, self.scales_OS[part])
