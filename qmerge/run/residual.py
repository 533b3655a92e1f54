"""``--residual``: a small LoRA that compensates for the rounding error of the merged weights; the best of its rank.

    minimize  tr((E − B A) K (E − B A)ᵀ)   E = merged − stored,  K = F Fᵀ (``rounding/base.py``)

With E F = U S Vᵀ the answer is B = U √S, A = √S Vᵀ F⁻¹ of the largest ranks: the weighted low-rank approximation of
CLoQ (arXiv 2501.18475, section 3).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qmerge.hub import ADAPTER_CONFIG
from qmerge.rounding.base import InputStatistics, make_objective, upper_factor
from qmerge.safetensors_io.disk import write_file
from qmerge.schema import ResidualRecord
from qmerge.types import Rows, Step, dot
from qmerge.weights.context import RunContext
from qmerge.weights.values import base_values, merged_values

FOLDER = "residual"
"""The folder inside the output folder."""

EXTRA_DIRECTIONS = 8
POWER_ITERATIONS = 6
"""Parameters of the randomized decomposition (arXiv 0909.4061)."""


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The LoRA of one weight, and the error that it leaves.

    A_RI, B_OR      float32 factors
    error_without   ‖error‖² in the layer's output without the LoRA, over the inputs that calibration saw (in the weight,
                    where it saw none)
    error_with      the same with the LoRA
    delta           ‖delta‖² in the layer's output
    """

    A_RI: Tensor
    B_OR: Tensor
    error_without: float
    error_with: float
    delta: float


def fit_residual(
    step: Step, stored_OI: Tensor, inputs: InputStatistics | None, *, context: RunContext, rank: int
) -> Residual:  # fmt: skip
    """The LoRA for one merged weight.

    Args:
        stored_OI: float32 [O, I], the values that were written.
        inputs: statistics of the inputs of this weight.
    """
    assert step.update is not None
    columns = step.shape[1]
    merged_OI = merged_values(step, context)
    base_OI = base_values(step, context)
    objective = make_objective(inputs, step.update.directions(), columns, context.device)
    factor_II = upper_factor(objective.K_II)
    assert factor_II is not None, "make_objective gave an objective without a factor"
    # The error to make up for is that against the aim, which corrects the rounding of earlier layers, too.
    u_OR, s_R, v_IR = leading_triplets((objective.aim(merged_OI, Rows(0, step.shape[0])) - stored_OI) @ factor_II, rank)
    B_OR = u_OR * s_R.sqrt()
    A_RI = torch.linalg.solve_triangular(factor_II, (v_IR * s_R.sqrt()).T, upper=True, left=False)

    # The report is about the true error: without the aim, and without the terms that the objective adds.
    inputs_II = objective.hessian_II
    if inputs_II is None:
        inputs_II = torch.eye(columns, device=context.device)
    error_OI = merged_OI - stored_OI
    return Residual(
        A_RI=A_RI.cpu(),
        B_OR=B_OR.cpu(),
        error_without=_squared_output(error_OI, inputs_II),
        error_with=_squared_output(error_OI - B_OR @ A_RI, inputs_II),
        delta=_squared_output(merged_OI - base_OI, inputs_II),
    )


def _squared_output(weight_OI: Tensor, inputs_II: Tensor) -> float:
    """tr(W H Wᵀ)."""
    return dot(weight_OI @ inputs_II, weight_OI)


def leading_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular triplets of a float32 [O, I] matrix: u [O, R], s [R], v [I, R]. Always the same for the same
    matrix."""
    rank = min(rank, *matrix.shape)
    width = min(rank + EXTRA_DIRECTIONS, *matrix.shape)
    # The decomposition starts from random directions. The seed makes the output bytes the same in every run.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, width, POWER_ITERATIONS)
    return u[:, :rank], s[:rank], v[:, :rank]


def write_residuals(out: Path, residuals: Mapping[str, Residual], rank: int) -> ResidualRecord:
    """Write the LoRAs as one adapter, as peft saves it, to ``out/residual``.

    Args:
        residuals: name of a weight → its LoRA.
    """
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    nbytes = _write_tensors(folder, residuals, rank)
    _write_config(folder, residuals, rank)
    delta = sum(residual.delta for residual in residuals.values()) or 1.0  # all deltas are zero: so are the errors
    return ResidualRecord(
        rank=rank,
        bytes=nbytes,
        noise_without=(sum(residual.error_without for residual in residuals.values()) / delta) ** 0.5,
        noise_with=(sum(residual.error_with for residual in residuals.values()) / delta) ** 0.5,
    )


def _write_tensors(folder: Path, residuals: Mapping[str, Residual], rank: int) -> int:
    """Write the factors; returns the size of the file."""
    from safetensors.torch import save

    tensors = {}
    for name, residual in residuals.items():
        module = name.removesuffix(".weight")
        # Where a weight has fewer ranks than were asked for, the others are zero: peft wants one rank.
        missing = rank - len(residual.A_RI)
        A_RI = torch.nn.functional.pad(residual.A_RI, (0, 0, 0, missing))
        B_OR = torch.nn.functional.pad(residual.B_OR, (0, missing))
        tensors[f"base_model.model.{module}.lora_A.weight"] = A_RI.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B_OR.contiguous()
    data = save(tensors, metadata={"format": "pt"})
    write_file(folder / "adapter_model.safetensors", data)
    return len(data)


def _write_config(folder: Path, residuals: Mapping[str, Residual], rank: int) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[name.removesuffix(".weight") for name in residuals],
        task_type="CAUSAL_LM",
        base_model_name_or_path=folder.parent.name,
        inference_mode=True,
    )
    # As peft saves it, but whole or not at all.
    # Sets have another order in every process.
    content = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    write_file(folder / ADAPTER_CONFIG, json.dumps(content, indent=2, sort_keys=True).encode())
