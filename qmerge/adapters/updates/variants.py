"""Variants of LoRA (peft 0.21, tuners/lora/variants.py): factors that are stored smaller than they act, and refused variants.

peft applies an option only in some kinds of layers, and ignores it in others: QALoRA in GPTQ layers alone; BD-LoRA, KaSA and
MonteCLoRA in dense ones, but not in layers of bitsandbytes, HQQ or GPTQ, where such an adapter is a plain LoRA. So the tensors
decide which variant was trained: their names, and their widths compared with the base's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
"""Option → why an adapter with it is not merged, and what to do."""

ARROW = re.compile(r".+\.lora_arrow(\..+)?")
"""Tensors of Arrow's router."""

TRAINING_ONLY = re.compile(r"(?P<module>.+)\.(?P<part>lora_velora_embed|lora_monteclora_sampler)(\..+)?")
"""VeLoRA's projection compresses activations for the backward pass, MonteCLoRA's sampler adds noise in training: neither is in
the forward pass of ``model.eval()``."""

OPTION_OF = {
    "lora_velora_embed": "velora_config",
    "lora_monteclora_sampler": "monteclora_config",
    "lora_diag": "kasa_config",
}
"""Part of a tensor's name → the option that makes peft train such tensors."""


def refuse(config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse variants that depend on tokens or on another model's layers.

    Args:
        names: of the adapter's tensors.

    Raises:
        AdapterError: an option or a tensor belongs to such a variant.
    """
    for option, reason in REFUSED.items():
        if config.get(option):
            raise AdapterError(f"adapter_config.json has {option}={config[option]!r}: {reason}")
    for name in names:
        if ARROW.fullmatch(name):
            raise AdapterError(f"the adapter has {name!r}: {REFUSED['arrow_config']}")


def training_only(name: str, config: Mapping[str, Any]) -> str | None:
    """The module of a tensor that no forward pass uses; None for other tensors.

    Raises:
        AdapterError: the config does not ask for its variant.
    """
    match = TRAINING_ONLY.fullmatch(name)
    if match is None:
        return None
    check_option(name, match["part"], config)
    return match["module"]


def check_option(name: str, part: str, config: Mapping[str, Any]) -> None:
    """Raise AdapterError for a tensor of a variant that the config does not ask for."""
    option = OPTION_OF[part]
    if not config.get(option):
        raise AdapterError(
            f"the adapter has {name!r}, but adapter_config.json has no {option}; set it, or remove the tensor"
        )


@dataclass(frozen=True)
class ByWidthUpdate(WrappingUpdate):
    """The LoRA of a variant, or plain LoRA, decided by the width of the weight.

    update  the variant's LoRA
    plain   the same tensors as plain LoRA, which they are in layers where peft ignores the variant
    """

    update: LoraUpdate
    plain: LoraUpdate

    def to(self, device: torch.device) -> ByWidthUpdate:
        return ByWidthUpdate(self.update.to(device), self.plain.to(device))

    def fitted(self, shape: tuple[int, int]) -> Update:
        """The one of this shape, also transposed (Conv1D); itself if neither has it."""
        for lora in (self.update, self.plain):
            if lora.shape in (shape, shape[::-1]):
                return lora
        return self

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        is_plain = base_OI.shape[1] == self.plain.shape[1]
        lora = self.plain if is_plain else self.update
        return lora.apply(base_OI, rows)


def linear(
    module: str, A_RI: Tensor, B_OR: Tensor, *, scale: float, config: Mapping[str, Any]
) -> LoraUpdate | ByWidthUpdate:
    """The LoRA of a linear layer. A variant's factors may be narrower: QALoRA's A, and A or B of BD-LoRA.

    Raises:
        AdapterError: an option of a variant is not a number or pattern; two variants at once.
    """
    plain = LoraUpdate(A_RI, B_OR, scale)
    if config.get("use_qalora") and config.get("use_bdlora"):
        raise AdapterError("adapter_config.json has use_qalora and use_bdlora: peft has no layer that does both")
    if config.get("use_qalora"):
        group_size = at_least(2, config.get("qalora_group_size", 16), "qalora_group_size")
        return ByWidthUpdate(LoraUpdate(pooled(A_RI, group_size), B_OR, scale), plain)
    if not config.get("use_bdlora"):
        return plain
    narrow_half, blocks = block_diagonal_half(module, config["use_bdlora"])
    # A layer that ignores the option has a plain B, with as many columns as A has rows.
    if narrow_half == "B" and B_OR.shape[1] * blocks == A_RI.shape[0]:
        return LoraUpdate(A_RI, block_diagonal(module, B_OR, blocks), scale)
    # A alone does not show whether the layer used the option: the width of the weight will.
    if narrow_half == "A" and blocks > 1:
        return ByWidthUpdate(LoraUpdate(block_diagonal(module, A_RI, blocks), B_OR, scale), plain)
    return plain


def pooled(A_RG: Tensor, size: int) -> Tensor:
    """QALoRA (arXiv 2309.14717): A for single inputs, float32 [rank, G] → [rank, G · size].

    As in peft's forward pass, A takes the means of groups of ``size`` inputs, times the number of groups G.
    """
    return A_RG.repeat_interleave(size, dim=1) * (A_RG.shape[1] / size)


def block_diagonal(module: str, narrow: Tensor, blocks: int) -> Tensor:
    """BD-LoRA: blocks of rows, each for its own part of the columns. Float32 [rows, columns / blocks] → [rows, columns].

    Raises:
        AdapterError: the rows cannot be divided into the blocks.
    """
    if narrow.shape[0] % blocks:
        raise AdapterError(
            f"{module}: {narrow.shape[0]} rows cannot be divided into the {blocks} blocks that use_bdlora gives"
        )
    whole: Tensor = torch.block_diag(*narrow.chunk(blocks))  # type: ignore[no-untyped-call]
    return whole


def block_diagonal_half(module: str, option: Any) -> tuple[Literal["A", "B"] | None, int]:
    """(the half of the module's LoRA that BD-LoRA makes block-diagonal, number of blocks); peft looks for parts of names.

    Args:
        option: ``use_bdlora`` of the config.

    Raises:
        AdapterError: the option is not as peft writes it.
    """
    if not isinstance(option, dict):
        raise AdapterError(f"adapter_config.json has use_bdlora={option!r}; expected its settings, with nblocks")
    modules_A = option.get("target_modules_bd_a") or []
    modules_B = option.get("target_modules_bd_b") or []
    for modules in (modules_A, modules_B):
        if not isinstance(modules, list) or not all(isinstance(part, str) for part in modules):
            raise AdapterError(f"adapter_config.json has use_bdlora={option!r}; expected lists of module names")
    is_A = any(part in module for part in modules_A)
    is_B = any(part in module for part in modules_B)
    if is_A and is_B:
        raise AdapterError(f"adapter_config.json: use_bdlora names {module} for both halves, which peft does not train")
    blocks = at_least(1, option.get("nblocks", 1), "use_bdlora's nblocks")
    if is_A:
        return "A", blocks
    return ("B" if is_B else None), blocks


def at_least(least: int, value: Any, name: str) -> int:
    """The value of an option; AdapterError unless it is a whole number of at least ``least``."""
    if not isinstance(value, int) or value < least:
        raise AdapterError(f"adapter_config.json: {name} is {value!r}; expected a whole number of {least} or more")
    return value


def convolution(module: str, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of a convolution's LoRA as matrices.

    Args:
        A: float32 [rank, in, kernel…].
        B: float32 [out, rank, 1…].

    Returns:
        [rank, in · kernel] and [out, rank].

    Raises:
        AdapterError: they are not factors of a convolution, or its channels are in groups.
    """
    if A.ndim != B.ndim or set(B.shape[2:]) != {1}:
        raise AdapterError(
            f"{module}: lora_A {list(A.shape)} and lora_B {list(B.shape)} are not the factors of one convolution; expected "
            f"[rank, in, kernel…] and [out, rank, 1…]"
        )
    # In a convolution with groups, each group has its own share of the ranks.
    if B.shape[1] != rank and B.shape[1] and rank % B.shape[1] == 0:
        raise AdapterError(
            f"{module}: lora_B {list(B.shape)} is that of a convolution in {rank // B.shape[1]} groups. Its LoRA connects all "
            f"channels with one another, for which the layer's weight has no entries. {UNMERGED}"
        )
    return A.flatten(1), B.flatten(1)
