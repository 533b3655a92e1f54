"""Drop entries at random and rescale, elect a sign per entry, average the deltas that have it (arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qmerge.combine.base import CombineMethod, CombineSettings, dropped_by_density, elected_mean, weighted


class DareTies(CombineMethod):
    """peft's ``dare_ties``, with draws that depend on the position of the entry, not on torch's random state."""

    rowwise = True

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], settings: CombineSettings) -> Tensor:
        kept = dropped_by_density(deltas, settings)
        # Signs are elected before the weights and averaged after them, as in peft.
        return elected_mean(kept, weighted(kept, weights))


METHOD = DareTies()
