"""Trim each delta to its largest entries, elect a sign per entry, average the deltas that have it (arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qmerge.combine.base import CombineMethod, CombineSettings, elected_mean, trimmed, weighted


class Ties(CombineMethod):
    """peft's ``ties``: the trimmed deltas elect the signs, before the weights; the mean is over the adapters that agree."""

    rowwise = False  # the largest entries are those of the whole weight

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], settings: CombineSettings) -> Tensor:
        kept = [trimmed(delta_OI, settings.density) for delta_OI in deltas]
        # Signs are elected before the weights and averaged after them, as in peft.
        return elected_mean(kept, weighted(kept, weights))


METHOD = Ties()
