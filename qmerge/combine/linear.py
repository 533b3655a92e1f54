"""The weighted sum of the deltas, w₁Δ₁ + w₂Δ₂ + … (task arithmetic, arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qmerge.combine.base import Settings, ordered_sum, weighted

ROWWISE = True


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """float32 [O, I] each → [O, I]: products in float32, added in the given order; peft's ``task_arithmetic``."""
    return ordered_sum(weighted(deltas, weights))
