"""The weighted sum of deltas without their outliers and without their smallest entries (arXiv 2312.06795)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qmerge.combine.base import CombineMethod, CombineSettings, only_entries, ordered_sum, weighted


class Breadcrumbs(CombineMethod):
    """The paper's β, the fraction of small entries that is removed, is 1 − density − γ."""

    rowwise = False  # outliers and small entries are those of the whole weight

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], settings: CombineSettings) -> Tensor:
        kept = [masked(delta_OI, settings.density, settings.gamma) for delta_OI in deltas]
        return ordered_sum(weighted(kept, weights))


METHOD = Breadcrumbs()


def masked(delta_OI: Tensor, density: float, gamma: float) -> Tensor:
    """A fraction ``density`` of the entries: the largest after the outliers, which are the largest fraction ``gamma``.

    Where the two are more than all entries together, fewer outliers are masked.
    """
    if density >= 1:
        return delta_OI
    entries = delta_OI.numel()
    kept = int(density * entries)
    outliers = min(int(gamma * entries), entries - kept)
    # topk sorts: the outliers come first.
    largest = delta_OI.abs().flatten().topk(outliers + kept).indices
    return only_entries(delta_OI, largest[outliers:])
