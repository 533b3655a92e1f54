"""rank_kept_min: survival of the rank of the delta that survived worst."""

from __future__ import annotations

from collections.abc import Mapping

from qmerge.metrics._ranks import rank_sums as sums
from qmerge.metrics._ranks import rank_values


def value(total: Mapping[str, list[float]]) -> float | None:
    return min(rank_values(total), default=None)


__all__ = ["sums", "value"]
