"""A weight of a checkpoint that is open for reading."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from qmerge.grids import Grid
from qmerge.types import Rows


class Stored(ABC):
    """One weight, opened for reading some rows at a time. Its scales are in memory, its codes are not."""

    grid: Grid
    """The grid of the whole weight, which its codes belong to."""

    @abstractmethod
    def codes(self, rows: Rows) -> Tensor:
        """Codes on ``grid``, [rows, I]."""

    def values(self, rows: Rows) -> Tensor:
        """float32 [rows, I], bit-identical to the format's own library when it dequantizes to float32."""
        return self.grid.rows(rows).decode(self.codes(rows))


class Transposed(Stored):
    """A dense weight stored as [I, O] (GPT-2's Conv1D), read as [O, I]."""

    def __init__(self, dense: Stored, columns: int) -> None:
        self._dense = dense
        self._all_rows = Rows(0, columns)
        self.grid = dense.grid

    def codes(self, rows: Rows) -> Tensor:
        return self._dense.codes(self._all_rows).T[rows.start : rows.stop].contiguous()

    def values(self, rows: Rows) -> Tensor:
        return self._dense.values(self._all_rows).T[rows.start : rows.stop].contiguous()


class TransposedStack(Stored):
    """A stack [E, I, O], stored with one row for each matrix, read as a matrix [E·O, I]: matrix after matrix."""

    def __init__(self, stack: Stored, shape: tuple[int, ...]) -> None:
        self._stack = stack
        _, self._columns, self._rows = shape
        self.grid = stack.grid

    def codes(self, rows: Rows) -> Tensor:
        return self._matrices(self._stack.codes, rows)

    def values(self, rows: Rows) -> Tensor:
        return self._matrices(self._stack.values, rows)

    def _matrices(self, read: Callable[[Rows], Tensor], rows: Rows) -> Tensor:
        """Some rows, from the whole matrices that they belong to."""
        matrices = Rows(rows.start // self._rows, -(-rows.stop // self._rows))
        stack_EIO = read(matrices).view(len(matrices), self._columns, self._rows)
        skipped = matrices.start * self._rows
        values_OI = stack_EIO.transpose(1, 2).flatten(0, 1)
        return values_OI[rows.start - skipped : rows.stop - skipped].contiguous()
