"""The numbers of an extraction: each LoRA, each other weight that differs, and sums over many of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

ENOUGH_ENERGY = 0.9
"""A LoRA that keeps a smaller share of ‖delta‖² is warned about, with the rank that would keep this share."""

MODULES_TO_SAVE, LORA_BIAS = "modules_to_save", "lora_bias"
"""How peft can store a difference that is not a LoRA: a whole module, or the bias of a linear layer."""


@dataclass(frozen=True, kw_only=True)
class LoraFit:
    """The LoRA of one weight. All squares are squared Frobenius norms.

    delta_square      ‖merged − base‖²
    base_square       ‖base‖²
    error_square      ‖delta − B A‖², of the written factors
    singular_squares  float64 [K], squared singular values of the delta, largest first
    complete          there are no more singular values than these K
    """

    name: str
    module: str
    shape: tuple[int, int]
    rank: int
    delta_square: float
    base_square: float
    error_square: float
    singular_squares: Tensor
    complete: bool


@dataclass(frozen=True, kw_only=True)
class OtherDifference:
    """A weight that differs and is not that of a linear layer.

    delta_square, base_square  squared norms; None where the weight cannot be subtracted
    savable                    how peft can store it: MODULES_TO_SAVE, LORA_BIAS, or None
    saved                      how it is stored: the same, or None where it is not in the adapter
    """

    name: str
    module: str
    delta_square: float | None = None
    base_square: float | None = None
    savable: str | None = None
    saved: str | None = None

    @property
    def relative_size(self) -> float | None:
        """‖delta‖ / ‖base‖."""
        return norm_ratio(self.delta_square, self.base_square)


@dataclass(kw_only=True)
class Differences:
    """All pairs that differ. ``identical`` counts the linear layers that do not."""

    fits: list[LoraFit] = field(default_factory=list)
    others: list[OtherDifference] = field(default_factory=list)
    identical: int = 0

    def adapted_modules(self) -> set[str]:
        """Modules that have a LoRA."""
        return {fit.module for fit in self.fits}

    def modules_saved_as(self, how: str) -> list[str]:
        """Modules with a weight that is stored this way, in the order of the base."""
        return list(dict.fromkeys(other.module for other in self.others if other.saved == how))


@dataclass(frozen=True, kw_only=True)
class FitStatistics:
    """Some LoRAs together.

    ranks           smallest and largest
    relative_size   ‖delta‖ / ‖base‖; None where the base is zero
    kept            share of ‖delta‖² that B A contains
    error           ‖delta − B A‖ / ‖delta‖
    rank_90         the rank that keeps 90 % of ‖delta‖² when all of them use it
    rank_90_known   False: ``rank_90`` is a lower bound
    """

    count: int
    ranks: tuple[int, int]
    relative_size: float | None
    kept: float
    error: float | None
    rank_90: int
    rank_90_known: bool

    @classmethod
    def of(cls, fits: Sequence[LoraFit]) -> FitStatistics:
        """Statistics of at least one LoRA."""
        sums = SquareSums.of(fits)
        ranks = [fit.rank for fit in fits]
        rank_90, rank_90_known = rank_for_all(fits, ENOUGH_ENERGY)
        return cls(
            count=len(fits),
            ranks=(min(ranks), max(ranks)),
            relative_size=norm_ratio(sums.delta, sums.base),
            kept=sums.kept_share,
            error=norm_ratio(sums.error, sums.delta),
            rank_90=rank_90,
            rank_90_known=rank_90_known,
        )

    def to_json(self) -> dict[str, Any]:
        """As in ``qmerge_extract.json``."""
        return {
            "n": self.count,
            "rank": list(self.ranks),
            "relative_size": self.relative_size,
            "kept": self.kept,
            "error": self.error,
            "rank_90": self.rank_90,
            "rank_90_known": self.rank_90_known,
        }


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """A written adapter: its LoRAs, the other weights that differ, and ``identical``, the number of linear layers that do
    not differ. ``nbytes`` is the size of the file with the tensors."""

    merged: str
    base: str
    out: Path
    fits: tuple[LoraFit, ...]
    others: tuple[OtherDifference, ...]
    identical: int
    nbytes: int
    warnings: tuple[str, ...] = ()

    @property
    def groups(self) -> dict[str, list[LoraFit]]:
        """The LoRAs by the last part of the module name (``q_proj``)."""
        groups: dict[str, list[LoraFit]] = defaultdict(list)
        for fit in self.fits:
            groups[fit.module.rpartition(".")[2]].append(fit)
        return dict(groups)

    def to_json(self) -> dict[str, Any]:
        """The content of ``qmerge_extract.json``."""
        groups = []
        for name, fits in self.groups.items():
            groups.append({"name": name, **FitStatistics.of(fits).to_json()})
        weights = []
        for fit in self.fits:
            weights.append({"name": fit.name, "shape": list(fit.shape), **FitStatistics.of([fit]).to_json()})
        others = []
        for other in self.others:
            others.append({"name": other.name, "relative_size": other.relative_size, "saved": other.saved})
        return {
            "merged": self.merged,
            "base": self.base,
            "out": str(self.out),
            "bytes": self.nbytes,
            "identical": self.identical,
            "total": FitStatistics.of(self.fits).to_json(),
            "groups": groups,
            "weights": weights,
            "others": others,
            "warnings": list(self.warnings),
        }


# --- sums over many LoRAs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SquareSums:
    """Sums of squared norms over some LoRAs."""

    delta: float
    base: float
    error: float

    @classmethod
    def of(cls, fits: Sequence[LoraFit]) -> SquareSums:
        """Sums over all of them."""
        return cls(
            delta=sum(fit.delta_square for fit in fits),
            base=sum(fit.base_square for fit in fits),
            error=sum(fit.error_square for fit in fits),
        )

    @property
    def kept_share(self) -> float:
        """The share of ‖delta‖² that B A contains. (B A is a projection of the delta, so the squares add up.)"""
        return 1 - self.error / self.delta


def norm_ratio(part_square: float | None, whole_square: float | None) -> float | None:
    """‖part‖ / ‖whole‖ from squared norms; None where it is not defined."""
    if part_square is None or not whole_square:
        return None
    return math.sqrt(part_square / whole_square)


def kept_share(fits: Sequence[LoraFit]) -> float:
    """The share of ‖delta‖² that the LoRAs contain."""
    return SquareSums.of(fits).kept_share


def rank_for_all(fits: Sequence[LoraFit], energy: float) -> tuple[int, bool]:
    """The smallest rank that keeps this share of ‖delta‖² when all LoRAs use it; False where it may take a higher one.

    Singular values that were not computed are at most as large as the last computed one, which gives a lower bound.
    """
    wanted = energy * SquareSums.of(fits).delta
    cumulated = [fit.singular_squares.cumsum(0).tolist() for fit in fits]
    # A higher rank keeps more, so bisection finds the smallest sufficient rank.
    low = 1
    high = max(min(fit.shape) for fit in fits)
    while low < high:
        middle = (low + high) // 2
        kept = sum(most_kept(fit, sums, middle) for fit, sums in zip(fits, cumulated, strict=True))
        if kept >= wanted:
            high = middle
        else:
            low = middle + 1
    is_known = all(fit.complete or len(fit.singular_squares) >= low for fit in fits)
    return low, is_known


def most_kept(fit: LoraFit, sums: Sequence[float], rank: int) -> float:
    """The part of ‖delta‖² that this rank keeps; an upper bound past the computed singular values.

    ``sums``: sums of the squared singular values up to each rank.
    """
    if rank <= len(sums):
        return float(sums[rank - 1])
    if fit.complete:
        return float(sums[-1])
    unknown_ranks = rank - len(sums)
    return min(fit.delta_square, sums[-1] + unknown_ranks * float(fit.singular_squares[-1]))
