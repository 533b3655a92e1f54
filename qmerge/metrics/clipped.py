"""clipped: share of merged values that lie more than half a step past the end of the grid, and are cut off there."""

from __future__ import annotations

from collections.abc import Mapping

from qmerge.metrics._sample import some_rows
from qmerge.metrics.base import Comparison


def sums(c: Comparison) -> dict[str, float]:
    some = some_rows(c)
    error_OI = some.merged_OI - some.stored_OI
    at_end_OI = some.grid.gap(some.codes_OI, error_OI).isinf()
    step_OI = some.grid.gap(some.codes_OI, -error_OI)
    outside = at_end_OI & (error_OI.abs() > 0.5 * step_OI)
    return {"outside": float(outside.sum()), "entries": float(error_OI.numel())}


def value(total: Mapping[str, float]) -> float | None:
    return total["outside"] / total["entries"] if total["entries"] else None
