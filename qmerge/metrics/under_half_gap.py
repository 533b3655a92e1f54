"""under_half_gap: share of entries whose delta is less than half the way to the next level on its side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmerge.metrics._sample import SampledMetric
from qmerge.metrics.base import MergedRows, ratio


class UnderHalfGap(SampledMetric):
    """Share of the entries whose delta nearest rounding would forget, from a sample of the rows."""

    def sample_sums(self, sample: MergedRows) -> dict[str, float]:
        under = sample.delta_OI.abs() * 2 < sample.gap_OI
        return {"under": float(under.sum()), "count": float(under.numel())}

    def value(self, sums: Mapping[str, Any]) -> float | None:
        return ratio(sums["under"], sums["count"])


METRIC = UnderHalfGap()
