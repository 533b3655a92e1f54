"""The mean of the deltas, moved towards the base by the angle between them (Model Stock, arXiv 2403.19522)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor

from qmerge.combine.base import CombineMethod, CombineSettings, ordered_sum, weighted


class ModelStock(CombineMethod):
    """t · mean of the deltas times their weights (the paper has no weights), t = k cos θ / (1 + (k − 1) cos θ) (equation 5)."""

    rowwise = False  # θ is the angle between whole deltas

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], settings: CombineSettings) -> Tensor:
        values = weighted(deltas, weights)
        return ordered_sum(values) * (interpolation_ratio(values) / len(values))


METHOD = ModelStock()


def interpolation_ratio(values: list[Tensor]) -> float:
    """t in [0, 1], from the mean of cos θ over all pairs of the k deltas; 1 for a single delta, which has no angle.

    The paper's angles are acute. Below 0 the formula goes towards its pole: then t is 0.
    """
    if len(values) < 2:
        return 1.0
    cosines = [cosine_similarity(first_OI, second_OI) for first_OI, second_OI in combinations(values, 2)]
    mean_cosine = max(0.0, sum(cosines) / len(cosines))
    return len(values) * mean_cosine / (1 + (len(values) - 1) * mean_cosine)


def cosine_similarity(first_OI: Tensor, second_OI: Tensor) -> float:
    """Of two deltas, in float64; 0 where one of them is 0."""
    first = first_OI.double().flatten()
    second = second_OI.double().flatten()
    norms = float(first.norm() * second.norm())
    return float(first @ second) / norms if norms else 0.0
