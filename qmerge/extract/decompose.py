"""A delta → the two factors of a LoRA, by its largest singular values; and what share of the delta a rank keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EXACT = 1024
"""Matrices whose shorter side is at most this long are decomposed exactly, others by a randomised method."""

OVERSAMPLING, ROUNDS = 32, 6
"""Extra directions (or as many as the rank, if that is more) and power iterations of the randomised decomposition (arXiv
0909.4061, algorithm 4.4). On noise without structure, the hardest case, ‖delta − B A‖ grows by less than 0.1 %
(tests/test_extract.py)."""

FIRST_GUESS = 64
"""Rank that ``--energy`` tries first on a large matrix; then twice as many, until the share is reached."""

ENOUGH = 0.9
"""A share of ‖delta‖² below this is warned about, with the rank that would keep it."""


@dataclass(frozen=True)
class Decomposed:
    """float32 u [O, K], s [K], v [I, K], largest first; ``whole`` where there are no more than these."""

    u_OK: Tensor
    s_K: Tensor
    v_IK: Tensor
    whole: bool

    def rank_for(self, energy: float, delta: float) -> int:
        """The smallest rank that keeps this share of ``delta`` = ‖delta‖²; K where these do not reach it."""
        kept_K = self.s_K.double().square().cumsum(0)
        return min(int((kept_K < energy * delta).sum()) + 1, len(self.s_K))

    @property
    def numerical_rank(self) -> int:
        """Without directions of the size of float32 rounding noise, whose norm grows with the square root of the sides."""
        floor = math.sqrt(max(len(self.u_OK), len(self.v_IK))) * torch.finfo(torch.float32).eps
        return max(1, int((self.s_K > floor * self.s_K[0]).sum()))


def decompose(delta_OI: Tensor, rank: int) -> Decomposed:
    """At least the ``rank`` largest singular triplets (all, where that costs no more).

    Exact for small matrices and for ranks that are no small part of a large one; else randomised, with a fixed seed.
    """
    wanted, shorter = rank + max(rank, OVERSAMPLING), min(delta_OI.shape)
    if shorter <= EXACT or wanted * 4 >= shorter:
        return Decomposed(*triplets(delta_OI), True)
    generator = torch.Generator().manual_seed(0)
    start_IK = torch.randn(delta_OI.shape[1], wanted, generator=generator).to(delta_OI.device)
    q_OK = torch.linalg.qr(delta_OI @ start_IK).Q
    for _ in range(ROUNDS):
        q_IK = torch.linalg.qr(delta_OI.T @ q_OK).Q
        q_OK = torch.linalg.qr(delta_OI @ q_IK).Q
    u_KK, s_K, v_IK = triplets(q_OK.T @ delta_OI)
    return Decomposed(q_OK @ u_KK, s_K, v_IK, False)


def triplets(matrix_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 u [M, K], s [K], v [N, K], by the eigenvectors of the smaller Gram matrix.

    In float64 its squares lose less than a decomposition in float32 does, and LAPACK's takes ten times as long.
    """
    if matrix_MN.shape[0] > matrix_MN.shape[1]:
        v_NK, s_K, u_MK = triplets(matrix_MN.T)
        return u_MK, s_K, v_NK
    wide_MN = matrix_MN.double()
    squares_K, u_MK = torch.linalg.eigh(wide_MN @ wide_MN.T)
    squares_K, u_MK = squares_K.flip(0).clamp(min=0), u_MK.flip(1)
    s_K = squares_K.sqrt()
    v_NK = (wide_MN.T @ u_MK) / s_K.clamp(min=torch.finfo(torch.float32).tiny)
    return u_MK.float(), s_K.float(), v_NK.float()


def decompose_to(delta_OI: Tensor, rank: int | None, energy: float | None, delta: float) -> tuple[Decomposed, int]:
    """The decomposition, and the rank to take of it."""
    guess = rank or FIRST_GUESS
    while True:
        found = decompose(delta_OI, guess)
        taken = guess if energy is None else found.rank_for(energy, delta)
        if found.whole or taken <= guess:
            return found, min(taken, found.numerical_rank)
        guess *= 2


def factors(found: Decomposed, rank: int) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R], float32, contiguous; both have the singular values √S, so that neither is the larger."""
    root_R = found.s_K[:rank].sqrt()
    return (found.v_IK[:, :rank] * root_R).T.contiguous(), (found.u_OK[:, :rank] * root_R).contiguous()


# --- what it loses ---------------------------------------------------------------------------------------------------


def entries(shape: tuple[int, int], rank: int) -> int:
    """Numbers in a LoRA of this rank."""
    return min(rank, *shape) * sum(shape)


@dataclass(frozen=True)
class Fit:
    """The LoRA of one weight. ``squares``: squared singular values of the delta, largest first, as far as they were
    computed (``whole``: all of them); the others are squared Frobenius norms."""

    name: str
    module: str
    shape: tuple[int, int]
    rank: int
    delta: float
    base: float
    left: float
    squares: Tensor
    whole: bool


def ratio(part: float | None, whole: float | None) -> float | None:
    """√(part / whole) of squared norms."""
    return None if part is None or not whole else math.sqrt(part / whole)


def kept(fits: Sequence[Fit]) -> float:
    """The share of ‖delta‖² that is in the LoRAs."""
    return 1 - sum(fit.left for fit in fits) / sum(fit.delta for fit in fits)


def numbers(fits: Sequence[Fit]) -> dict[str, Any]:
    """``relative_size``: ‖delta‖ / ‖base‖; ``error``: ‖delta − B A‖ / ‖delta‖; ``kept``: the share of ‖delta‖²;
    ``rank_90``: the rank that keeps 90 % (at least so many, unless ``rank_90_known``)."""
    delta, (rank, known) = sum(fit.delta for fit in fits), rank_for(fits, ENOUGH)
    return {
        "n": len(fits),
        "rank": [min(fit.rank for fit in fits), max(fit.rank for fit in fits)],
        "relative_size": ratio(delta, sum(fit.base for fit in fits)),
        "kept": kept(fits),
        "error": ratio(sum(fit.left for fit in fits), delta),
        "rank_90": rank,
        "rank_90_known": known,
    }


def rank_for(fits: Sequence[Fit], energy: float) -> tuple[int, bool]:
    """The smallest rank which, given to all, keeps this share of their ‖delta‖²; False where it may take more.

    Singular values that were not computed are no larger than the last one that was, which gives a lower bound.
    """
    wanted = energy * sum(fit.delta for fit in fits)
    sums = [fit.squares.cumsum(0).tolist() for fit in fits]
    low, high = 1, max(min(fit.shape) for fit in fits)
    while low < high:
        middle = (low + high) // 2
        reached = sum(most_kept(fit, total, middle) for fit, total in zip(fits, sums, strict=True))
        low, high = (low, middle) if reached >= wanted else (middle + 1, high)
    return low, all(fit.whole or len(fit.squares) >= low for fit in fits)


def most_kept(fit: Fit, sums: Sequence[float], rank: int) -> float:
    """Of ‖delta‖², at this rank; an upper bound past the singular values that were computed."""
    if rank <= len(sums):
        return float(sums[rank - 1])
    return float(sums[-1]) if fit.whole else min(fit.delta, sums[-1] + (rank - len(sums)) * float(fit.squares[-1]))
