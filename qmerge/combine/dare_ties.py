"""Drop entries at random and rescale, elect a sign per entry, average those that have it (arXiv 2311.03099, 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qmerge.combine.base import Settings, dropped, elected_mean, weighted

ROWWISE = True


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """float32 [O, I] each → [O, I]; peft's ``dare_ties``, with draws that depend on the position alone."""
    kept = dropped(deltas, [settings.density] * len(deltas), settings) if settings.density < 1 else deltas
    return elected_mean(kept, weighted(kept, weights))
