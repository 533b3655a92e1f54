"""Trim each delta to its largest entries, elect a sign per entry, average those that have it (arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qmerge.combine.base import Settings, elected_mean, trimmed, weighted

ROWWISE = False


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """float32 [O, I] each, whole → [O, I]; peft's ``ties``: signs are elected by the trimmed deltas, before the weights,
    and the mean is over the number of adapters that agree."""
    kept = [trimmed(delta_OI, settings.density) for delta_OI in deltas]
    return elected_mean(kept, weighted(kept, weights))
