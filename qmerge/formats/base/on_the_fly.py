"""A dense weight as a loader quantizes it on the fly."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qmerge.formats.base.format import OptionsT
from qmerge.formats.base.stored import Stored
from qmerge.formats.base.target import TargetFormat
from qmerge.types import Rows


class OnTheFly(Stored):
    """A dense weight after quantization on the fly: the values that an adapter trained on such a base has seen.

    As the stock loader does, it makes a fresh grid from all row blocks and rounds to nearest.
    """

    def __init__(
        self,
        dense: Stored,
        shape: tuple[int, int],
        target_format: TargetFormat[OptionsT],
        options: OptionsT,
        blocks: Iterable[Rows],
    ) -> None:
        self._dense = dense
        self._target_format = target_format
        scales = [target_format.scales(self._loaded(rows), options) for rows in blocks]
        self._fresh_grid = target_format.grid(torch.cat(scales), shape, options)
        self.grid = self._fresh_grid.as_stored()

    def codes(self, rows: Rows) -> Tensor:
        return self._fresh_grid.rows(rows).nearest(self._loaded(rows))

    def _loaded(self, rows: Rows) -> Tensor:
        return self._target_format.as_loaded(self._dense.values(rows))
