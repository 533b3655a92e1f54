"""The weighted sum of the deltas, cut to its largest singular parts (svd of peft's add_weighted_adapter)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qmerge.combine.base import CombineMethod, CombineSettings, ordered_sum, weighted


class Svd(CombineMethod):
    """The nearest delta of rank ``settings.rank`` (Eckart and Young 1936). Without a rank nothing is cut."""

    rowwise = False  # a decomposition needs the whole delta

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], settings: CombineSettings) -> Tensor:
        total_OI = ordered_sum(weighted(deltas, weights))
        rank = settings.rank
        if rank is None or rank >= min(total_OI.shape):
            return total_OI
        u_OK, s_K, vt_KI = torch.linalg.svd(total_OI, full_matrices=False)
        nearest_OI: Tensor = (u_OK[:, :rank] * s_K[:rank]) @ vt_KI[:rank]
        return nearest_OI


METHOD = Svd()
