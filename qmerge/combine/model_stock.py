"""The mean of the deltas, drawn towards the base by the angle between them (Model Stock, arXiv 2403.19522)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor

from qmerge.combine.base import Settings, ordered_sum, weighted

ROWWISE = False


def combine(deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """float32 [O, I] each, whole → [O, I]: t · mean of the deltas times their weights (the paper has none),
    t = k cos θ / (1 + (k − 1) cos θ) for k of them (equation 5). A single one has no angle and stays as it is."""
    values = weighted(deltas, weights)
    return ordered_sum(values) * (ratio(values) / len(values))


def ratio(values: list[Tensor]) -> float:
    """t in [0, 1]; cos θ is the mean over all pairs. The paper's angles are acute; below 0, towards a pole of t, it is 0."""
    if len(values) < 2:
        return 1.0
    cosines = [cosine(one_OI, other_OI) for one_OI, other_OI in combinations(values, 2)]
    mean = max(0.0, sum(cosines) / len(cosines))
    return len(values) * mean / (1 + (len(values) - 1) * mean)


def cosine(one_OI: Tensor, other_OI: Tensor) -> float:
    """In float64; 0 where one of them is 0."""
    one, other = one_OI.double().flatten(), other_OI.double().flatten()
    size = float(one.norm() * other.norm())
    return float(one @ other) / size if size else 0.0
