"""A delta → the two factors of a LoRA, from its largest singular values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_SIDE = 1024
"""Matrices whose shorter side is at most this long are decomposed exactly, others by a randomised method."""

OVERSAMPLING = 32
"""Directions more than the rank, in the randomised method; as many as the rank, where that is more."""

POWER_ITERATIONS = 6
"""Of the randomised method (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4). On noise without structure, the
hardest case, ‖delta − B A‖ grows by less than 0.1 % (tests/extract/test_extract.py)."""

FIRST_RANK = 64
"""Rank that ``--energy`` tries first on a large matrix; it is doubled until the share is reached."""


@dataclass(frozen=True)
class Decomposition:
    """float32 u [O, K], s [K], v [I, K] of delta ≈ u s vᵀ, largest first; ``complete``: there are no more singular values."""

    u_OK: Tensor
    s_K: Tensor
    v_IK: Tensor
    complete: bool

    def rank_for(self, energy: float, delta_square: float) -> int:
        """The smallest rank that keeps this share of ‖delta‖²; K where K singular values do not reach it."""
        kept_K = self.s_K.double().square().cumsum(0)
        return min(int((kept_K < energy * delta_square).sum()) + 1, len(self.s_K))

    @property
    def numerical_rank(self) -> int:
        """Rank without directions of the size of float32 rounding noise, whose norm grows as the square root of the sides."""
        floor = math.sqrt(max(len(self.u_OK), len(self.v_IK))) * torch.finfo(torch.float32).eps
        return max(1, int((self.s_K > floor * self.s_K[0]).sum()))


def decompose(delta_OI: Tensor, rank: int) -> Decomposition:
    """At least the ``rank`` largest singular triplets (all, where that costs no more).

    Exact for small matrices, and for ranks that are a large part of the shorter side; else randomised, with a fixed seed.
    """
    directions = rank + max(rank, OVERSAMPLING)
    shorter_side = min(delta_OI.shape)
    # From a quarter of the shorter side on, the iterations cost more than an exact decomposition.
    if shorter_side <= EXACT_SIDE or directions * 4 >= shorter_side:
        return Decomposition(*singular_triplets(delta_OI), complete=True)
    generator = torch.Generator().manual_seed(0)
    # Drawn on the CPU, so that every device starts from the same numbers.
    start_IK = torch.randn(delta_OI.shape[1], directions, generator=generator).to(delta_OI.device)
    q_OK = torch.linalg.qr(delta_OI @ start_IK).Q
    for _ in range(POWER_ITERATIONS):
        q_IK = torch.linalg.qr(delta_OI.T @ q_OK).Q
        q_OK = torch.linalg.qr(delta_OI @ q_IK).Q
    u_KK, s_K, v_IK = singular_triplets(q_OK.T @ delta_OI)
    return Decomposition(q_OK @ u_KK, s_K, v_IK, complete=False)


def singular_triplets(matrix_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 u [M, K], s [K], v [N, K], largest first, from the eigenvectors of the smaller Gram matrix.

    In float64, squaring loses less than a decomposition in float32 does; LAPACK's decomposition in float64 takes ten times
    as long.
    """
    if matrix_MN.shape[0] > matrix_MN.shape[1]:
        v_NK, s_K, u_MK = singular_triplets(matrix_MN.T)
        return u_MK, s_K, v_NK
    double_MN = matrix_MN.double()
    squares_K, u_MK = torch.linalg.eigh(double_MN @ double_MN.T)
    # eigh sorts upwards, and rounding can make the square of a tiny singular value negative.
    squares_K = squares_K.flip(0).clamp(min=0)
    u_MK = u_MK.flip(1)
    s_K = squares_K.sqrt()
    v_NK = (double_MN.T @ u_MK) / s_K.clamp(min=torch.finfo(torch.float32).tiny)
    return u_MK.float(), s_K.float(), v_NK.float()


def decompose_for(
    delta_OI: Tensor, delta_square: float, rank: int | None, energy: float | None
) -> tuple[Decomposition, int]:
    """A decomposition, and the rank to take from it: ``rank``, or the smallest one that keeps the share ``energy`` of
    ``delta_square`` = ‖delta‖²; never more than the numerical rank."""
    tried_rank = rank or FIRST_RANK
    while True:
        decomposition = decompose(delta_OI, tried_rank)
        needed_rank = tried_rank
        if energy is not None:
            needed_rank = decomposition.rank_for(energy, delta_square)
        # The randomised method is accurate for the rank that it was asked for, and not for its extra directions.
        if decomposition.complete or needed_rank <= tried_rank:
            return decomposition, min(needed_rank, decomposition.numerical_rank)
        tried_rank *= 2


def lora_factors(decomposition: Decomposition, rank: int) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R], float32, contiguous. Each has the singular values √S, so that neither is larger than the other."""
    root_R = decomposition.s_K[:rank].sqrt()
    A_RI = (decomposition.v_IK[:, :rank] * root_R).T.contiguous()
    B_OR = (decomposition.u_OK[:, :rank] * root_R).contiguous()
    return A_RI, B_OR


def factor_entries(shape: tuple[int, int], rank: int) -> int:
    """Numbers in both factors of a LoRA of this rank for a matrix of this shape."""
    return min(rank, *shape) * sum(shape)
