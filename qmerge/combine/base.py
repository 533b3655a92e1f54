"""The contract of a method to combine deltas, its settings, and common steps: trimming, dropping, electing a sign."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmerge.errors import RecipeError
from qmerge.rounding.stochastic import uniform


@dataclass(frozen=True, kw_only=True)
class CombineSettings:
    """Settings of a method besides deltas and weights; each method uses some of them.

    Attributes:
        density: fraction of each delta's entries to keep, in (0, 1].
        seed: of the entries that are dropped at random.
        rank: rank of the result of ``svd``; None: the largest rank of the adapters on the weight.
        gamma: fraction of each delta's entries that ``breadcrumbs`` removes as outliers, the largest ones, in [0, 1).
        epsilon: width of the window of ``della``'s keep probabilities, in [0, 1].
        name: of the weight.
        start_row: row of the weight that is the first row of the deltas.
        positions: of the deltas' adapters among all adapters of the run; empty: 0, 1, 2, …

    Raises:
        RecipeError: a number outside its range.
    """

    density: float = 1.0
    seed: int = 0
    rank: int | None = None
    gamma: float = 0.01
    epsilon: float = 0.1
    name: str = ""
    start_row: int = 0
    positions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise RecipeError(f"density is {self.density}; expected a share of entries to keep, above 0 and at most 1")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"the rank of svd is {self.rank}; expected 1 or more")
        if not 0 <= self.gamma < 1:
            raise RecipeError(f"gamma is {self.gamma}; expected a share of entries to mask, at least 0 and below 1")
        if not 0 <= self.epsilon <= 1:
            raise RecipeError(f"epsilon is {self.epsilon}; expected a width between 0 and 1")


class CombineMethod(ABC):
    """How the deltas of several adapters become one.

    Deltas are whole products s · B · A: no method multiplies the B of one adapter with the A of another.
    """

    rowwise: bool
    """Whether the result of some rows depends on these rows of the deltas only, so that a weight can be combined in row blocks."""

    @abstractmethod
    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], settings: CombineSettings) -> Tensor:
        """float32 [O, I] each → float32 [O, I]: all rows at once, or any rows of the weight if ``rowwise``.

        Random draws must be a function of ``settings.seed``, ``settings.name``, ``settings.positions`` and the position of the
        entry, so that no byte depends on the order of the work.
        """


def ordered_sum(deltas: Sequence[Tensor]) -> Tensor:
    """d₀ + d₁ + …, from left to right in every entry.

    The order that torch.sum takes over five or more tensors depends on the position of the entry.
    """
    total_OI = deltas[0].clone()
    for delta_OI in deltas[1:]:
        total_OI += delta_OI
    return total_OI


def weighted(deltas: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """Each delta times its weight."""
    return [delta_OI * weight for delta_OI, weight in zip(deltas, weights, strict=True)]


def trimmed(delta_OI: Tensor, density: float) -> Tensor:
    """The largest entries by magnitude, a fraction ``density`` of all; 0 elsewhere.

    Among equal ones torch.topk chooses, as in peft's ``magnitude_based_pruning``.
    """
    if density >= 1:
        return delta_OI
    # Rounded down, as peft does.
    count = int(density * delta_OI.numel())
    largest = delta_OI.abs().flatten().topk(count, sorted=False).indices
    return only_entries(delta_OI, largest)


def only_entries(delta_OI: Tensor, indices: Tensor) -> Tensor:
    """The entries at ``indices`` of the flattened delta; 0 elsewhere."""
    mask = torch.zeros_like(delta_OI).flatten()
    mask[indices] = 1
    return delta_OI * mask.view(delta_OI.shape)


def dropped(
    deltas: Sequence[Tensor], keep_probabilities: Sequence[float | Tensor], settings: CombineSettings
) -> list[Tensor]:
    """DARE (arXiv 2311.03099): each entry stays with its probability, divided by it, else it is 0. Right on average."""
    positions = settings.positions or range(len(deltas))
    kept = []
    for delta_OI, probability, position in zip(deltas, keep_probabilities, positions, strict=True):
        stays_OI = uniform_draws(delta_OI, position, settings) < probability
        kept.append(delta_OI * stays_OI / probability)
    return kept


def dropped_by_density(deltas: Sequence[Tensor], settings: CombineSettings) -> Sequence[Tensor]:
    """``dropped`` with the probability ``settings.density`` for every entry."""
    if settings.density >= 1:
        return deltas
    return dropped(deltas, [settings.density] * len(deltas), settings)


def uniform_draws(delta_OI: Tensor, position: int, settings: CombineSettings) -> Tensor:
    """float32 [O, I] in [0, 1): a function of seed, weight, the adapter's position in the run, and position of the entry."""
    # With its purpose in the name, so that rounding draws other numbers for the same entries.
    name = f"combine:{position}:{settings.name}"
    return uniform(delta_OI, seed=settings.seed, name=name, start_row=settings.start_row)


def elected_mean(votes: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """In every entry, the mean of the values whose vote has the sign of the votes' sum (TIES, arXiv 2306.01708, 3.2 and 3.3).

    A vote of 0 does not count. A sum of 0 counts as positive, as in peft's ``calculate_majority_sign_mask``.
    """
    sign_OI = torch.where(ordered_sum(votes) >= 0, 1.0, -1.0)
    total_OI = torch.zeros_like(sign_OI)
    count_OI = torch.zeros_like(sign_OI)
    for vote_OI, value_OI in zip(votes, values, strict=True):
        agrees_OI = vote_OI.sign() == sign_OI
        total_OI += value_OI * agrees_OI
        count_OI += agrees_OI
    # Where all votes are 0 nobody agrees, and the mean is 0.
    return total_OI / count_OI.clamp(min=1)
