"""codes_changed: share of stored codes that differ from what the base alone would be stored as."""

from __future__ import annotations

from collections.abc import Mapping

from qmerge.metrics.base import Comparison


def sums(c: Comparison) -> dict[str, float]:
    return {"changed": float((c.codes_OI != c.base_codes_OI).sum()), "count": float(c.codes_OI.numel())}


def value(total: Mapping[str, float]) -> float | None:
    return total["changed"] / total["count"] if total["count"] else None
