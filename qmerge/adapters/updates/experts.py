"""LoRA on stacked experts (peft's ``target_parameters``): one pair of factors for a parameter of many matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qmerge.adapters.updates.expert_layout import layout_of, split_columns
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.errors import AdapterError
from qmerge.types import Rows, Update

SWAPPED_SINCE = (0, 19)
"""From this version on, peft knows that a parameter is [E, O, I]; before, A and B changed places there (peft#2521, #3165)."""


@dataclass(frozen=True)
class StackUpdate(Update):
    """LoRA of some matrices of a stack that is on disk as [E, O, I]. It is merged as [E, O·I]: a row is an expert.

    count    number of matrices, E
    matrix   (O, I)
    experts  index of a matrix → its LoRA; the others are unchanged
    """

    count: int
    matrix: tuple[int, int]
    experts: Mapping[int, LoraUpdate]

    depends_on_base = False

    @property
    def rank(self) -> int:
        return max(lora.rank for lora in self.experts.values())

    @property
    def scale(self) -> float:
        return next(iter(self.experts.values())).scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.count, math.prod(self.matrix)

    def to(self, device: torch.device) -> StackUpdate:
        return replace(self, experts={number: lora.to(device) for number, lora in self.experts.items()})

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        merged_OI = base_OI.clone()
        all_rows = Rows(0, self.matrix[0])
        for number in range(rows.start, rows.stop):
            # Experts without a LoRA keep the base's values.
            if number in self.experts:
                row = number - rows.start
                matrix_OI = base_OI[row].view(self.matrix)
                merged_OI[row] = self.experts[number].apply(matrix_OI, all_rows).flatten()
        return merged_OI

    def row_norms(self) -> Tensor | None:
        norms_E = torch.zeros(self.count)
        for number, lora in self.experts.items():
            norms_E[number] = lora.row_norms().norm()
        return norms_E


@dataclass(frozen=True)
class TargetedParameter:
    """One of ``target_parameters``.

    name           its full name in memory
    shape          [O, I] or [E, O, I]
    is_transposed  transformers marks it as [E, I, O] (gpt-oss)
    """

    name: str
    shape: tuple[int, ...]
    is_transposed: bool


def stack_update(
    parameter: TargetedParameter, A_RI: Tensor, B_OR: Tensor, *, rank: int, scale: float, config: Mapping[str, Any]
) -> StackUpdate:
    """The factors as peft saves them → one pair for each matrix of the parameter [E, rows, columns].

    A parameter [O, I] is a stack of one.

    Args:
        A_RI: float32 [E · R, …], expert by expert.
        B_OR: float32 [… , R · E], rank by rank (or expert by expert: ``layout_of``).

    Raises:
        AdapterError: they do not fit the parameter, or nothing decides how they fit.
    """
    is_stack = len(parameter.shape) == 3
    count, rows, columns = parameter.shape if is_stack else (1, *parameter.shape)
    shapes = f"{parameter.name} {list(parameter.shape)}: lora_A {list(A_RI.shape)} and lora_B {list(B_OR.shape)}"
    if A_RI.ndim != 2 or B_OR.ndim != 2 or not A_RI.shape[0] == B_OR.shape[1] == count * rank:
        raise AdapterError(
            f"{shapes} are not of rank {rank} for each of {count} experts, which adapter_config.json gives"
        )
    inner, outer = A_RI.shape[1], B_OR.shape[0]
    fits = (outer, inner) == (rows, columns)
    fits_transposed = (inner, outer) == (rows, columns) and is_stack
    if not fits and not fits_transposed:
        raise AdapterError(f"{shapes} do not fit. Is this the base that the adapter was trained on?")
    if fits and fits_transposed:  # square matrices: the shapes do not say which way round
        fits = not parameter.is_transposed and _knows_the_axes(parameter.name, config)
    A_ERI = A_RI.reshape(count, rank, inner)
    B_EOR = split_columns(B_OR, count, rank, layout_of(parameter.name, B_OR, count=count, rank=rank, config=config))
    experts: dict[int, LoraUpdate] = {}
    for number in range(count):
        # Transposed, a product of two factors is (B A)ᵀ = Aᵀ Bᵀ.
        A, B = A_ERI[number], B_EOR[number]
        experts[number] = LoraUpdate(A, B, scale) if fits else LoraUpdate(B.T, A.T, scale)
    return StackUpdate(count, (rows, columns), experts)


def _knows_the_axes(parameter: str, config: Mapping[str, Any]) -> bool:
    """Whether the version of peft that trained the adapter took the axes of the parameter as they are.

    Raises:
        AdapterError: the config does not say which version it was.
    """
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version", "")))
    if version is None:
        raise AdapterError(
            f"{parameter} contains square matrices, and adapter_config.json has no peft_version: peft before 0.19 took such "
            f"matrices as transposed. Write the version that saved the adapter into adapter_config.json, as peft_version"
        )
    return (int(version[1]), int(version[2])) >= SWAPPED_SINCE
