"""Survival of each rank of a delta: u_kᵀ (stored − base) v_k / s_k, with s_k u_k v_kᵀ the delta's k-th singular part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from qmerge.metrics.base import MergedRows, Metric, ranks_by_size


class RankMetric(Metric):
    """A number made of the survival of every rank. Subclasses define ``value``."""

    def sums(self, rows: MergedRows) -> dict[str, float | Tensor]:
        """``MergedRows.rank_sums``."""
        return {**rows.rank_sums}


def rank_survival(sums: Mapping[str, Sequence[float]]) -> list[float]:
    """landed / meant of every rank."""
    return [landed / meant for landed, meant in ranks_by_size(sums)]
