"""output_noise: the error of the layer's output over what the delta adds to it, for the inputs of the calibration text."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qmerge.metrics.base import Comparison
from qmerge.types import dot


def sums(c: Comparison) -> dict[str, float]:
    """tr(error H errorᵀ) and tr(delta H deltaᵀ), H = E[x xᵀ]; {} without inputs."""
    if c.hessian_II is None or c.seen_delta_OI is None:
        return {}
    error_OI = c.stored_OI - c.merged_OI
    return {"error_error": dot(error_OI @ c.hessian_II, error_OI), "delta_delta": dot(c.delta_OI, c.seen_delta_OI)}


def value(total: Mapping[str, float]) -> float | None:
    return math.sqrt(max(0.0, total["error_error"]) / total["delta_delta"]) if total.get("delta_delta") else None
