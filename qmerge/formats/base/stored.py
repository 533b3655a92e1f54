"""A weight of a checkpoint that is open for reading."""

from __future__ import annotations

from abc import ABC, abstractmethod

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
