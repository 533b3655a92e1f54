"""cosine between what did change (stored - base) and what was meant to (delta)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qmerge.metrics.base import Comparison


def sums(c: Comparison) -> dict[str, float]:
    return {"change_delta": c.change_delta, "change_change": c.change_change, "delta_delta": c.delta_delta}


def value(total: Mapping[str, float]) -> float | None:
    if not total["delta_delta"]:
        return None
    scale = math.sqrt(total["change_change"] * total["delta_delta"])
    return total["change_delta"] / scale if scale else 0.0
