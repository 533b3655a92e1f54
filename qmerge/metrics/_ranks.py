"""Survival of each rank of a delta: u_kᵀ (stored − base) v_k / s_k, with s_k u_k v_kᵀ the delta's k-th singular part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from qmerge.metrics.base import MergedRows, Metric

NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest one are rounding errors of the decomposition, not ranks of the delta."""


class RankMetric(Metric):
    """A number made of the survival of every rank. Subclasses define ``value``."""

    def sums(self, rows: MergedRows) -> dict[str, float | Tensor]:
        """``MergedRows.rank_sums``."""
        return {**rows.rank_sums}


def rank_survival(sums: Mapping[str, Sequence[float]]) -> list[float]:
    """landed / meant of every rank whose singular value is not negligible."""
    pairs = list(zip(sums.get("landed", []), sums.get("meant", []), strict=True))
    largest = max((meant for _, meant in pairs), default=0.0)
    return [landed / meant for landed, meant in pairs if meant > NEGLIGIBLE * largest]
