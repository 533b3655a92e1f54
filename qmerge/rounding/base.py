"""The metric in which ``preserve`` rounds: which errors of a weight matter, by what the layer's inputs look like and
by which input directions the adapter reads.

    H = E[x xᵀ] / mean diagonal          x: inputs of the layer in the unmerged adapter model
    P = V diag(s²/s₁²) Vᵀ                 delta = U diag(s) Vᵀ: what the adapter reads, by how much it writes
    S = H V (Vᵀ H V)⁻¹ Vᵀ H               errors that go along with what the adapter reads, as the inputs have it
    K = H + READ · P + SPAN · S + damping

H alone makes the layer's output error smallest, but leaves an error that is −delta in good part: small in each layer,
the same way in all of them. P and S make that part expensive. (benchmarks/ablation.py measures each term.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qmerge.types import Rows

READ, SPAN = 5.0, 5.0
BLIND_READ, BLIND_SPAN = 50.0, 50.0
"""The same without calibration, where H = I says nothing."""

DAMPING, MOST_DAMPING = 0.01, 1.0
"""Share of K's mean diagonal that is added to it; ten times more as long as K cannot be factored."""

PULL = 0.002
"""Damping of E[X̃X̃ᵀ] in the correction of earlier rounding, relative to its mean diagonal."""


@dataclass(frozen=True)
class Statistics:
    """What calibration saw of one weight's inputs, all float32.

    hessian_II  E[x̃ x̃ᵀ], with x̃ the inputs in the model as merged so far (in the unmerged one, if not sequential)
    cross_II    E[(x − x̃) x̃ᵀ], x the inputs in the unmerged model; None if not sequential
    tokens      inputs seen
    borrowed     share of the Hessian that is borrowed from the other experts of the layer (0 to 1)
    """

    hessian_II: Tensor
    cross_II: Tensor | None
    tokens: int
    borrowed: float = 0.0

    def correction(self) -> Tensor | None:
        """R_II: with T(I + R) instead of T, the layer makes up for what rounding did to its inputs: the least-squares
        answer to T x = T' x̃, T' = T E[x x̃ᵀ] E[x̃ x̃ᵀ]⁻¹ (Qronos, arXiv 2505.11695; GPTAQ, arXiv 2504.02692)."""
        if self.cross_II is None:
            return None
        damped_II = damped(self.hessian_II, PULL)
        solved: Tensor = torch.linalg.solve(damped_II, self.cross_II.T).T
        return solved.contiguous()


@dataclass(frozen=True)
class Metric:
    """K and what else a rounding needs to know of the inputs, all float32. ``hessian_II`` is H; ``damping`` is the share
    that was added to K so that it can be factored."""

    K_II: Tensor
    damping: float
    hessian_II: Tensor | None
    correction_II: Tensor | None

    def aim(self, merged_OI: Tensor) -> Tensor:
        """float32 [O, I]: what to round: the merged weight, corrected for what rounding did to earlier layers."""
        return merged_OI if self.correction_II is None else merged_OI + merged_OI @ self.correction_II


def make_metric(
    statistics: Statistics | None, directions: tuple[Tensor, Tensor, Tensor] | None, columns: int, device: torch.device,
) -> Metric:  # fmt: skip
    """K from what is known.

    Args:
        statistics: of the inputs; None without calibration: every input counts alike (H = I).
        directions: u [O, R], s [R], v [I, R] of the delta; None for a delta without singular directions.
        columns: I.
    """
    seen_II = statistics.hessian_II.to(device) if statistics else torch.eye(columns, device=device)
    mean = float(seen_II.diagonal().mean())
    H_II = seen_II / mean if mean > 0 else torch.eye(columns, device=device)
    K_II, read, span = H_II.clone(), *((READ, SPAN) if statistics else (BLIND_READ, BLIND_SPAN))
    if directions is not None and bool(directions[1].any()):
        _, s_R, v_IR = (part.to(device) for part in directions)
        v_IR, s_R = v_IR[:, s_R > 1e-6 * s_R.max()], s_R[s_R > 1e-6 * s_R.max()]
        K_II += read * (v_IR * (s_R / s_R.max()).square()) @ v_IR.T
        K_II += span * span_term(damped(H_II, DAMPING), v_IR)
    correction_II = statistics.correction() if statistics else None
    return Metric(
        *made_definite(K_II), H_II if statistics else None, None if correction_II is None else correction_II.to(device)
    )


def span_term(H_II: Tensor, v_IR: Tensor) -> Tensor:
    """S = H V (Vᵀ H V)⁻¹ Vᵀ H: the projector, in the metric H, onto what the adapter reads."""
    Hv_IR = H_II @ v_IR
    term_II: Tensor = Hv_IR @ torch.linalg.solve(v_IR.T @ Hv_IR, Hv_IR.T)
    return term_II


def made_definite(K_II: Tensor) -> tuple[Tensor, float]:
    """(K with damping, the damping that it took to have a Cholesky factor)."""
    damping = DAMPING
    while damping < MOST_DAMPING and upper_factor(damped(K_II, damping)) is None:
        damping *= 10
    return damped(K_II, damping), damping


def upper_factor(K_II: Tensor) -> Tensor | None:
    """Upper triangular F with F Fᵀ = K; None when K is not positive definite in float32.

    It is the Cholesky factor of K with rows and columns reversed, reversed back.
    """
    lower_II, info = torch.linalg.cholesky_ex(K_II.flip(0, 1))
    good = int(info) == 0 and bool(lower_II.isfinite().all())
    return lower_II.flip(0, 1).contiguous() if good else None


def damped(K_II: Tensor, share: float) -> Tensor:
    """K with ``share`` of its mean diagonal added to the diagonal."""
    result_II = K_II.clone()
    result_II.diagonal().add_(share * float(K_II.diagonal().mean()))
    return result_II


@dataclass(frozen=True)
class RoundingContext:
    """``near_OI``: the base's own codes when the grid is kept. ``name`` and ``rows`` say which part of which weight
    this is, so that random numbers depend on neither the order of the work nor on how rows are grouped. ``metric``:
    which errors matter, by calibration. ``delta_OI``: merged − base. ``original_OI``: the 16-bit weight with the delta,
    where it is known beside a quantized base."""

    name: str
    rows: Rows
    seed: int = 0
    near_OI: Tensor | None = None
    metric: Metric | None = None
    delta_OI: Tensor | None = None
    original_OI: Tensor | None = None
