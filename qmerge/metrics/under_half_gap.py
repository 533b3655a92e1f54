"""under_half_gap: share of entries whose delta is less than half the way to the next level on its side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmerge.metrics._sample import first_rows
from qmerge.metrics.base import MergedRows, Metric, ratio


class UnderHalfGap(Metric):
    """Share of the entries whose delta nearest rounding would forget, from a sample of the rows."""

    def sums(self, rows: MergedRows) -> dict[str, float]:
        sample = first_rows(rows)
        gap_OI = sample.grid.gap(sample.base_codes_OI, sample.delta_OI)
        under = sample.delta_OI.abs() * 2 < gap_OI
        return {"under": float(under.sum()), "count": float(under.numel())}

    def value(self, sums: Mapping[str, Any]) -> float | None:
        return ratio(sums["under"], sums["count"])


METRIC = UnderHalfGap()
