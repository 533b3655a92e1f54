"""What the ways to combine deltas share: their settings, sums in order, trimming, dropping, electing a sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmerge.errors import RecipeError
from qmerge.rounding.base import RoundingContext
from qmerge.rounding.stochastic import uniform
from qmerge.types import Rows


@dataclass(frozen=True)
class Settings:
    """What a method may know besides deltas and weights; each uses its part.

    ``density``    share of every delta's entries that is kept, in (0, 1];
    ``seed``       of what is dropped at random;
    ``rank``       that ``svd`` truncates to; None: the largest of the adapters' on the weight;
    ``gamma``      share of the largest entries that ``breadcrumbs`` masks as outliers, in [0, 1);
    ``epsilon``    width of the window of keep probabilities of ``della``, in [0, 1];
    ``name``       of the weight;
    ``row``        of the weight that is the deltas' first row;
    ``positions``  of the deltas' adapters among all adapters of the run; empty: 0, 1, 2, …

    Raises:
        RecipeError: a number outside its range.
    """

    density: float = 1.0
    seed: int = 0
    rank: int | None = None
    gamma: float = 0.01
    epsilon: float = 0.1
    name: str = ""
    row: int = 0
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


def ordered_sum(deltas: Sequence[Tensor]) -> Tensor:
    """d₀ + d₁ + …, left to right in every entry: torch's own sum over five or more depends on where an entry stands."""
    total_OI = deltas[0].clone()
    for delta_OI in deltas[1:]:
        total_OI += delta_OI
    return total_OI


def weighted(deltas: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    return [delta_OI * weight for delta_OI, weight in zip(deltas, weights, strict=True)]


def trimmed(delta_OI: Tensor, density: float) -> Tensor:
    """The ``density`` share of entries that is largest by magnitude; the others are 0. Among equal ones torch.topk chooses,
    as in peft's ``magnitude_based_pruning``."""
    if density >= 1:
        return delta_OI
    largest = delta_OI.abs().flatten().topk(int(density * delta_OI.numel()), sorted=False).indices
    return only(delta_OI, largest)


def only(delta_OI: Tensor, indices: Tensor) -> Tensor:
    """The entries at ``indices`` of the flattened delta; 0 elsewhere."""
    mask = torch.zeros_like(delta_OI).flatten()
    mask[indices] = 1
    return delta_OI * mask.view(delta_OI.shape)


def dropped(deltas: Sequence[Tensor], keep: Sequence[float | Tensor], settings: Settings) -> list[Tensor]:
    """Every entry stays with its probability ``keep``, divided by it, so that it is right on average; else it is 0."""
    places = settings.positions or range(len(deltas))
    return [
        delta_OI * (draws(delta_OI, place, settings) < share) / share
        for delta_OI, share, place in zip(deltas, keep, places, strict=True)
    ]


def draws(delta_OI: Tensor, place: int, settings: Settings) -> Tensor:
    """float32 [O, I], uniform: a function of (seed, weight, the adapter's place in the run, position of the entry) alone."""
    rows = Rows(settings.row, settings.row + len(delta_OI))
    return uniform(delta_OI, RoundingContext(f"combine:{place}:{settings.name}", rows, settings.seed))


def elected_mean(votes: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Mean, in every entry, of the values whose vote has the sign of the votes' sum (TIES, arXiv 2306.01708, sections 3.2
    and 3.3; a sum of 0 counts as positive, as in peft's ``calculate_majority_sign_mask``). A vote of 0 is no vote."""
    sign_OI = torch.where(ordered_sum(votes) >= 0, 1.0, -1.0)
    total_OI, count_OI = torch.zeros_like(sign_OI), torch.zeros_like(sign_OI)
    for vote_OI, value_OI in zip(votes, values, strict=True):
        agrees_OI = vote_OI.sign() == sign_OI
        total_OI += value_OI * agrees_OI
        count_OI += agrees_OI
    return total_OI / count_OI.clamp(min=1)
