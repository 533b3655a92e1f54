"""predicted_kept: share that nearest rounding keeps of a Gaussian delta of this size, by a closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qmerge.grids import Grid
from qmerge.metrics._sample import SampledMetric
from qmerge.metrics.base import MergedRows, ratio


class PredictedKept(SampledMetric):
    """``kept`` as it would be for nearest rounding, from a sample of the rows; weights count by their ‖delta‖²."""

    def sample_sums(self, sample: MergedRows) -> dict[str, float]:
        kept = expected_kept(sample.base_OI, sample.delta_OI.norm(dim=1), sample.grid)
        weight = sample.delta_delta * sample.stands_for
        return {"expected": (kept or 0.0) * weight, "weight": weight}

    def value(self, sums: Mapping[str, Any]) -> float | None:
        return ratio(sums["expected"], sums["weight"])


METRIC = PredictedKept()


def expected_kept(base_OI: Tensor, row_norms_O: Tensor, grid: Grid) -> float | None:
    """Expected share of the delta that nearest rounding keeps; None for a delta of zero.

    Each row's delta is taken as Gaussian with the row's own rms, and rows count by their ‖delta‖².

    Args:
        base_OI: float32, the values that the delta is added to.
        row_norms_O: float32, ‖delta‖ of every row.
        grid: the grid of these rows.
    """
    variance_O = row_norms_O.square() / base_OI.shape[1]
    # Rows without a delta get any sigma but 0, which would divide by 0: they count with weight 0.
    sigma_O = variance_O.where(variance_O > 0, variance_O.new_ones(())).sqrt()
    kept_O = grid.expected_slope(base_OI, sigma_O[:, None]).mean(dim=1)
    total_variance = float(variance_O.double().sum())
    return ratio(float((kept_O * variance_O).double().sum()), total_variance)
