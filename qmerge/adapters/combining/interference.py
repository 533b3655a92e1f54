"""Do several adapters get in each other's way? What each pair of deltas shares, summed while a weight's row blocks pass.

Deltas count with their weights: one that is taken away (a negative weight) fights what it is like.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from qmerge.adapters.combining.combined import CombinedUpdate, delta_of
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.types import Rows, Update

SUMS = ("product", "one", "other", "against", "both")
"""⟨Δ, Δ'⟩, ‖Δ‖², ‖Δ'‖², and Σ min(|Δ|, |Δ'|) over the entries whose signs differ, and over all."""

PairSums = dict[str, dict[str, float]]
"""``"0 2"``, the places of two adapters in the run → their sums; ready for JSON."""


class PairStats:
    """All pairs of one weight. Every row's sums are kept until the end and added in one go, so that the result does not
    depend on the row blocks."""

    def __init__(self, update: CombinedUpdate) -> None:
        self.update = update
        self._rows: dict[tuple[int, int], list[Tensor]] = {pair: [] for pair in pairs_of(update)}

    def see(self, base_OI: Tensor, rows: Rows) -> None:
        """Some rows, float32 [rows, I]; all rows are seen once, in order."""
        parts = zip(self.update.updates, self.update.weights, strict=True)
        deltas = [delta_of(update, base_OI, rows) * weight for update, weight in parts]
        for (one, other), found in self._rows.items():
            found.append(row_sums(deltas[one], deltas[other]))

    def sums(self) -> PairSums:
        """Products of two LoRAs come from their small factors, which are exact; all else from the rows."""
        seen = {pair: torch.cat(found, dim=1).sum(dim=1).tolist() for pair, found in self._rows.items()}
        found = {key(self.update, pair): dict(zip(SUMS, values, strict=True)) for pair, values in seen.items()}
        exact = from_factors(self.update)
        return {name: {**sums, **exact.get(name, {})} for name, sums in found.items()}


def pair_stats(update: Update | None) -> PairStats | None:
    """None where fewer than two adapters change the weight."""
    return PairStats(update) if isinstance(update, CombinedUpdate) and len(update.updates) > 1 else None


def row_sums(one_OI: Tensor, other_OI: Tensor) -> Tensor:
    """[5, rows], in the order of ``SUMS``: float32 within a row, float64 from there on."""
    both_OI = torch.minimum(one_OI.abs(), other_OI.abs())
    opposite_OI = (one_OI < 0) != (other_OI < 0)  # an entry that is 0 in one of them counts 0 either way
    products = [torch.linalg.vecdot(a, b) for a, b in ((one_OI, other_OI), (one_OI, one_OI), (other_OI, other_OI))]
    return torch.stack([*products, (both_OI * opposite_OI).sum(dim=1), both_OI.sum(dim=1)]).double().cpu()


def from_factors(update: CombinedUpdate) -> PairSums:
    """The first three sums of every pair of LoRAs, without a base."""
    found = {}
    for pair in pairs_of(update):
        one, other = (update.updates[place] for place in pair)
        if isinstance(one, LoraUpdate) and isinstance(other, LoraUpdate):
            w, v = (update.weights[place] for place in pair)
            values = (w * v * inner(one, other), w * w * inner(one, one), v * v * inner(other, other))
            found[key(update, pair)] = dict(zip(SUMS, values, strict=False))
    return found


def inner(one: LoraUpdate, other: LoraUpdate) -> float:
    """⟨sBA, s'B'A'⟩ = s s' tr((BᵀB')(A'Aᵀ)), in float64."""
    left_RR = one.B_OR.double().T @ other.B_OR.double()
    right_RR = one.A_RI.double() @ other.A_RI.double().T
    return one.scale * other.scale * float((left_RR * right_RR).sum())


def pairs_of(update: CombinedUpdate) -> list[tuple[int, int]]:
    return list(combinations(range(len(update.updates)), 2))


def key(update: CombinedUpdate, pair: tuple[int, int]) -> str:
    return " ".join(str(update.settings.positions[place]) for place in pair)


def cosine(sums: Mapping[str, float]) -> float | None:
    """Between the two deltas; None where one is zero."""
    size = math.sqrt(max(0.0, sums["one"]) * max(0.0, sums["other"]))
    return max(-1.0, min(1.0, sums["product"] / size)) if size else None


def sign_conflict(sums: Mapping[str, float]) -> float | None:
    """The share of what both change that has opposite signs, each entry counted by the smaller of its two magnitudes: what
    is lost when they are added. None where no entry is changed by both, or where no rows were seen."""
    return sums["against"] / sums["both"] if sums.get("both") else None


def over_modules(modules: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Sums over several weights, so that each counts by its size."""
    total: dict[str, float] = {}
    for sums in modules.values():
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + value
    return total
