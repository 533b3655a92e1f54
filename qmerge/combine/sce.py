"""Keep entries where the deltas differ most, weight by energy, average those of the elected sign (arXiv 2408.07990)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qmerge.combine.base import CombineMethod, CombineSettings, only_entries, ordered_sum, weighted


class Sce(CombineMethod):
    """Select, calculate, erase, on the deltas times their weights (the paper has no weights).

    Select: of the entries that differ, the fraction ``density`` with the largest variance over adapters. Calculate: η, an
    adapter's share of the sum of squares. Erase: entries against the sign of the sum. The others are averaged by η.
    """

    rowwise = False  # variances are ranked over the whole weight

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], settings: CombineSettings) -> Tensor:
        values = selected(weighted(deltas, weights), settings.density)
        sign_OI = torch.where(ordered_sum(values) >= 0, 1.0, -1.0)
        total_OI = torch.zeros_like(sign_OI)
        divisor_OI = torch.zeros_like(sign_OI)
        for value_OI, share in zip(values, energy_shares(values), strict=True):
            share_OI = share * (value_OI.sign() == sign_OI)
            total_OI += value_OI * share_OI
            divisor_OI += share_OI
        # Where no delta has the elected sign, total and divisor are 0.
        return total_OI / torch.where(divisor_OI == 0, 1.0, divisor_OI)


METHOD = Sce()


def selected(values: list[Tensor], density: float) -> list[Tensor]:
    """The selected entries of every delta; 0 elsewhere.

    A single delta has no variance: its largest entries are taken, as if another adapter had left the weight alone.
    """
    if density >= 1:
        return values
    if len(values) > 1:
        spread_OI = torch.stack(values).var(dim=0, correction=0)
    else:
        spread_OI = values[0].square()
    count = int(density * int(spread_OI.count_nonzero()))
    chosen = spread_OI.flatten().topk(count, sorted=False).indices
    return [only_entries(value_OI, chosen) for value_OI in values]


def energy_shares(values: list[Tensor]) -> list[float]:
    """Each delta's share of the sum of all squares, in float64; equal shares where all are 0."""
    squares = [float(value_OI.double().square().sum()) for value_OI in values]
    total = sum(squares)
    if not total:
        return [1 / len(values)] * len(values)
    return [square / total for square in squares]
