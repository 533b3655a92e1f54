"""noise = |stored - merged| / |delta|: 0 is an exact merge, 1 is as far off as the base itself."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qmerge.metrics.base import Comparison
from qmerge.types import dot


def sums(c: Comparison) -> dict[str, float]:
    error_OI = c.stored_OI - c.merged_OI
    return {"error_error": dot(error_OI, error_OI), "delta_delta": c.delta_delta}


def value(total: Mapping[str, float]) -> float | None:
    return math.sqrt(total["error_error"] / total["delta_delta"]) if total["delta_delta"] else None
