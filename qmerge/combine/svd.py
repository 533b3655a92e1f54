"""The weighted sum of the deltas, cut to its largest singular parts (add_weighted_adapter's svd in peft)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qmerge.combine.base import Settings, ordered_sum, weighted

ROWWISE = False


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """float32 [O, I] each, whole → [O, I] of rank ``settings.rank``: the nearest of that rank (Eckart, Young 1936). Without
    a rank nothing is cut."""
    total_OI = ordered_sum(weighted(deltas, weights))
    if settings.rank is None or settings.rank >= min(total_OI.shape):
        return total_OI
    u_OK, s_K, vt_KI = torch.linalg.svd(total_OI, full_matrices=False)
    rank = settings.rank
    nearest_OI: Tensor = (u_OK[:, :rank] * s_K[:rank]) @ vt_KI[:rank]
    return nearest_OI
