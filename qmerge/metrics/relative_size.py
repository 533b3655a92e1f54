"""relative_size = rms(delta) / rms(base): short QLoRA runs on real models have 0.0002 to 0.01."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qmerge.metrics.base import MergedRows, Metric


class RelativeSize(Metric):
    """Size of the delta, relative to the weight."""

    def sums(self, rows: MergedRows) -> dict[str, float]:
        return {"delta_delta": rows.delta_delta, "base_base": rows.dots.base_base}

    def value(self, sums: Mapping[str, Any]) -> float | None:
        if not sums["base_base"]:
            return None
        return math.sqrt(sums["delta_delta"] / sums["base_base"])


METRIC = RelativeSize()
