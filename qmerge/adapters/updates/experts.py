"""LoRA on stacked experts (peft's ``target_parameters``): one pair of factors for a parameter of many matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.checkpoint.names import Names
from qmerge.errors import AdapterError, NeedsBaseError, listed
from qmerge.types import Rows, Update

LAYOUT = "lora_B_layout"
LAYOUTS = ("rank_major", "expert_major")

SWAPPED_SINCE = (0, 19)
"""From this version on peft takes [E, O, I] for what it is; before, A and B changed places there (peft#2521, #3165)."""

CLEAR = 5.0
"""Standard errors by which one layout of lora_B must beat the other."""

EXPERTS_COMPARED = 16


@dataclass(frozen=True)
class StackUpdate(Update):
    """LoRA of some matrices of a stack that lies on disk as [E, O, I]. It is worked on as [E, O·I]: a row is an expert."""

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
        for place, number in enumerate(range(rows.start, rows.stop)):
            if number in self.experts:
                matrix_OI = base_OI[place].view(self.matrix)
                merged_OI[place] = self.experts[number].apply(matrix_OI, Rows(0, self.matrix[0])).flatten()
        return merged_OI

    def row_norms(self) -> Tensor | None:
        norms_E = torch.zeros(self.count)
        for number, lora in self.experts.items():
            norms_E[number] = lora.row_norms().norm()
        return norms_E


@dataclass(frozen=True)
class Parameter:
    """One of ``target_parameters``: its full name in memory, and its shape, [O, I] or [E, O, I]; ``is_transposed``: transformers
    says that it is [E, I, O] (gpt-oss)."""

    name: str
    shape: tuple[int, ...]
    is_transposed: bool


def targeted(module: str, config: Mapping[str, Any], names: Names | None) -> Parameter | None:
    """The parameter that the LoRA under a module's name belongs to, if it is one of ``target_parameters``."""
    targets = config.get("target_parameters")
    if not targets:
        return None
    if names is None:
        raise NeedsBaseError(
            f"adapter_config.json has target_parameters={listed(targets)}: which LoRA belongs to which of them, and how many "
            f"experts there are, only the base tells"
        )
    name = names.targeted_parameter(module, targets)
    if name == module and module.endswith(".base_layer"):
        raise AdapterError(
            f"{module}: adapter_config.json's target_parameters ({listed(targets)}) name fewer of the base's parameters than "
            f"there are LoRAs: is one misspelt, or is it another base?"
        )
    places = names.blocks_of(name) if name != module else None
    return Parameter(name, places[0].shape, names.is_transposed(name)) if places else None


def check_complete(found: Mapping[str, Parameter], config: Mapping[str, Any], names: Names | None) -> None:
    """Raise AdapterError where a targeted parameter has no LoRA beside another one of its module that has. ``found``: by the
    name of the module, as the adapter has it."""
    if names is None:
        return
    known = {parameter.name for parameter in found.values()}
    for module in {module.replace(".base_layer", "") for module in found}:
        missing = [
            name for name in names.targeted_parameters_in(module, config["target_parameters"]) if name not in known
        ]
        if missing:
            raise AdapterError(f"{missing[0]} is one of target_parameters, but has no LoRA: the adapter is incomplete")


def stacked(
    parameter: Parameter, A_RI: Tensor, B_OR: Tensor, rank: int, scale: float, config: Mapping[str, Any]
) -> StackUpdate:  # fmt: skip
    """The factors as peft saves them → one pair per expert, for matrices as the parameter [E, rows, columns] holds them. A
    parameter [O, I] is a stack of one.

    Args:
        A_RI: float32 [E · R, …], expert by expert. B_OR: float32 [… , R · E], rank by rank.

    Raises:
        AdapterError: they do not fit the parameter, or it cannot be told how.
    """
    name, shape = parameter.name, parameter.shape
    count, rows, columns = shape if len(shape) == 3 else (1, *shape)
    found = f"{name} {list(shape)}: lora_A {list(A_RI.shape)} and lora_B {list(B_OR.shape)}"
    if A_RI.ndim != 2 or B_OR.ndim != 2 or not A_RI.shape[0] == B_OR.shape[1] == count * rank:
        raise AdapterError(
            f"{found} are not of rank {rank} for each of {count} experts, which adapter_config.json gives"
        )
    inner, outer = A_RI.shape[1], B_OR.shape[0]
    as_it_is, turned = (outer, inner) == (rows, columns), (inner, outer) == (rows, columns) and len(shape) == 3
    if as_it_is and turned:
        as_it_is = not parameter.is_transposed and _swaps(name, config)
    if not as_it_is and not turned:
        raise AdapterError(f"{found} do not fit. Is this the base that the adapter was trained on?")
    A_ERI = A_RI.reshape(count, rank, inner)
    split = _by_rank if layout_of(name, B_OR, count, rank, config) == "rank_major" else _by_expert
    B_EOR = split(B_OR, count, rank)
    pairs = [(A_ERI[e], B_EOR[e]) if as_it_is else (B_EOR[e].T, A_ERI[e].T) for e in range(count)]
    return StackUpdate(count, (rows, columns), {e: LoraUpdate(A, B, scale) for e, (A, B) in enumerate(pairs)})


def _by_rank(B_OR: Tensor, count: int, rank: int) -> Tensor:
    return B_OR.reshape(-1, rank, count).permute(2, 0, 1)


def _by_expert(B_OR: Tensor, count: int, rank: int) -> Tensor:
    return B_OR.reshape(-1, count, rank).permute(1, 0, 2)


def _swaps(parameter: str, config: Mapping[str, Any]) -> bool:
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version", "")))
    if version is None:
        raise AdapterError(
            f"{parameter} holds square matrices, and adapter_config.json names no peft_version: peft before 0.19 took them "
            f"transposed. Write the version that saved the adapter into it, as peft_version"
        )
    return (int(version[1]), int(version[2])) >= SWAPPED_SINCE


def layout_of(parameter: str, B_OR: Tensor, count: int, rank: int, config: Mapping[str, Any]) -> str:
    """Whether the columns of lora_B run rank by rank, as peft has them, or expert by expert, as Unsloth wrote them for a
    time (unslothai/unsloth-zoo#1232, #1269), in the same shape. What the config says counts; else what the numbers say,
    where Unsloth made the adapter.

    Raises:
        AdapterError: Unsloth made it and the numbers do not tell; or peft made it and they contradict.
    """
    said = config.get(LAYOUT)
    if said is not None and said not in LAYOUTS:
        raise AdapterError(f"adapter_config.json has {LAYOUT}={said!r}; expected {' or '.join(LAYOUTS)}")
    if said or rank == 1 or count == 1:
        return said or LAYOUTS[0]
    lead = rank_major_lead(B_OR, count, rank)
    unsloth = bool((config.get("auto_mapping") or {}).get("unsloth_fixed") or config.get("unsloth_training_method"))
    if lead > CLEAR or (not unsloth and lead > -CLEAR):
        return LAYOUTS[0]
    if lead < -CLEAR and unsloth:
        return LAYOUTS[1]
    numbers = "look expert by expert" if lead < -CLEAR else "do not tell"
    raise AdapterError(
        f"{parameter}: the columns of lora_B run rank by rank (peft) or expert by expert (Unsloth, for a time), and the "
        f'numbers {numbers}. Write "{LAYOUT}": "rank_major" or "expert_major" into adapter_config.json'
    )


def rank_major_lead(B_OR: Tensor, count: int, rank: int) -> float:
    """How much more alike the columns of one expert are if they run rank by rank than if expert by expert, in standard
    errors. (All columns of an expert are made of the gradients that its tokens sent through its outputs.)"""
    B_OR = torch.nn.functional.normalize(B_OR, dim=0)
    some = range(0, count, max(1, count // EXPERTS_COMPARED))
    pairs = torch.triu_indices(rank, rank, offset=1)
    alike = []
    for split in (_by_rank, _by_expert):
        columns_EOR = split(B_OR, count, rank)
        cosines = [(columns_EOR[e].T @ columns_EOR[e])[pairs[0], pairs[1]].abs() for e in some]
        alike.append(torch.cat(cosines).double())
    error = math.sqrt(sum(float(a.var(correction=0)) / len(a) for a in alike))
    return float(alike[0].mean() - alike[1].mean()) / error if error else 0.0
