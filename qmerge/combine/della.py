"""Drop entries at random, small ones more often; elect a sign, average the deltas that have it (arXiv 2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qmerge.combine.base import CombineMethod, CombineSettings, dropped, elected_mean, weighted


class Della(CombineMethod):
    """Drop (MagPrune), elect by the weighted deltas, fuse by the mean of the elected. The weights include the paper's λ."""

    rowwise = True  # entries are ranked within their row, which the paper found to be best

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], settings: CombineSettings) -> Tensor:
        kept = deltas
        if settings.density < 1:
            probabilities = [keep_probability(delta_OI, settings.density, settings.epsilon) for delta_OI in deltas]
            kept = dropped(deltas, probabilities, settings)
        values = weighted(kept, weights)
        return elected_mean(values, values)


METHOD = Della()


def keep_probability(delta_OI: Tensor, density: float, epsilon: float) -> Tensor:
    """float32 [O, I]: linear in the rank of the entry within its row, ``density`` on average.

    It runs from density − ε/2 for the smallest entry of a row to density + ε/2 for its largest. A window wider than the density,
    or than its distance to 1, is narrowed to that: no entry that stays is multiplied by more than 2 / density.
    """
    columns = delta_OI.shape[1]
    width = min(epsilon, density, 1 - density)
    if columns > 1:
        ranks_I = torch.linspace(-0.5, 0.5, columns, device=delta_OI.device)
    else:
        ranks_I = delta_OI.new_zeros(1)  # linspace of one step would give −0.5
    order_OI = delta_OI.abs().argsort(dim=1, stable=True)
    return torch.empty_like(delta_OI).scatter_(1, order_OI, (ranks_I * width + density).expand_as(delta_OI))
