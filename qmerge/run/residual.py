"""What a merged weight could not hold, as a small ordinary LoRA beside it: the best fit of a given rank.

    minimise  tr((E − B A) K (E − B A)ᵀ)   E = merged − stored,  K = F Fᵀ (``rounding/_objective.py``)

With E F = U S Vᵀ the answer is B = U √S, A = √S Vᵀ F⁻¹ of the largest ranks (the weighted low-rank approximation of
CLoQ, arXiv 2501.18475, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qmerge.rounding.base import InputStatistics, make_objective, upper_factor
from qmerge.safetensors_io.writer import write_file
from qmerge.schema import ResidualRecord
from qmerge.types import Step, dot
from qmerge.weights.context import RunContext
from qmerge.weights.values import base_values, merged_values

FOLDER = "residual"
MORE, ROUNDS = 8, 6
"""Extra directions and power iterations of the randomised decomposition (arXiv 0909.4061)."""


@dataclass(frozen=True)
class Residual:
    """float32 factors of one weight, and what they leave: sums over the inputs that calibration saw (over the weight,
    where it saw none)."""

    A_RI: Tensor
    B_OR: Tensor
    error_without: float
    error_with: float
    delta: float


def fit(step: Step, stored_OI: Tensor, inputs: InputStatistics | None, context: RunContext, rank: int) -> Residual:
    """The residual of one merged weight that has been stored."""
    assert step.update is not None
    merged_OI, base_OI = merged_values(step, context), base_values(step, context)
    objective = make_objective(inputs, step.update.directions(), step.shape[1], context.device)
    factor_II = upper_factor(objective.K_II)
    assert factor_II is not None, "make_objective gave an objective without a factor"
    error_OI = merged_OI - stored_OI
    u_OR, s_R, v_IR = leading((objective.aim(merged_OI) - stored_OI) @ factor_II, rank)
    B_OR = u_OR * s_R.sqrt()
    A_RI = torch.linalg.solve_triangular(factor_II, (v_IR * s_R.sqrt()).T, upper=True, left=False)
    seen_II = (
        objective.hessian_II if objective.hessian_II is not None else torch.eye(step.shape[1], device=context.device)
    )
    left_OI, delta_OI = error_OI - B_OR @ A_RI, merged_OI - base_OI
    without, remaining, delta = (dot(x_OI @ seen_II, x_OI) for x_OI in (error_OI, left_OI, delta_OI))
    return Residual(A_RI.cpu(), B_OR.cpu(), without, remaining, delta)


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular triplets."""
    rank = min(rank, *matrix.shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, min(rank + MORE, *matrix.shape), ROUNDS)
    return u[:, :rank], s[:rank], v[:, :rank]


def write(out: Path, residuals: Mapping[str, Residual], rank: int) -> ResidualRecord:
    """The adapter, as peft saves it, in ``out/residual``; and what it brings."""
    from peft import LoraConfig
    from safetensors.torch import save

    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, residual in residuals.items():
        module = name.removesuffix(".weight")
        # Where a weight has fewer ranks than were asked for, the rest is zero: peft wants one rank.
        pad = rank - len(residual.A_RI)
        A_RI = torch.nn.functional.pad(residual.A_RI, (0, 0, 0, pad))
        B_OR = torch.nn.functional.pad(residual.B_OR, (0, pad))
        tensors[f"base_model.model.{module}.lora_A.weight"] = A_RI.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B_OR.contiguous()
    data = save(tensors, metadata={"format": "pt"})
    write_file(folder / "adapter_model.safetensors", data)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=[name.removesuffix(".weight") for name in residuals],
        task_type="CAUSAL_LM", base_model_name_or_path=out.name, inference_mode=True,
    )  # fmt: skip
    config.save_pretrained(str(folder))
    delta = sum(residual.delta for residual in residuals.values()) or 1.0
    return ResidualRecord(
        rank=rank,
        bytes=len(data),
        noise_without=(sum(residual.error_without for residual in residuals.values()) / delta) ** 0.5,
        noise_with=(sum(residual.error_with for residual in residuals.values()) / delta) ** 0.5,
    )
