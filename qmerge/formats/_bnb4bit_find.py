"""Finds bitsandbytes' 4-bit weights in a checkpoint, and checks that their tensors fit together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats._bnb4bit_grid import standard_quant_map
from qmerge.formats._tensors import check_finite, check_present, parts_of
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TORCH_DTYPES, TensorInfo, Weight

# Values that can share an absmax (bitsandbytes 0.50, functional.py).
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Levels of the 8-bit codes in which double quantization stores the absmax.
QUANT_MAP_ENTRIES = 256


@dataclass(frozen=True)
class Bnb4bitOptions:
    """How a weight is stored in NF4 or FP4."""

    block_size: int = 64
    """Values that share an absmax."""

    double_quant: bool = False
    """Whether absmax is stored in 8 bits."""

    quant_storage: str = "uint8"
    """torch dtype of the tensor that holds the bytes of the codes."""

    dtype: str = "bfloat16"
    """torch dtype that the stock loader dequantizes to (that of the model when it was quantized)."""


@dataclass(frozen=True, kw_only=True)
class QuantState:
    """The JSON text in ``…quant_state.bitsandbytes__nf4``."""

    quant_type: str
    block_size: int
    dtype: str
    shape: tuple[int, ...]

    nested_block_size: int
    """Absmax values that share a scale with double quantization; 0 if the text has none."""

    nested_offset: float | None
    """Mean of the absmax with double quantization."""


def read_quant_state(info: TensorInfo, reader: Reader) -> QuantState:
    """Read the quant state of a weight.

    Raises:
        CheckpointError: it is not such a text.
    """
    try:
        state = dict(json.loads(bytes(reader.bytes(info, 0, info.nbytes))))
        offset = state.get("nested_offset")
        return QuantState(
            quant_type=str(state["quant_type"]),
            block_size=int(state["blocksize"]),
            dtype=str(state["dtype"]),
            shape=tuple(int(size) for size in state["shape"]),
            nested_block_size=int(state.get("nested_blocksize", 0)),
            nested_offset=None if offset is None else float(offset),
        )
    except (ValueError, KeyError, TypeError) as cause:
        raise CheckpointError(f"{info.name} is not a quant state of bitsandbytes: {cause!r}") from cause


def state_part(local: str, quant_type: str) -> str:
    """Local name of the tensor with the quant state; its end tells NF4 from FP4."""
    return f"{local}.quant_state.bitsandbytes__{quant_type}"


def read_absmax(weight: Weight, reader: Reader) -> Tensor:
    """float32 [B]: the absmax of every block, after double quantization is undone as bitsandbytes does.

    Raises:
        CheckpointError: one is NaN or infinite.
    """
    stored_B = reader.tensor(weight.parts[f"{weight.local}.absmax"]).flatten()
    absmax_B = stored_B.float()
    nested = weight.parts.get(f"{weight.local}.nested_absmax")
    if nested is not None:
        # In this order, the mean last, as bitsandbytes: any other order differs in the last bit.
        state = read_quant_state(weight.parts[state_part(weight.local, weight.format)], reader)
        code_L = reader.tensor(weight.parts[f"{weight.local}.nested_quant_map"]).float()
        nested_B = reader.tensor(nested).float().repeat_interleave(state.nested_block_size)[: len(stored_B)]
        centered_B = code_L[stored_B.int()] * nested_B
        absmax_B = centered_B + torch.tensor(state.nested_offset)
    check_finite(absmax_B, f"{weight.name}.absmax")
    return absmax_B


def find_4bit(name: str, quant_type: str, tensors: Mapping[str, TensorInfo], reader: Reader) -> Weight:
    """The weight of this full name.

    Raises:
        CheckpointError: a tensor of it is missing, or two contradict each other.
    """
    module, _, local = name.rpartition(".")
    state_name = state_part(local, quant_type)
    nested = (f"{local}.nested_absmax", f"{local}.nested_quant_map")
    # quant_map is optional: loaders have their own table.
    parts = parts_of(module, (local, f"{local}.absmax", f"{local}.quant_map", *nested, state_name), tensors)
    required = [local, f"{local}.absmax"]
    if any(part in parts for part in nested):
        required += nested
    check_present(module, required, parts, quant_type)
    state = read_quant_state(parts[state_name], reader)
    check = _Check(name=name, local=local, quant_type=quant_type, parts=parts, state=state)
    check.sizes()
    check.quant_type_and_map(reader)
    check.absmax()
    options = Bnb4bitOptions(
        block_size=state.block_size,
        double_quant=check.double_quant,
        quant_storage=str(TORCH_DTYPES[parts[local].dtype]).removeprefix("torch."),
        dtype=state.dtype,
    )
    return Weight(module=module, local=local, format=quant_type, shape=state.shape, parts=parts, options=options)


@dataclass(frozen=True, kw_only=True)
class _Check:
    """Checks of one weight. Each raises CheckpointError."""

    name: str
    local: str
    quant_type: str
    parts: Mapping[str, TensorInfo]
    state: QuantState

    @property
    def double_quant(self) -> bool:
        return f"{self.local}.nested_absmax" in self.parts

    @property
    def blocks(self) -> int:
        """Number of blocks; -1 for a block size that bitsandbytes does not have."""
        if self.state.block_size not in BLOCK_SIZES:
            return -1
        return -(-math.prod(self.state.shape) // self.state.block_size)

    def sizes(self) -> None:
        """As many bytes of codes and as many absmax as the shape in the quant state needs."""
        nbytes = (math.prod(self.state.shape) + 1) // 2
        codes, absmax = self.parts[self.local], self.parts[f"{self.local}.absmax"]
        # Two codes share a byte; an odd last one has a byte of its own.
        is_matrix = len(self.state.shape) >= 2
        if not is_matrix or codes.nbytes != nbytes or math.prod(absmax.shape) != self.blocks:
            raise CheckpointError(
                f"{self.name}: a {list(self.state.shape)} weight in blocks of {self.state.block_size} needs {nbytes} bytes of "
                f"codes and {self.blocks} absmax, found {codes.nbytes} and {math.prod(absmax.shape)}. Download the model again"
            )

    def quant_type_and_map(self, reader: Reader) -> None:
        """The levels are those of the format."""
        if self.state.quant_type != self.quant_type:
            raise CheckpointError(
                f"{self.name}: the quant state says {self.state.quant_type!r}, but its name says {self.quant_type!r}. Download "
                f"the model again"
            )
        quant_map = self.parts.get(f"{self.local}.quant_map")
        if quant_map is None:
            return
        standard_L = standard_quant_map(self.quant_type)
        if not torch.equal(reader.tensor(quant_map).float().flatten(), standard_L):
            raise CheckpointError(
                f"{self.name}.quant_map is not that of {self.quant_type}. Most loaders ignore it, so its weights would differ "
                f"from one loader to the next; quantize the model again with the standard levels"
            )

    def absmax(self) -> None:
        """The dtype of the absmax, and the tensors of double quantization."""
        if self.double_quant:
            self._nested_parts()
        info = self.parts[f"{self.local}.absmax"]
        expected = "U8" if self.double_quant else "F32"
        if info.dtype != expected:
            raise CheckpointError(f"{self.name}.absmax is {info.dtype}, expected {expected}. Download the model again")

    def _nested_parts(self) -> None:
        block_size = self.state.nested_block_size
        if self.state.nested_offset is None or block_size < 1:
            raise CheckpointError(
                f"{self.name}: double quantization needs nested_blocksize and nested_offset in the quant state. Download the "
                f"model again"
            )
        counts = {"nested_absmax": -(-self.blocks // block_size), "nested_quant_map": QUANT_MAP_ENTRIES}
        for part, count in counts.items():
            info = self.parts[f"{self.local}.{part}"]
            if math.prod(info.shape) != count or info.dtype != "F32":
                raise CheckpointError(
                    f"{self.name}.{part} is {info.dtype} {list(info.shape)}, expected F32 [{count}]. Download the model again"
                )
