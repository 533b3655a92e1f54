"""output_noise: error of the layer's output / change that the delta makes to it, over the calibration text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qmerge.metrics.base import MergedRows, Metric
from qmerge.types import dot


class OutputNoise(Metric):
    """``noise`` of the layer's output: the rms of error · x over that of delta · x, for the inputs x (H = E[x xᵀ])."""

    def sums(self, rows: MergedRows) -> dict[str, float]:
        """tr(error H errorᵀ) and tr(delta H deltaᵀ); empty without inputs."""
        if rows.hessian_II is None or rows.delta_hessian_OI is None:
            return {}
        error_OI = rows.stored_OI - rows.merged_OI
        return {
            "error_error": dot(error_OI @ rows.hessian_II, error_OI),
            "delta_delta": dot(rows.delta_OI, rows.delta_hessian_OI),
        }

    def value(self, sums: Mapping[str, Any]) -> float | None:
        # Missing, not 0, where calibration saw no inputs.
        if not sums.get("delta_delta"):
            return None
        # H is a sum of squares, but in float32 an error of nearly 0 may come out below 0.
        return math.sqrt(max(0.0, sums["error_error"]) / sums["delta_delta"])


METRIC = OutputNoise()
