"""gap_to_delta = mean distance between neighbouring levels / rms(delta): above 2, little survives nearest rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qmerge.grids import Grid
from qmerge.metrics._sample import SampledMetric
from qmerge.metrics.base import MergedRows


class GapToDelta(SampledMetric):
    """How coarse the grid is for this delta: gaps from a sample of the rows, the delta from all of them."""

    def sums(self, rows: MergedRows) -> dict[str, float | Tensor]:
        return {**super().sums(rows), "count": float(rows.base_OI.numel()), "delta_delta": rows.delta_delta}

    def sample_sums(self, sample: MergedRows) -> dict[str, float]:
        gap, inside = finite_sum(sample.gap_OI)
        return {"gap": gap, "inside": inside}

    def value(self, sums: Mapping[str, Any]) -> float | None:
        if not sums["delta_delta"] or not sums["inside"]:
            return None
        rms = math.sqrt(sums["delta_delta"] / sums["count"])
        return float((sums["gap"] / sums["inside"]) / rms)


METRIC = GapToDelta()


def gap_sum(grid: Grid, codes_OI: Tensor, direction_OI: Tensor) -> tuple[float, float]:
    """Sum of the distances from the levels to their neighbours, and their number; the ends of the grid are left out.

    Args:
        codes_OI: codes on ``grid``.
        direction_OI: its sign says on which side the neighbour is.
    """
    return finite_sum(grid.gap(codes_OI, direction_OI))


def finite_sum(gap_OI: Tensor) -> tuple[float, float]:
    """Sum of the finite distances, and their number."""
    inside = gap_OI.isfinite()
    finite_gap_OI = gap_OI.where(inside, gap_OI.new_zeros(()))
    return float(finite_gap_OI.double().sum()), float(inside.sum())
