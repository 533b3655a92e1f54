"""Stored weights seen another way: quantized on the fly, or transposed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qmerge.formats._base import Format, Stored
from qmerge.types import Options, Rows


class OnTheFly(Stored):
    """A dense weight as quantization on the fly leaves it: what an adapter saw that was trained on such a base.

    A fresh grid over all row blocks, rounded to nearest, as the stock loader does.
    """

    def __init__(
        self, dense: Stored, shape: tuple[int, int], form: Format, options: Options, blocks: Iterable[Rows]
    ) -> None:
        self._dense, self._form = dense, form
        scales = [form.scales(self._loaded(rows), options) for rows in blocks]
        self._fresh = form.grid(torch.cat(scales), shape, options)
        self.grid = self._fresh.as_stored()

    def codes(self, rows: Rows) -> Tensor:
        return self._fresh.rows(rows).nearest(self._loaded(rows))

    def values(self, rows: Rows) -> Tensor:
        return self.grid.rows(rows).decode(self.codes(rows))

    def _loaded(self, rows: Rows) -> Tensor:
        return self._form.as_loaded(self._dense.values(rows))


class Transposed(Stored):
    """A dense [I, O] weight (GPT-2's Conv1D) as [O, I]."""

    def __init__(self, dense: Stored, columns: int) -> None:
        self._dense, self._all = dense, Rows(0, columns)
        self.grid = dense.grid

    def codes(self, rows: Rows) -> Tensor:
        return self._dense.codes(self._all).T[rows.start : rows.stop].contiguous()

    def values(self, rows: Rows) -> Tensor:
        return self._dense.values(self._all).T[rows.start : rows.stop].contiguous()
