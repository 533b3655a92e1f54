"""The weighted sum of deltas whose entries were dropped at random and rescaled by --density (arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qmerge.combine.base import CombineMethod, CombineSettings, dropped_by_density, ordered_sum, weighted


class DareLinear(CombineMethod):
    """peft's ``dare_linear``, with draws that depend on the position of the entry, not on torch's random state."""

    rowwise = True

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], settings: CombineSettings) -> Tensor:
        return ordered_sum(weighted(dropped_by_density(deltas, settings), weights))


METHOD = DareLinear()
