"""Variants of LoRA (peft 0.21, tuners/lora/variants.py): factors that are stored smaller than they act, and what is refused.

peft looks at an option only in some kinds of layers, and ignores it in others: QALoRA in GPTQ layers alone; BD-LoRA, KaSA and
MonteCLoRA in dense ones, but not in layers of bitsandbytes, HQQ or GPTQ, where such an adapter is a plain LoRA. So the tensors
say what was trained: their names, and their widths beside the base's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmerge.adapters.updates.lora import LoraUpdate, WrappingUpdate
from qmerge.errors import AdapterError
from qmerge.types import Rows, Update

UNMERGED = "It cannot be merged; serve it unmerged, with peft"
REFUSED = {
    "alora_invocation_tokens": f"aLoRA acts only on the tokens after its invocation tokens. {UNMERGED}",
    "arrow_config": f"Arrow chooses among several adapters for every token. {UNMERGED}",
    "megatron_config": (
        "it was trained on parallel layers of Megatron, whose names and parts are not those of this base; "
        "convert it to a PEFT adapter of the Hugging Face model first"
    ),
}
"""Option → why an adapter that has it is not merged, and what to do."""

ARROW = re.compile(r".+\.lora_arrow(\..+)?")

TRAINING_ONLY = re.compile(r"(?P<module>.+)\.(?P<part>lora_velora_embed|lora_monteclora_sampler)(\..+)?")
"""VeLoRA's projection compresses activations for the backward pass, MonteCLoRA's sampler adds noise in training: neither is in
the forward pass of ``model.eval()``."""

OPTION_OF = {
    "lora_velora_embed": "velora_config",
    "lora_monteclora_sampler": "monteclora_config",
    "lora_diag": "kasa_config",
}


def refuse(config: Mapping[str, Any], names: list[str]) -> None:
    """Raise AdapterError for what depends on tokens or on another model's layers, by option or by tensor."""
    for option, why in REFUSED.items():
        if config.get(option):
            raise AdapterError(f"adapter_config.json has {option}={config[option]!r}: {why}")
    routers = [name for name in names if ARROW.fullmatch(name)]
    if routers:
        raise AdapterError(f"the adapter has {routers[0]!r}: {REFUSED['arrow_config']}")


def training_only(name: str, config: Mapping[str, Any]) -> str | None:
    """The module that a tensor belongs to which no forward pass uses; None of other tensors."""
    match = TRAINING_ONLY.fullmatch(name)
    if match is None:
        return None
    check_said(name, match["part"], config)
    return match["module"]


def check_said(name: str, part: str, config: Mapping[str, Any]) -> None:
    """Raise AdapterError where a variant's tensor is there, but the config does not ask for the variant."""
    if not config.get(OPTION_OF[part]):
        raise AdapterError(
            f"the adapter has {name!r}, but adapter_config.json has no {OPTION_OF[part]}: which is right?"
        )


@dataclass(frozen=True)
class ByWidth(WrappingUpdate):
    """The LoRA of a variant (``update``), and the plain one that the same tensors are in a layer where peft ignores the
    variant."""

    update: LoraUpdate
    plain: LoraUpdate

    def to(self, device: torch.device) -> ByWidth:
        return ByWidth(self.update.to(device), self.plain.to(device))

    def fitted(self, shape: tuple[int, int]) -> Update:
        """The one of this shape, either way round (Conv1D); itself where neither is."""
        return next((lora for lora in (self.update, self.plain) if lora.shape in (shape, shape[::-1])), self)

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        lora = self.plain if base_OI.shape[1] == self.plain.shape[1] else self.update
        return lora.apply(base_OI, rows)


def linear(
    module: str, A_RI: Tensor, B_OR: Tensor, scale: float, config: Mapping[str, Any]
) -> LoraUpdate | ByWidth:  # fmt: skip
    """A linear layer's LoRA. Factors of a variant may be narrower: QALoRA's A, and A or B of BD-LoRA.

    Raises:
        AdapterError: an option of a variant is no number or pattern; two variants at once.
    """
    qalora, bdlora = config.get("use_qalora"), config.get("use_bdlora")
    if qalora and bdlora:
        raise AdapterError("adapter_config.json has use_qalora and use_bdlora: peft has no layer that does both")
    if qalora:
        wide_RI = pooled(A_RI, at_least(2, config.get("qalora_group_size", 16), "qalora_group_size"))
        return ByWidth(LoraUpdate(wide_RI, B_OR, scale), LoraUpdate(A_RI, B_OR, scale))
    narrow, blocks = block_diagonal_half(module, bdlora) if bdlora else (None, 1)
    if narrow == "B" and B_OR.shape[1] * blocks == A_RI.shape[0]:
        return LoraUpdate(A_RI, block_diagonal(module, B_OR, blocks), scale)
    if narrow == "A" and blocks > 1:
        wide_RI = block_diagonal(module, A_RI, blocks)
        return ByWidth(LoraUpdate(wide_RI, B_OR, scale), LoraUpdate(A_RI, B_OR, scale))
    return LoraUpdate(A_RI, B_OR, scale)


def pooled(A_RG: Tensor, size: int) -> Tensor:
    """QALoRA (arXiv 2309.14717), as in peft's forward pass: A takes the means of groups of ``size`` inputs, times the number
    of groups G. Float32 [rank, G] → [rank, G · size]."""
    return A_RG.repeat_interleave(size, dim=1) * (A_RG.shape[1] / size)


def block_diagonal(module: str, narrow: Tensor, blocks: int) -> Tensor:
    """BD-LoRA: blocks of rows, each for its own part of the columns. Float32 [rows, columns / blocks] → [rows, columns]."""
    if narrow.shape[0] % blocks:
        raise AdapterError(f"{module}: {narrow.shape[0]} rows do not make up the {blocks} blocks that use_bdlora gives")
    whole: Tensor = torch.block_diag(*narrow.chunk(blocks))  # type: ignore[no-untyped-call]
    return whole


def block_diagonal_half(module: str, option: Any) -> tuple[str | None, int]:
    """Which half of the module's LoRA BD-LoRA makes block-diagonal (peft looks for parts of names), in how many blocks."""
    if not isinstance(option, dict):
        raise AdapterError(f"adapter_config.json has use_bdlora={option!r}; expected its settings, with nblocks")
    halves = {"A": option.get("target_modules_bd_a") or [], "B": option.get("target_modules_bd_b") or []}
    if not all(isinstance(parts, list) and all(isinstance(part, str) for part in parts) for parts in halves.values()):
        raise AdapterError(f"adapter_config.json has use_bdlora={option!r}; expected lists of module names")
    found = [half for half, parts in halves.items() if any(part in module for part in parts)]
    if len(found) > 1:
        raise AdapterError(f"adapter_config.json: use_bdlora names {module} for both halves, which peft does not train")
    return next(iter(found), None), at_least(1, option.get("nblocks", 1), "use_bdlora's nblocks")


def at_least(least: int, value: Any, name: str) -> int:
    if not isinstance(value, int) or value < least:
        raise AdapterError(f"adapter_config.json: {name} is {value!r}; expected a whole number of {least} or more")
    return value


def convolution(module: str, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Float32 A [rank, in, kernel…] and B [out, rank, 1…] → [rank, in · kernel], [out, rank].

    Raises:
        AdapterError: they are no convolutions; the layer's channels are in groups.
    """
    if A.ndim != B.ndim or set(B.shape[2:]) != {1}:
        raise AdapterError(
            f"{module}: lora_A {list(A.shape)} and lora_B {list(B.shape)} are no convolutions of one layer"
        )
    if B.shape[1] != rank and B.shape[1] and rank % B.shape[1] == 0:
        raise AdapterError(
            f"{module}: lora_B {list(B.shape)} is that of a convolution in {rank // B.shape[1]} groups. Its LoRA connects all "
            f"channels with one another, which the layer's weight has no room for. {UNMERGED}"
        )
    return A.flatten(1), B.flatten(1)
