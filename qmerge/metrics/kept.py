"""kept = <stored - base, delta> / <delta, delta>: 1 keeps the delta (on average), 0 is the base again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmerge.metrics.base import MergedRows, Metric, ratio


class Kept(Metric):
    """Share of the delta that survives, as the projection of the actual change on the intended one."""

    def sums(self, rows: MergedRows) -> dict[str, float]:
        return {"change_delta": rows.dots.change_delta, "delta_delta": rows.delta_delta}

    def value(self, sums: Mapping[str, Any]) -> float | None:
        return ratio(sums["change_delta"], sums["delta_delta"])


METRIC = Kept()
