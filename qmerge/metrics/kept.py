"""kept = <stored - base, delta> / <delta, delta>: 1 keeps the delta (on average), 0 is the base again."""

from __future__ import annotations

from collections.abc import Mapping

from qmerge.metrics.base import Comparison


def sums(c: Comparison) -> dict[str, float]:
    return {"change_delta": c.change_delta, "delta_delta": c.delta_delta}


def value(total: Mapping[str, float]) -> float | None:
    return total["change_delta"] / total["delta_delta"] if total["delta_delta"] else None
