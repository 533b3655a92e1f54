"""relative_size = rms(delta) / rms(base): typical QLoRA adapters have 0.003 to 0.05."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qmerge.metrics.base import Comparison
from qmerge.types import dot


def sums(c: Comparison) -> dict[str, float]:
    return {"delta_delta": c.delta_delta, "base_base": dot(c.base_OI, c.base_OI)}


def value(total: Mapping[str, float]) -> float | None:
    return math.sqrt(total["delta_delta"] / total["base_base"]) if total["base_base"] else None
