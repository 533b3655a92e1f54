"""The weighted sum of deltas whose entries were dropped at random and rescaled by --density (arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qmerge.combine.base import Settings, dropped, ordered_sum, weighted

ROWWISE = True


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """float32 [O, I] each → [O, I]; peft's ``dare_linear``, with draws that depend on the position alone."""
    kept = dropped(deltas, [settings.density] * len(deltas), settings) if settings.density < 1 else deltas
    return ordered_sum(weighted(kept, weights))
