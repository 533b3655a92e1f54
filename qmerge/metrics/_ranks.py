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
        """float32 [R] each: ``landed``, the change along every singular direction, and ``meant``, its singular value.

        A row block has its rows' share of both. Empty for a delta without small factors.
        """
        directions = rows.update.directions()
        landed_R = rows.change_along_ranks_R
        if directions is None or landed_R is None:
            return {}
        u_OR, s_R, _ = directions
        u_rows = u_OR[rows.position.start : rows.position.stop]
        # u_k has norm 1 over all rows of the weight: the shares of its rows add up to 1.
        return {"landed": landed_R, "meant": s_R * u_rows.square().sum(dim=0)}


def rank_survival(sums: Mapping[str, Sequence[float]]) -> list[float]:
    """landed / meant of every rank whose singular value is not negligible."""
    pairs = list(zip(sums.get("landed", []), sums.get("meant", []), strict=True))
    largest = max((meant for _, meant in pairs), default=0.0)
    return [landed / meant for landed, meant in pairs if meant > NEGLIGIBLE * largest]
