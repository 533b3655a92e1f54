"""gap_to_delta = mean distance between neighbouring levels / rms(delta): above 2, little survives nearest rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from qmerge.grids import Grid
from qmerge.metrics._sample import some_rows
from qmerge.types import Comparison


def sums(c: Comparison) -> dict[str, float]:
    some = some_rows(c)
    entries = float(c.delta_OI.numel())
    return {
        "gap": mean_gap(some.grid, some.base_codes_OI, some.delta_OI) * entries,
        "count": entries,
        "delta_delta": c.delta_delta,
    }


def value(total: Mapping[str, float]) -> float | None:
    if not total["delta_delta"]:
        return None
    return (total["gap"] / total["count"]) / math.sqrt(total["delta_delta"] / total["count"])


def mean_gap(grid: Grid, codes_OI: Tensor, direction_OI: Tensor) -> float:
    """Mean distance from the levels to their neighbours, leaving out the ends of the grid."""
    gap_OI = grid.gap(codes_OI, direction_OI)
    inside = gap_OI.isfinite()
    return float(gap_OI.where(inside, gap_OI.new_zeros(())).double().sum() / inside.sum().clamp(min=1))
