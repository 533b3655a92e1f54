"""clipped: share of merged values that are more than half a step past the end of the grid, and are cut off there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmerge.metrics._sample import SampledMetric
from qmerge.metrics.base import MergedRows, ratio


class Clipped(SampledMetric):
    """Share of the entries that the delta takes past the highest or lowest level, from a sample of the rows."""

    def sample_sums(self, sample: MergedRows) -> dict[str, float]:
        error_OI = sample.merged_OI - sample.stored_OI
        # At an end of the grid there is no level on the side of the error; the step on the other side is the unit.
        at_end_OI = sample.grid.gap(sample.codes_OI, error_OI).isinf()
        step_OI = sample.grid.gap(sample.codes_OI, -error_OI)
        outside = at_end_OI & (error_OI.abs() > 0.5 * step_OI)
        return {"outside": float(outside.sum()), "entries": float(error_OI.numel())}

    def value(self, sums: Mapping[str, Any]) -> float | None:
        return ratio(sums["outside"], sums["entries"])


METRIC = Clipped()
