"""noise = |stored - merged| / |delta|: 0 is an exact merge, 1 is as far off as the base itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qmerge.metrics.base import MergedRows, Metric


class Noise(Metric):
    """The rounding error, relative to the delta."""

    def sums(self, rows: MergedRows) -> dict[str, float]:
        return {"error_error": rows.dots.error_error, "delta_delta": rows.delta_delta}

    def value(self, sums: Mapping[str, Any]) -> float | None:
        if not sums["delta_delta"]:
            return None
        return math.sqrt(sums["error_error"] / sums["delta_delta"])


METRIC = Noise()
