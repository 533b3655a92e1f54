"""Round to nearest: the smallest error per entry; forgets every delta that stays under half a gap."""

from __future__ import annotations

from torch import Tensor

from qmerge.grids import Grid
from qmerge.rounding.base import RoundingContext


def choose(values_OI: Tensor, grid: Grid, context: RoundingContext) -> Tensor:
    """Codes of the nearest levels."""
    return grid.nearest(values_OI, context.near_OI)
