"""cosine between the actual change (stored - base) and the intended one (delta)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qmerge.metrics.base import MergedRows, Metric


class Cosine(Metric):
    """Whether the actual change points where the intended one does, whatever its size."""

    def sums(self, rows: MergedRows) -> dict[str, float]:
        return {
            "change_delta": rows.dots.change_delta,
            "change_change": rows.dots.change_change,
            "delta_delta": rows.delta_delta,
        }

    def value(self, sums: Mapping[str, Any]) -> float | None:
        if not sums["delta_delta"]:
            return None
        norms = math.sqrt(sums["change_change"] * sums["delta_delta"])
        # No change at all: the delta is lost, which is a cosine of 0 and not a missing number.
        return float(sums["change_delta"] / norms) if norms else 0.0


METRIC = Cosine()
