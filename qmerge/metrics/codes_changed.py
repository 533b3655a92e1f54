"""codes_changed: share of stored codes that differ from the codes of the base alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmerge.metrics._dots import count_different
from qmerge.metrics.base import MergedRows, Metric, ratio


class CodesChanged(Metric):
    """Share of the entries that the merge moved to another level."""

    def sums(self, rows: MergedRows) -> dict[str, float]:
        changed = count_different(rows.codes_OI, rows.base_codes_OI)
        return {"changed": float(changed), "count": float(rows.codes_OI.numel())}

    def value(self, sums: Mapping[str, Any]) -> float | None:
        return ratio(sums["changed"], sums["count"])


METRIC = CodesChanged()
