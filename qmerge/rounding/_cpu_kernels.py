"""The column loops of ``preserve`` compiled for the CPU by numba: several times faster than torch, column by column.

Arithmetic is float32 without fused multiply-add, in torch's order, so that the levels are those of torch. Rows of the weight
are independent: every thread takes some of them. The products between blocks stay with torch.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmerge.grids import ScaleTable
from qmerge.safetensors_io.threads import started_pool

TILE = 128
"""Rows of the weight that go through the columns of a block together: their part of a block fits into the L1 cache."""

PROPOSALS = 64
"""Columns of a row whose best levels are found at once. (Most of them are where they are best already.)"""

FEWEST_ROWS = 64
"""A thread takes at least as many rows."""

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class CpuKernels:
    """The kernels for one weight with its columns in some order.

    Attributes:
        grid: arguments of the compiled functions that describe the grid.
        offset_I: int64, the table's ``column_offset_I`` in this order of the columns.
    """

    grid: tuple[Any, ...]
    offset_I: Array

    def feedback(
        self, start: int, stop: int, *, aim_IO: Tensor, carried: Tensor, factor_II: Tensor, levels_IO: Tensor,
        errors_IO: Tensor,
    ) -> None:  # fmt: skip
        """See ``ColumnLoops``."""
        tensors = (aim_IO, carried, factor_II, levels_IO, errors_IO)
        rows = torch.arange(aim_IO.shape[1])
        _in_threads(_feedback_block, len(rows), *_arrays(*tensors, rows), self.offset_I[start:stop], *self.grid, start)

    def descend(self, start_IO: Tensor, slope_OI: Tensor, K_II: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
        """See ``RowLoops``."""
        levels_OI = start_IO.T.contiguous()
        gained_O = torch.empty(len(levels_OI), dtype=torch.float64)
        tensors = (slope_OI, K_II.contiguous(), K_II.diagonal().contiguous(), levels_OI, gained_O)
        _in_threads(_descend_rows, len(levels_OI), *_arrays(*tensors), self.offset_I, *self.grid, sweeps)
        return levels_OI.T.contiguous(), gained_O


def make_cpu_kernels(table: ScaleTable, columns: Tensor) -> CpuKernels:
    """The kernels for a grid with this table and the columns in this order (int64 [I])."""
    table = table.padded()
    shift = table.divisor.bit_length() - 1
    assert table.divisor == 2**shift, "the block size must be a power of 2"
    grid = (
        *_arrays(table.scale, table.inverse, table.zero, table.levels_L, table.edges),
        table.row_stride,
        shift,
        np.float32(table.first),
        np.float32(table.last),
        table.level_bits,
    )
    return CpuKernels(grid=grid, offset_I=table.column_offset_I[columns].numpy())


def _arrays(*tensors: Tensor) -> list[Array]:
    """The same memory as numpy arrays."""
    return [tensor.numpy() for tensor in tensors]


def _in_threads(kernel: Callable[..., None], rows: int, *arguments: Any) -> None:
    """Run a kernel on all rows, with as many threads as torch uses."""
    threads = max(1, min(torch.get_num_threads(), rows // FEWEST_ROWS))
    if threads == 1:
        kernel(*arguments, 0, rows)
        return
    bounds = [rows * number // threads for number in range(threads + 1)]
    starts, stops = bounds[:-1], bounds[1:]
    list(_pool(threads).map(lambda start, stop: kernel(*arguments, start, stop), starts, stops))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return started_pool(threads, "qmerge-rounding")


# Rows of memory are sliced before the loops over lanes: then numba knows that no index is negative, and uses vector
# instructions.


@numba.njit(nogil=True, cache=True)
def _round_to_levels(
    value: Array, level: Array, place: Array, scale: Array, inverse: Array, zero: Array, table: Array, edges: Array,
    first: np.float32, last: np.float32, level_bits: int,
) -> None:  # fmt: skip
    """``value`` → values of the nearest levels, in place. ``place``: of their scales; ``level``: memory to work with."""
    if level_bits == 0:
        # Adding 1.5 · 2²³ leaves no digits after the point: rounds to integers, ties to even.
        magic = np.float32(12582912.0)
        for lane in range(len(value)):
            at = place[lane]
            position = min(max(value[lane] * inverse[at] + zero[at], first), last)
            value[lane] = ((position + magic) - magic - zero[at]) * scale[at]
        return
    for lane in range(len(value)):
        value[lane] *= inverse[place[lane]]
        level[lane] = 0
    if level_bits <= 4:
        # How many edges are below the value.
        for edge in edges:
            for lane in range(len(value)):
                level[lane] += np.int32(value[lane] > edge)
    else:
        for bit in range(level_bits):  # the same, by bisection
            half = 1 << (level_bits - 1 - bit)
            for lane in range(len(value)):
                if value[lane] > edges[level[lane] + half - 1]:
                    level[lane] += half
    for lane in range(len(value)):
        value[lane] = table[level[lane]] * scale[place[lane]]


@numba.njit(nogil=True, cache=True)
def _add_multiple(target: Array, share: np.float32, source: Array) -> None:
    for lane in range(len(source)):
        target[lane] += share * source[lane]


@numba.njit(nogil=True, cache=True)
def _feedback_block(
    aim: Array, carried: Array, factor: Array, levels: Array, errors: Array, rows: Array, offset: Array, scale: Array,
    inverse: Array, zero: Array, table: Array, edges: Array, row_stride: int, shift: int, first: np.float32,
    last: np.float32, level_bits: int, start: int, first_row: int, end_row: int,
) -> None:  # fmt: skip
    memory = np.empty((2, TILE), np.float32)
    level_memory = np.empty(TILE, np.int32)
    place_memory = np.empty(TILE, np.uint64)
    columns = len(offset)
    for tile in range(first_row, end_row, TILE):
        end = min(tile + TILE, end_row)
        count = end - tile
        value, error = memory[0, :count], memory[1, :count]
        level, place, rows_here = level_memory[:count], place_memory[:count], rows[tile:end]
        for i in range(columns):
            j = start + i
            diagonal, aim_here, carried_here = factor[j, j], aim[j, tile:end], carried[i, tile:end]
            levels_here, errors_here = levels[j, tile:end], errors[j, tile:end]
            for lane in range(count):
                value[lane] = aim_here[lane] - carried_here[lane] / diagonal
                place[lane] = (rows_here[lane] * row_stride + offset[i]) >> shift
            _round_to_levels(value, level, place, scale, inverse, zero, table, edges, first, last, level_bits)
            for lane in range(count):
                error[lane] = value[lane] - aim_here[lane]
                levels_here[lane] = value[lane]
                errors_here[lane] = error[lane]
            for later in range(i + 1, columns):
                _add_multiple(carried[later, tile:end], factor[j, start + later], error)


@numba.njit(nogil=True, cache=True)
def _descend_rows(
    slope: Array, K: Array, diagonal: Array, levels: Array, gained: Array, offset: Array, scale: Array,
    inverse: Array, zero: Array, table: Array, edges: Array, row_stride: int, shift: int, first: np.float32,
    last: np.float32, level_bits: int, sweeps: int, first_row: int, end_row: int,
) -> None:  # fmt: skip
    value_memory = np.empty(PROPOSALS, np.float32)
    level_memory = np.empty(PROPOSALS, np.int32)
    place_memory = np.empty(PROPOSALS, np.uint64)
    columns = len(offset)
    for row in range(first_row, end_row):
        slope_here, levels_here = slope[row], levels[row]
        fall = 0.0
        for _ in range(sweeps):
            moved = False
            start = 0
            while start < columns:
                stop = min(start + PROPOSALS, columns)
                count = stop - start
                value, level, place = value_memory[:count], level_memory[:count], place_memory[:count]
                before, slope_part = levels_here[start:stop], slope_here[start:stop]
                diagonal_part, offset_part = diagonal[start:stop], offset[start:stop]
                for lane in range(count):
                    value[lane] = before[lane] - slope_part[lane] / diagonal_part[lane]
                    place[lane] = (row * row_stride + offset_part[lane]) >> shift
                _round_to_levels(value, level, place, scale, inverse, zero, table, edges, first, last, level_bits)
                lane = 0
                while lane < count and value[lane] == before[lane]:
                    lane += 1
                if lane == count:
                    start = stop
                    continue
                # The columns after the first that moves are proposed again, with the slope after its move.
                j = start + lane
                change = value[lane] - before[lane]
                fall -= change * (2.0 * slope_here[j] + change * diagonal[j])
                levels_here[j] = value[lane]
                _add_multiple(slope_here, change, K[j])
                moved = True
                start = j + 1
            if not moved:
                break
        gained[row] = fall
