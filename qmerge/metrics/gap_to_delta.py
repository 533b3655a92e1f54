"""gap_to_delta = mean distance between neighbouring levels / rms(delta): above 2, little survives nearest rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from qmerge.grids import Grid
from qmerge.metrics._sample import some_rows
from qmerge.metrics.base import Comparison


def sums(c: Comparison) -> dict[str, float]:
    some = some_rows(c)
    gap, inside = gap_sum(some.grid, some.base_codes_OI, some.delta_OI)
    return {"gap": gap, "inside": inside, "count": float(c.delta_OI.numel()), "delta_delta": c.delta_delta}


def value(total: Mapping[str, float]) -> float | None:
    if not total["delta_delta"] or not total["inside"]:
        return None
    return (total["gap"] / total["inside"]) / math.sqrt(total["delta_delta"] / total["count"])


def gap_sum(grid: Grid, codes_OI: Tensor, direction_OI: Tensor) -> tuple[float, float]:
    """Sum of the distances from the levels to their neighbours, and their number; the ends of the grid are left out."""
    gap_OI = grid.gap(codes_OI, direction_OI)
    inside = gap_OI.isfinite()
    return float(gap_OI.where(inside, gap_OI.new_zeros(())).double().sum()), float(inside.sum())
