"""Round to nearest: the smallest error per entry, but changes below half a gap are lost."""

from __future__ import annotations

from torch import Tensor

from qmerge.grids import Grid
from qmerge.rounding.base import Rounding, RoundingContext


class Nearest(Rounding):
    """The code of the nearest level, ties as the format's own library breaks them."""

    def choose(self, values_OI: Tensor, grid: Grid, context: RoundingContext) -> Tensor:
        return grid.nearest(values_OI, context.base_codes_OI)


ROUNDING = Nearest()
