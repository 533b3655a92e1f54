"""output_kept: the share of the delta that survived in the layer's output, over the inputs of the calibration text."""

from __future__ import annotations

from collections.abc import Mapping

from qmerge.metrics.base import Comparison
from qmerge.types import dot


def sums(c: Comparison) -> dict[str, float]:
    """tr(change H deltaᵀ) and tr(delta H deltaᵀ), H = E[x xᵀ]: ⟨change x, delta x⟩ on average; {} without inputs."""
    if c.seen_delta_OI is None:
        return {}
    return {"change_delta": dot(c.change_OI, c.seen_delta_OI), "delta_delta": dot(c.delta_OI, c.seen_delta_OI)}


def value(total: Mapping[str, float]) -> float | None:
    return total["change_delta"] / total["delta_delta"] if total.get("delta_delta") else None
