"""Keep entries where the deltas differ most, weigh by energy, average those of the elected sign (SCE, arXiv 2408.07990)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qmerge.combine.base import Settings, only, ordered_sum, weighted

ROWWISE = False


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """float32 [O, I] each, whole → [O, I]. What is combined are the deltas times their weights; the paper has none. Select:
    the ``density`` share of entries, of those that differ, by their variance over adapters. Calculate: η, an adapter's
    share of all squares. Erase: entries against the sign of the sum; the others are averaged by η."""
    values = selected(weighted(deltas, weights), settings.density)
    sign_OI = torch.where(ordered_sum(values) >= 0, 1.0, -1.0)
    total_OI, divisor_OI = torch.zeros_like(sign_OI), torch.zeros_like(sign_OI)
    for value_OI, share in zip(values, energy_shares(values), strict=True):
        share_OI = share * (value_OI.sign() == sign_OI)
        total_OI += value_OI * share_OI
        divisor_OI += share_OI
    return total_OI / torch.where(divisor_OI == 0, 1.0, divisor_OI)


def selected(values: list[Tensor], density: float) -> list[Tensor]:
    """A single delta has no variance: its largest entries are taken, as if another adapter had left the weight alone."""
    if density >= 1:
        return values
    spread_OI = torch.stack(values).var(dim=0, correction=0) if len(values) > 1 else values[0].square()
    chosen = spread_OI.flatten().topk(int(density * int(spread_OI.count_nonzero())), sorted=False).indices
    return [only(value_OI, chosen) for value_OI in values]


def energy_shares(values: list[Tensor]) -> list[float]:
    squares = [float(value_OI.double().square().sum()) for value_OI in values]
    total = sum(squares)
    return [square / total if total else 1 / len(values) for square in squares]
