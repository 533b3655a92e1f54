"""The weighted sum of the largest entries of each delta, a share of them by --density (peft's magnitude_prune)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qmerge.combine.base import Settings, ordered_sum, trimmed, weighted

ROWWISE = False


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """float32 [O, I] each, whole → [O, I]; peft's ``magnitude_prune``."""
    return ordered_sum(weighted([trimmed(delta_OI, settings.density) for delta_OI in deltas], weights))
