"""under_half_gap: share of entries whose delta is less than half the way to the next level on its side."""

from __future__ import annotations

from collections.abc import Mapping

from qmerge.metrics._sample import some_rows
from qmerge.metrics.base import Comparison


def sums(c: Comparison) -> dict[str, float]:
    some = some_rows(c)
    under = some.delta_OI.abs() * 2 < some.grid.gap(some.base_codes_OI, some.delta_OI)
    return {"under": float(under.sum()), "count": float(under.numel())}


def value(total: Mapping[str, float]) -> float | None:
    return total["under"] / total["count"] if total["count"] else None
