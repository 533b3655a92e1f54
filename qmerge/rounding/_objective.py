"""The objective of ``preserve``: which errors of a weight matter, tr(error K errorᵀ).

It weighs errors by the layer's inputs and by the input directions that the adapter reads.

    H = E[x xᵀ]                          x: inputs of the layer in the model as merged so far
    P = V diag(s²/s₁²) Vᵀ                 delta = U diag(s) Vᵀ: inputs that the adapter reads, by how much it writes
    K = H + READ · tr(Vᵀ H V) / R · P + damping

H alone makes the layer's output error smallest, but leaves an error that is −delta in good part: small in each layer,
the same way in all of them. P makes that part expensive, also where the text does not show what the adapter was trained on.
P counts by the inputs' own size in the directions that the adapter reads: in real models most of H is in a few others.
(benchmarks/ablation.py measures each term.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qmerge.types import Rows

READ = 3.0
"""Factor of P with text of the task."""

READ_OTHER = 20.0
"""The same with other text, which shows little of the inputs that the adapter was trained on."""

READ_BLIND = 50.0
"""The same without calibration, where H = I says nothing."""

UNSEEN_LOSS = 0.02
"""Share of the delta that is lost on text of the task if calibration saw other text: 0.025 on SmolLM2-135M, 0.015 on a Llama of
3.7 million parameters, against 0.004 and 0 with text of the task. (Share: the hidden states' change after the last layer, along
the change that the adapter makes.)"""

DAMPING, MOST_DAMPING = 0.01, 1.0
"""Share of K's mean diagonal that is added to it; ten times more as long as K cannot be factored."""

CORRECTION_DAMPING = 0.002
"""Damping of E[x̃ x̃ᵀ] in the correction of earlier rounding, relative to its mean diagonal."""

COMPENSATION_DAMPING = 0.05
"""The same, in the compensation for what the residual stream has lost. (On SmolLM2-135M the KL ratio is 0.0057 with 0.0002,
0.0052 with 0.002, 0.0045 with 0.02; on a Llama of 3.7 million parameters 0.1 is worse again.)"""

NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest one are rounding errors of the decomposition, not ranks of the delta."""


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one weight's inputs, from calibration. All three expectations are at the same scale, whatever it is.

    Attributes:
        hessian_II: float32 E[x̃ x̃ᵀ], with x̃ the inputs in the model as merged so far (in the unmerged one, if not sequential).
        cross_II: float32 E[(x − x̃) x̃ᵀ], with x the inputs in the unmerged model; None where ``missing_OI`` has it, and if not
            sequential.
        tokens: number of inputs.
        borrowed: share of the Hessian that comes from the other experts of the layer, 0 to 1.
        of_task: whether the text is the user's own.
        missing_OI: float32 E[(r + T x − r̃ − T x̃) x̃ᵀ], where the weight's product is added to the residual stream: r in the
            unmerged model, r̃ in the one as merged so far, T the merged weight before rounding; else None.
        of_matrices: of a stack, the statistics of every matrix (None for one that got no token), whose mean the others are.
    """

    hessian_II: Tensor
    cross_II: Tensor | None
    tokens: int
    borrowed: float = 0.0
    of_task: bool = True
    missing_OI: Tensor | None = None
    of_matrices: tuple[InputStatistics | None, ...] = ()

    @cached_property
    def correction(self) -> Tensor | None:
        """float32 R [I, I]: with T (I + R) instead of T, the layer makes up for the effect of rounding on its inputs.

        The least-squares answer to T x = T' x̃: T' = T E[x x̃ᵀ] E[x̃ x̃ᵀ]⁻¹ (Qronos, arXiv 2505.11695; GPTAQ, arXiv 2504.02692).
        None if calibration was not sequential. Weights that share inputs (q, k and v) share it.
        """
        return self._explained(self.cross_II, CORRECTION_DAMPING)

    def compensation(self) -> Tensor | None:
        """float32 [O, I]: added to T, the layer also makes up for what the residual stream has lost before it.

        The least-squares answer to r + T x = r̃ + T' x̃ (WaterSIC, arXiv 2603.04956). None where the weight's product is not
        added to the residual stream, and if calibration was not sequential.
        """
        return self._explained(self.missing_OI, COMPENSATION_DAMPING)

    def _explained(self, cross_OI: Tensor | None, damping: float) -> Tensor | None:
        """C E[x̃ x̃ᵀ]⁻¹, the part of something that the inputs x̃ explain; C is its product with them."""
        if cross_OI is None or not bool(self.hessian_II.any()):  # inputs that are all zero explain nothing
            return None
        # Without damping, directions in which inputs hardly occur would be corrected by noise.
        damped_II = damped(self.hessian_II, damping)
        solved: Tensor = torch.linalg.solve(damped_II, cross_OI.T).T
        return solved.contiguous()


def stack_statistics(of_matrices: Sequence[InputStatistics | None]) -> InputStatistics:
    """Statistics of a stack, from those of its matrices; at least one of them is known."""
    known = [statistics for statistics in of_matrices if statistics is not None]
    hessian_II = torch.zeros_like(known[0].hessian_II)
    for statistics in known:
        hessian_II += statistics.hessian_II / len(known)
    return InputStatistics(
        hessian_II,
        cross_II=None,
        tokens=sum(statistics.tokens for statistics in known),
        borrowed=sum(statistics.borrowed for statistics in known) / len(known),
        of_task=known[0].of_task,
        of_matrices=tuple(of_matrices),
    )


@dataclass(frozen=True)
class Objective:
    """K, and other results of calibration that a rounding uses.

    Attributes:
        K_II: float32, with damping, positive definite.
        damping: share of its mean diagonal that was added to K.
        hessian_II: float32 H, the inputs alone; None without calibration.
        correction_II: float32 R (``InputStatistics.correction``).
        compensation_OI: float32 (``InputStatistics.compensation``).
        unseen_loss: share of the delta that will be lost on top of what the objective shows.
    """

    K_II: Tensor
    damping: float
    hessian_II: Tensor | None
    correction_II: Tensor | None
    compensation_OI: Tensor | None
    unseen_loss: float = 0.0

    def aim(self, merged_OI: Tensor, rows: Rows) -> Tensor:
        """float32 [O, I]: the values to round: some rows of the merged weight, corrected for the effect of rounding in
        earlier layers."""
        aim_OI = merged_OI
        if self.correction_II is not None:
            aim_OI = aim_OI + merged_OI @ self.correction_II
        if self.compensation_OI is not None:
            aim_OI = aim_OI + self.compensation_OI[rows.start : rows.stop]
        return aim_OI


def make_objective(
    statistics: InputStatistics | None,
    directions: tuple[Tensor, Tensor, Tensor] | None,
    columns: int,
    device: torch.device,
) -> Objective:
    """The objective of a weight, from calibration and from its delta.

    Args:
        statistics: of the inputs; None without calibration: every input counts alike (H = I).
        directions: u [O, R], s [R], v [I, R] of the delta; None for a delta without singular directions.
        columns: I.
    """
    H_II = torch.eye(columns, device=device)
    if statistics is not None and bool(statistics.hessian_II.any()):
        H_II = statistics.hessian_II.to(device)
    K_II = H_II.clone()
    if directions is not None and bool(directions[1].any()):
        s_R = directions[1].to(device)
        v_IR = directions[2].to(device)
        # Directions of a rank that carries nothing are arbitrary.
        carries = s_R > NEGLIGIBLE * s_R.max()
        v_IR, s_R = v_IR[:, carries], s_R[carries]
        size = float(((H_II @ v_IR) * v_IR).sum()) / v_IR.shape[1]
        factor = read_factor(statistics) * size
        K_II.addmm_(factor * (v_IR * (s_R / s_R.max()).square()), v_IR.T)
    damping = make_definite(K_II)
    if statistics is None:
        return Objective(K_II, damping, hessian_II=None, correction_II=None, compensation_OI=None)
    return Objective(
        K_II,
        damping,
        hessian_II=H_II,
        correction_II=statistics.correction,
        compensation_OI=statistics.compensation(),
        unseen_loss=0.0 if statistics.of_task else UNSEEN_LOSS,
    )


def read_factor(statistics: InputStatistics | None) -> float:
    """The factor of P, by what is known of the inputs."""
    if statistics is None:
        return READ_BLIND
    return READ if statistics.of_task else READ_OTHER


def make_definite(K_II: Tensor) -> float:
    """Damp K, in place, so that it has a Cholesky factor.

    Returns:
        The damping that it took.
    """
    # K is a sum of positive terms, but in float32 it may have eigenvalues just below 0.
    undamped_I = K_II.diagonal().clone()
    mean = float(undamped_I.mean())
    damping = DAMPING
    K_II.diagonal().add_(damping * mean)
    while damping < MOST_DAMPING and upper_factor(K_II) is None:
        damping *= 10
        K_II.diagonal().copy_(undamped_I + damping * mean)
    return damping


def upper_factor(K_II: Tensor) -> Tensor | None:
    """Upper triangular F with F Fᵀ = K; None when K is not positive definite in float32.

    It is the Cholesky factor of K with rows and columns reversed, reversed back.
    """
    lower_II, info = torch.linalg.cholesky_ex(K_II.flip(0, 1))
    # cholesky_ex reports failure in ``info``; a factor of a nearly singular matrix may also overflow.
    if int(info) != 0 or not bool(lower_II.sum().isfinite()):
        return None
    upper_II: Tensor = lower_II.flip(0, 1).contiguous()
    return upper_II


def damped(K_II: Tensor, share: float) -> Tensor:
    """K with ``share`` of its mean diagonal added to the diagonal."""
    result_II = K_II.clone()
    result_II.diagonal().add_(share * float(K_II.diagonal().mean()))
    return result_II
