"""The weighted sum of the deltas, w₁Δ₁ + w₂Δ₂ + … (task arithmetic, arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qmerge.combine.base import CombineMethod, CombineSettings, ordered_sum, weighted


class Linear(CombineMethod):
    """peft's ``task_arithmetic``: products in float32, added in the given order."""

    rowwise = True

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], settings: CombineSettings) -> Tensor:
        return ordered_sum(weighted(deltas, weights))


METHOD = Linear()
