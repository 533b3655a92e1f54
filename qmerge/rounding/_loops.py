"""The column loops of ``preserve`` inside one block of columns: compiled for the CPU (numba) or a GPU (Triton), or by torch.

All decide one column after the other, with the same arithmetic.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from qmerge.grids import Grid

BLOCK = 64
"""Columns that are decided one by one between two matrix products."""

TORCH_LOOPS = "QMERGE_TORCH_LOOPS"
"""Environment variable: with "1", torch goes column by column, to compare with the kernels."""

COMPILERS = {"cpu": "numba", "cuda": "triton"}
"""Type of device → the package that compiles the loops for it. Triton comes with CUDA builds of torch."""

OLDEST_CAPABILITY = (7, 0)
"""Triton compiles for GPUs from Volta on. (A P100 has 6.0.)"""


class FeedbackLoops(Protocol):
    """The loops for one weight with its columns in some order. Tensors are float32 and contiguous, columns are rows of memory."""

    def feedback(
        self, start: int, stop: int, *, aim_IO: Tensor, carried: Tensor, factor_II: Tensor, levels_IO: Tensor,
        errors_IO: Tensor,
    ) -> None:  # fmt: skip
        """Feedback of columns ``start`` to ``stop``: writes these rows of ``levels_IO`` and ``errors_IO``.

        Args:
            carried: float32 [stop − start, O], the errors of all earlier blocks; afterwards those of all earlier columns.
        """


class BlockLoops(FeedbackLoops, Protocol):
    """Descent goes block by block of columns, all rows of the weight at once; the slope is computed anew for each block."""

    def sweep(
        self, start: int, stop: int, *, slope: Tensor, K_II: Tensor, levels_IO: Tensor, errors_IO: Tensor, rows: Tensor
    ) -> None:
        """One sweep over columns ``start`` to ``stop``: changes these rows of ``levels_IO`` and ``errors_IO``.

        Args:
            slope: float32 [stop − start, O], K (Q − T) of the block; afterwards that of each column when it was decided.
            rows: int64 [O], the rows of the weight.
        """


@runtime_checkable
class RowLoops(FeedbackLoops, Protocol):
    """Descent goes row by row of the weight and keeps the slope of the whole row: few columns move, so that costs little."""

    def descend(self, start_IO: Tensor, slope_OI: Tensor, K_II: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
        """Sweeps of descent.

        Args:
            slope_OI: float32, (Q − T) K at the start; changed in place.
            sweeps: most sweeps; a row that did not move in a sweep has arrived.

        Returns:
            The levels, float32 [I, O], and by how much the squared error fell, float64 [O].
        """


ColumnLoops = BlockLoops | RowLoops


@dataclass(frozen=True)
class TorchLoops:
    """By torch, column by column: about six small operations for each."""

    grid: Grid
    columns: Tensor

    def feedback(
        self, start: int, stop: int, *, aim_IO: Tensor, carried: Tensor, factor_II: Tensor, levels_IO: Tensor,
        errors_IO: Tensor,
    ) -> None:  # fmt: skip
        """See ``ColumnLoops``."""
        diagonal = factor_II.diagonal()[start:stop].tolist()
        nearest = self.grid.column_rounder(
            self.columns[start:stop], torch.arange(aim_IO.shape[1], device=aim_IO.device)
        )
        for j in range(start, stop):
            i = j - start
            levels_IO[j] = nearest(i, aim_IO[j] - carried[i] / diagonal[i])
            torch.sub(levels_IO[j], aim_IO[j], out=errors_IO[j])
            carried[i + 1 :].addr_(factor_II[j, j + 1 : stop], errors_IO[j])

    def sweep(
        self, start: int, stop: int, *, slope: Tensor, K_II: Tensor, levels_IO: Tensor, errors_IO: Tensor, rows: Tensor
    ) -> None:
        """See ``ColumnLoops``."""
        diagonal = K_II.diagonal()[start:stop].tolist()
        nearest = self.grid.column_rounder(self.columns[start:stop], rows)
        for j in range(start, stop):
            i = j - start
            level_O = nearest(i, levels_IO[j] - slope[i] / diagonal[i])
            change_O = level_O - levels_IO[j]
            slope[i + 1 :].addr_(K_II[j, j + 1 : stop], change_O)
            levels_IO[j] = level_O
            errors_IO[j] += change_O


def column_loops(grid: Grid, columns: Tensor) -> ColumnLoops:
    """The fastest loops for a grid and the device of ``columns``, int64 [I], the order of the columns."""
    table = None
    if os.environ.get(TORCH_LOOPS) != "1" and is_compiled_for(columns.device):
        table = grid.scale_table(len(columns))
    if table is None:
        return TorchLoops(grid, columns)
    # The compilers take a second to import.
    if columns.device.type == "cpu":
        from qmerge.rounding._cpu_kernels import make_cpu_kernels

        return make_cpu_kernels(table, columns)
    from qmerge.rounding._block_kernels import make_block_kernels

    return make_block_kernels(table, columns)


@cache
def is_compiled_for(device: torch.device) -> bool:
    """Whether the compiler for this device is installed."""
    if device.type not in COMPILERS or find_spec(COMPILERS[device.type]) is None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
