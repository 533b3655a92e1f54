"""The column loops of ``preserve`` as Triton kernels: one launch for a block of columns instead of six for every column.

A kernel decides the columns of one block one after the other, as ``preserve.feedback`` and ``preserve.sweep`` do with torch.
Rows of the weight are independent: every program takes a tile of them. The products between blocks stay with torch.
Arithmetic is float32 without fused multiply-add, in torch's order, so that codes differ from torch's only where a value is on
a tie within float32 rounding. (One such difference changes the columns after it in the same row.)
"""

# Triton reads the annotations of kernels, so they must not be strings: no ``from __future__ import annotations``.

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qmerge.grids import ScaleTable

BLOCK = 64
"""Most columns of a block."""

TILE = 16
"""Rows of the weight that one program takes."""

WARPS = 1
"""Warps of one program. With one, no column waits at a barrier."""


@dataclass(frozen=True, kw_only=True)
class BlockKernels:
    """The kernels for one weight with its columns in some order.

    Attributes:
        table: of the weight's grid, padded.
        offset_I: int64, the table's ``column_offset_I`` in this order of the columns.
        tile: rows of one program.
        warps: of one program.
    """

    table: ScaleTable
    offset_I: Tensor
    tile: int = TILE
    warps: int = WARPS

    def feedback(
        self, start: int, stop: int, *, aim_IO: Tensor, carried: Tensor, factor_II: Tensor, levels_IO: Tensor,
        errors_IO: Tensor,
    ) -> None:  # fmt: skip
        """See ``ColumnLoops``."""
        outputs = aim_IO.shape[1]
        rows = torch.arange(outputs, device=aim_IO.device)
        _feedback_block[self._programs(outputs)](
            aim_IO, carried, factor_II, levels_IO, errors_IO, rows, *self._grid_arguments(start, stop),
            len(aim_IO), outputs, **self._options(),
        )  # fmt: skip

    def sweep(
        self, start: int, stop: int, *, slope: Tensor, K_II: Tensor, levels_IO: Tensor, errors_IO: Tensor, rows: Tensor
    ) -> None:
        """See ``ColumnLoops``."""
        outputs = levels_IO.shape[1]
        _sweep_block[self._programs(outputs)](
            slope, K_II, levels_IO, errors_IO, rows, *self._grid_arguments(start, stop),
            len(levels_IO), outputs, **self._options(),
        )  # fmt: skip

    def _programs(self, outputs: int) -> tuple[int]:
        return (triton.cdiv(outputs, self.tile),)

    def _grid_arguments(self, start: int, stop: int) -> tuple[Any, ...]:
        table = self.table
        return (
            self.offset_I[start:stop], table.scale, table.inverse, table.zero, table.levels_L, table.edges,
            table.row_stride, float(table.first), float(table.last), start, stop - start,
        )  # fmt: skip

    def _options(self) -> dict[str, Any]:
        # Without fused multiply-add: level − old level must be 0 where both are the same.
        return {
            "LEVEL_BITS": self.table.level_bits,
            "DIVISOR": self.table.divisor,
            "BLOCK": BLOCK,
            "TILE": self.tile,
            "num_warps": self.warps,
            "enable_fp_fusion": False,
        }


def make_block_kernels(table: ScaleTable, columns: Tensor) -> BlockKernels:
    """The kernels for a grid with this table and the columns in this order (int64 [I])."""
    return BlockKernels(table=table.padded(), offset_I=table.column_offset_I[columns].contiguous())


@triton.jit
def _nearest(
    value, place, inside, scale_ptr, inverse_ptr, zero_ptr, levels_ptr, edges_ptr, first, last, LEVEL_BITS: tl.constexpr
):  # fmt: skip
    """float32 values of the nearest levels; ``place``: of their scales in the table."""
    scale = tl.load(scale_ptr + place, mask=inside, other=0.0)
    scaled = value * tl.load(inverse_ptr + place, mask=inside, other=0.0)
    if LEVEL_BITS > 0:
        # How many edges are below the value, by bisection.
        level = (place * 0).to(tl.int32)
        for bit in tl.static_range(LEVEL_BITS):
            half = 1 << (LEVEL_BITS - 1 - bit)
            edge = tl.load(edges_ptr + level + (half - 1))
            level = tl.where(scaled > edge, level + half, level)
        result = tl.load(levels_ptr + level) * scale
    else:
        zero = tl.load(zero_ptr + place, mask=inside, other=0.0)
        position = tl.minimum(tl.maximum(scaled + zero, first), last)
        # Adding 1.5 · 2²³ leaves no digits after the point: rounds to integers, ties to even.
        code = (position + 12582912.0) - 12582912.0
        result = (code - zero) * scale
    return result


@triton.jit
def _feedback_block(
    aim_ptr, carried_ptr, factor_ptr, levels_ptr, errors_ptr, rows_ptr,
    offset_ptr, scale_ptr, inverse_ptr, zero_ptr, table_ptr, edges_ptr, row_stride, first, last, start, count,
    inputs, outputs, LEVEL_BITS: tl.constexpr, DIVISOR: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = lane < outputs
    row_place = tl.load(rows_ptr + lane, mask=inside, other=0) * row_stride
    index = tl.arange(0, BLOCK)
    in_block = index < count
    carried = tl.load(
        carried_ptr + index[:, None] * outputs + lane[None, :], mask=in_block[:, None] & inside[None, :], other=0.0
    )
    for i in range(count):
        j = (start + i).to(tl.int64)
        aim = tl.load(aim_ptr + j * outputs + lane, mask=inside, other=0.0)
        diagonal = tl.load(factor_ptr + j * inputs + j)
        carried_here = tl.sum(tl.where(index[:, None] == i, carried, 0.0), axis=0)
        tl.store(carried_ptr + i * outputs + lane, carried_here, mask=inside)
        place = (row_place + tl.load(offset_ptr + i)) // DIVISOR
        level = _nearest(
            aim - carried_here / diagonal, place, inside, scale_ptr, inverse_ptr, zero_ptr, table_ptr, edges_ptr,
            first, last, LEVEL_BITS,
        )  # fmt: skip
        error = level - aim
        tl.store(levels_ptr + j * outputs + lane, level, mask=inside)
        tl.store(errors_ptr + j * outputs + lane, error, mask=inside)
        factor = tl.load(factor_ptr + j * inputs + start + index, mask=in_block & (index > i), other=0.0)
        carried += factor[:, None] * error[None, :]


@triton.jit
def _sweep_block(
    slope_ptr, K_ptr, levels_ptr, errors_ptr, rows_ptr,
    offset_ptr, scale_ptr, inverse_ptr, zero_ptr, table_ptr, edges_ptr, row_stride, first, last, start, count,
    inputs, outputs, LEVEL_BITS: tl.constexpr, DIVISOR: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = lane < outputs
    row_place = tl.load(rows_ptr + lane, mask=inside, other=0) * row_stride
    index = tl.arange(0, BLOCK)
    in_block = index < count
    slope = tl.load(
        slope_ptr + index[:, None] * outputs + lane[None, :], mask=in_block[:, None] & inside[None, :], other=0.0
    )
    for i in range(count):
        j = (start + i).to(tl.int64)
        before = tl.load(levels_ptr + j * outputs + lane, mask=inside, other=0.0)
        error = tl.load(errors_ptr + j * outputs + lane, mask=inside, other=0.0)
        diagonal = tl.load(K_ptr + j * inputs + j)
        slope_here = tl.sum(tl.where(index[:, None] == i, slope, 0.0), axis=0)
        tl.store(slope_ptr + i * outputs + lane, slope_here, mask=inside)
        place = (row_place + tl.load(offset_ptr + i)) // DIVISOR
        level = _nearest(
            before - slope_here / diagonal, place, inside, scale_ptr, inverse_ptr, zero_ptr, table_ptr, edges_ptr,
            first, last, LEVEL_BITS,
        )  # fmt: skip
        change = tl.where(level == before, 0.0, level - before)
        tl.store(levels_ptr + j * outputs + lane, level, mask=inside)
        tl.store(errors_ptr + j * outputs + lane, error + change, mask=inside)
        # K is symmetric: its row j is its column j.
        K_here = tl.load(K_ptr + j * inputs + start + index, mask=in_block & (index > i), other=0.0)
        slope += K_here[:, None] * change[None, :]
