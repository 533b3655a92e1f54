"""Drop entries at random, small ones of a row more often; elect a sign, average those that have it (arXiv 2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qmerge.combine.base import Settings, dropped, elected_mean, weighted

ROWWISE = True  # entries are ranked within their row, which the paper found to be best


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """float32 [O, I] each → [O, I]: drop (MagPrune), elect by the weighted deltas, fuse by the mean of the elected. The
    factor λ of the paper lies in the weights."""
    kept = deltas
    if settings.density < 1:
        kept = dropped(deltas, [keep_probability(d, settings.density, settings.epsilon) for d in deltas], settings)
    values = weighted(kept, weights)
    return elected_mean(values, values)


def keep_probability(delta_OI: Tensor, density: float, epsilon: float) -> Tensor:
    """float32 [O, I]: from density − ε/2 for the smallest of a row to density + ε/2 for its largest, linear in the rank
    and ``density`` on average. A window wider than the density, or than its distance to 1, is narrowed to that: no entry
    that stays is multiplied by more than 2 / density."""
    columns = delta_OI.shape[1]
    width = min(epsilon, density, 1 - density)
    ranks_I = torch.linspace(-0.5, 0.5, columns, device=delta_OI.device) if columns > 1 else delta_OI.new_zeros(1)
    order_OI = delta_OI.abs().argsort(dim=1, stable=True)
    return torch.empty_like(delta_OI).scatter_(1, order_OI, (ranks_I * width + density).expand_as(delta_OI))
