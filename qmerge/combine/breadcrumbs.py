"""The weighted sum of deltas without their outliers and without their smallest entries (arXiv 2312.06795)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qmerge.combine.base import Settings, only, ordered_sum, weighted

ROWWISE = False


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """float32 [O, I] each, whole → [O, I]. The paper's β, the share of small entries, is 1 − density − γ."""
    kept = [masked(delta_OI, settings.density, settings.gamma) for delta_OI in deltas]
    return ordered_sum(weighted(kept, weights))


def masked(delta_OI: Tensor, density: float, gamma: float) -> Tensor:
    """The ``density`` share of entries that comes after the ``gamma`` share of the largest; where the two are more than
    all, fewer outliers are masked."""
    if density >= 1:
        return delta_OI
    entries = delta_OI.numel()
    kept = int(density * entries)
    outliers = min(int(gamma * entries), entries - kept)
    largest = delta_OI.abs().flatten().topk(outliers + kept).indices
    return only(delta_OI, largest[outliers:])
