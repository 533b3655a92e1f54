"""The weighted sum of the largest entries of each delta, a fraction of them by --density (peft's magnitude_prune)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qmerge.combine.base import CombineMethod, CombineSettings, ordered_sum, trimmed, weighted


class MagnitudePrune(CombineMethod):
    """peft's ``magnitude_prune``."""

    rowwise = False  # the largest entries are those of the whole weight

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], settings: CombineSettings) -> Tensor:
        kept = [trimmed(delta_OI, settings.density) for delta_OI in deltas]
        return ordered_sum(weighted(kept, weights))


METHOD = MagnitudePrune()
