"""rank_kept_median: survival of the middle rank of the delta."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from qmerge.metrics._ranks import rank_sums as sums
from qmerge.metrics._ranks import rank_values


def value(total: Mapping[str, list[float]]) -> float | None:
    values = rank_values(total)
    return statistics.median(values) if values else None


__all__ = ["sums", "value"]
