"""output_kept: share of the delta that survived in the layer's output, over the inputs of the calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmerge.metrics.base import MergedRows, Metric
from qmerge.types import dot


class OutputKept(Metric):
    """``kept`` of the layer's output: of change · x along delta · x, averaged over the inputs x (H = E[x xᵀ])."""

    def sums(self, rows: MergedRows) -> dict[str, float]:
        """tr(change H deltaᵀ) and tr(delta H deltaᵀ); empty without inputs."""
        if rows.delta_hessian_OI is None:
            return {}
        return {
            "change_delta": dot(rows.change_OI, rows.delta_hessian_OI),
            "delta_delta": dot(rows.delta_OI, rows.delta_hessian_OI),
        }

    def value(self, sums: Mapping[str, Any]) -> float | None:
        # Missing, not 0, where calibration saw no inputs.
        if not sums.get("delta_delta"):
            return None
        return float(sums["change_delta"] / sums["delta_delta"])


METRIC = OutputKept()
