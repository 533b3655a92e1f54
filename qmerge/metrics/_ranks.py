"""Survival of each rank of a delta: u_kᵀ (stored − base) v_k / s_k, with s_k u_k v_kᵀ the delta's k-th singular part."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qmerge.metrics.base import Comparison


def rank_sums(c: Comparison) -> dict[str, Tensor]:
    """float32 [R] each: what landed along every singular direction, and its singular value (shared out over rows)."""
    directions = c.update.directions()
    if directions is None:
        return {}
    u_OR, s_R, v_IR = directions
    u_rows = u_OR[c.rows.start : c.rows.stop]
    landed_R = ((c.change_OI @ v_IR) * u_rows).sum(dim=0)
    return {"landed": landed_R, "meant": s_R * u_rows.square().sum(dim=0)}


def rank_values(total: Mapping[str, list[float]]) -> list[float]:
    """Survival of every rank that carries anything."""
    pairs = list(zip(total.get("landed", []), total.get("meant", []), strict=True))
    largest = max((meant for _, meant in pairs), default=0.0)
    return [landed / meant for landed, meant in pairs if meant > 1e-6 * largest]
