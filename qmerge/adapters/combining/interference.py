"""Do several adapters work against each other? Sums over each pair of deltas, collected while a weight's row blocks pass.

Deltas count with their weights: a delta with a negative weight works against deltas that are like it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import combinations

import torch
from torch import Tensor

from qmerge.adapters.combining.combined import CombinedUpdate, delta_of
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.types import Rows, Update

SUMS = ("product", "one", "other", "against", "both")
"""⟨Δ, Δ'⟩, ‖Δ‖², ‖Δ'‖², and Σ min(|Δ|, |Δ'|) over the entries whose signs differ, and over all."""

PairSums = dict[str, dict[str, float]]
"""``"0 2"``, the positions of two adapters in the run → their sums, named as in ``SUMS``; ready for JSON."""

Pair = tuple[int, int]
"""Indices of two members of an update."""


class PairStats:
    """Sums over all pairs of one weight's deltas.

    Every row's sums are kept until the end and added at once, so that the result does not depend on the row blocks.
    """

    def __init__(self, update: CombinedUpdate) -> None:
        self._update = update
        self._row_sums: dict[Pair, list[Tensor]] = {pair: [] for pair in _pairs(update)}

    def add(self, base_OI: Tensor, rows: Rows) -> None:
        """Some rows of the base, float32 [rows, I]. Every row must be added once, in order."""
        deltas: list[Tensor] = []
        for update, weight in zip(self._update.updates, self._update.weights, strict=True):
            deltas.append(delta_of(update, base_OI, rows) * weight)
        for (first, second), row_sums in self._row_sums.items():
            row_sums.append(row_sums_of(deltas[first], deltas[second]))

    def sums(self) -> PairSums:
        """Products of two LoRAs come from their small factors, which are exact; all other sums from the rows."""
        exact = sums_from_factors(self._update)
        result: PairSums = {}
        for pair, row_sums in self._row_sums.items():
            key = _key(self._update, pair)
            totals: list[float] = torch.cat(row_sums, dim=1).sum(dim=1).tolist()
            result[key] = {**_named(totals), **exact.get(key, {})}
        return result


def pair_stats(update: Update | None) -> PairStats | None:
    """None where fewer than two adapters change the weight, or where they are chained."""
    if not isinstance(update, CombinedUpdate) or len(update.updates) < 2:
        return None
    return PairStats(update)


def row_sums_of(first_OI: Tensor, second_OI: Tensor) -> Tensor:
    """The sums of every row of two deltas, [5, rows], in the order of ``SUMS``: float32 within a row, float64 from then on."""
    smaller_OI = torch.minimum(first_OI.abs(), second_OI.abs())
    # An entry that is 0 in one of them counts 0, whichever sign 0 is given.
    opposite_OI = (first_OI < 0) != (second_OI < 0)
    row_sums = [
        torch.linalg.vecdot(first_OI, second_OI),
        torch.linalg.vecdot(first_OI, first_OI),
        torch.linalg.vecdot(second_OI, second_OI),
        (smaller_OI * opposite_OI).sum(dim=1),
        smaller_OI.sum(dim=1),
    ]
    return torch.stack(row_sums).double().cpu()


def sums_from_factors(update: CombinedUpdate) -> PairSums:
    """The first three of ``SUMS`` for every pair of LoRAs, without a base; other pairs are left out."""
    result: PairSums = {}
    for first, second in _pairs(update):
        a, b = update.updates[first], update.updates[second]
        if isinstance(a, LoraUpdate) and isinstance(b, LoraUpdate):
            weight_a, weight_b = update.weights[first], update.weights[second]
            product = weight_a * weight_b * inner_product(a, b)
            square_a = weight_a * weight_a * inner_product(a, a)
            square_b = weight_b * weight_b * inner_product(b, b)
            result[_key(update, (first, second))] = _named([product, square_a, square_b])
    return result


def inner_product(a: LoraUpdate, b: LoraUpdate) -> float:
    """⟨sBA, s'B'A'⟩ = s s' tr((BᵀB')(A'Aᵀ)), in float64."""
    left_RR = a.B_OR.double().T @ b.B_OR.double()
    right_RR = a.A_RI.double() @ b.A_RI.double().T
    return a.scale * b.scale * float((left_RR * right_RR).sum())


def _pairs(update: CombinedUpdate) -> Iterable[Pair]:
    return combinations(range(len(update.updates)), 2)


def _key(update: CombinedUpdate, pair: Pair) -> str:
    first, second = pair
    return f"{update.settings.positions[first]} {update.settings.positions[second]}"


def _named(sums: list[float]) -> dict[str, float]:
    """The first of ``SUMS``, by name."""
    return dict(zip(SUMS, sums, strict=False))


# --- numbers ---------------------------------------------------------------------------------------------------------


def delta_cosine(sums: Mapping[str, float]) -> float | None:
    """Cosine between the two deltas of a pair; None where one is zero."""
    # By rounding, a square may be just below 0, and the quotient just above 1.
    norms = math.sqrt(max(0.0, sums["one"]) * max(0.0, sums["other"]))
    if not norms:
        return None
    return max(-1.0, min(1.0, sums["product"] / norms))


def sign_conflict(sums: Mapping[str, float]) -> float | None:
    """Share of the common change that has opposite signs: it cancels when the deltas of a pair are added.

    Each entry counts by the smaller of its two magnitudes. None where no entry is changed by both, and where only factors were
    compared.
    """
    if not sums.get("both"):
        return None
    return sums["against"] / sums["both"]


def over_modules(sums_by_module: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The sums of a pair over several weights, so that each weight counts by its size."""
    total: dict[str, float] = {}
    for sums in sums_by_module.values():
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + value
    return total
