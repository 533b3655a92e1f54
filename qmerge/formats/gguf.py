"""GGUF file with the types of a GGUF base, or as Q4_K_M (other mixes have names of their own, such as q8_0).

A weight of a GGUF file is made of blocks, which hold codes and scales (``_gguf_blocks``), and its rows are in llama.cpp's
order. All other targets are this format with another mix, which says which tensor gets which type (``qmerge/gguf/mixes.py``).
A weight keeps its name and its order of rows from the Hugging Face model; only reading and writing know of llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import NumbersError, RecipeError
from qmerge.formats._gguf_blocks import BLOCK_TYPES, BlockType
from qmerge.formats._gguf_grid import BlockGrid, BlockLevelsGrid
from qmerge.formats._tensors import check_finite, read_rows
from qmerge.formats.base import NOT_QUANTIZED, FormatInfo, Stored, TargetFormat
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Rows, TensorInfo, TensorSpec, Weight, as_matrix

__all__ = ["BLOCK_TYPES", "FORMAT", "Gguf", "GgufOptions", "in_file_order", "in_model_order"]

READ_BYTES = 2**24
"""Bytes of a weight that are read at a time to find its scales."""


@dataclass(frozen=True)
class GgufOptions:
    """How one weight is stored.

    type   of its blocks, as GGML spells it: Q4_K
    order  row i of a run of rows in the file is row ``order[i]`` of the run; empty: the same order
    shift  is added to the values in the file (Gemma's norms)
    """

    type: str
    order: tuple[int, ...] = ()
    shift: float = 0.0

    @property
    def blocks(self) -> BlockType:
        """How its bytes are arranged."""
        return BLOCK_TYPES[self.type]


class StoredGguf(Stored):
    """A weight of a GGUF file."""

    def __init__(self, weight: Weight, options: GgufOptions, reader: Reader, device: torch.device) -> None:
        self._info = weight.parts[weight.local]
        self._options = options
        self._reader = reader
        self._device = device
        rows, columns = as_matrix(weight.shape)
        step = len(options.order) or 1
        count = max(step, READ_BYTES // max(1, self._info.shape[1]) // step * step)
        blocks = (Rows(start, min(start + count, rows)) for start in range(0, rows, count))
        scales_OS = torch.cat([options.blocks.scales(self._stored(block)) for block in blocks])
        self.grid = options.blocks.grid(scales_OS, columns)
        for scales in scales_of(self.grid):
            check_finite(scales, weight.name)

    def codes(self, rows: Rows) -> Tensor:
        codes_OI = self._options.blocks.codes(self._stored(rows))
        return codes_OI - self._options.shift if self._options.shift else codes_OI

    def _stored(self, rows: Rows) -> Tensor:
        """uint8 [rows, bytes], in the order of the model's rows."""
        stored_OB = read_rows(self._info, rows, self._reader).to(self._device)
        return in_model_order(stored_OB, self._options.order)


def scales_of(grid: Grid) -> list[Tensor]:
    """The scales and minima of a grid; none of plain numbers."""
    if isinstance(grid, BlockGrid) and grid.minimum_OG is not None:
        return [grid.scale_OG, grid.minimum_OG]
    if isinstance(grid, BlockGrid | BlockLevelsGrid):
        return [grid.scale_OG]
    return []


class Gguf(TargetFormat[GgufOptions]):
    """One mix of types, or (``gguf``) the types that a GGUF base has."""

    def __init__(self, name: str) -> None:
        self.info = FormatInfo(name=name, quant_method="gguf", loaders="llama.cpp, Ollama, LM Studio", container="gguf")

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        return []  # never in safetensors files; ``qmerge/gguf/base.py`` reads GGUF files

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredGguf(weight, self.options_of(weight), reader, device)

    def row_step(self, shape: tuple[int, int], options: GgufOptions) -> int:
        return len(options.order) or 1

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> GgufOptions:
        return GgufOptions("Q8_0")  # without a model: ``GgufOutput.options_of`` knows which tensor a weight is

    def outputs(self, local: str, shape: tuple[int, ...], options: GgufOptions) -> dict[str, TensorSpec]:
        rows, columns = as_matrix(shape)
        return {local: TensorSpec("U8", (rows, options.blocks.row_bytes(columns)))}

    def check(self, name: str, shape: tuple[int, int], options: GgufOptions) -> None:
        if shape[1] % options.blocks.block:
            raise RecipeError(
                f"{name} has {shape[1]} inputs, which is not a multiple of {options.blocks.block}, the block of {options.type}: "
                f"use --target gguf_f16"
            )

    def scales(self, values_OI: Tensor, options: GgufOptions, inputs_I: Tensor | None = None) -> Tensor:
        return options.blocks.fresh_scales(values_OI, inputs_I)

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: GgufOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        return options.blocks.grid(scales, shape[1])

    def keeps_grid_of(self, weight: Weight, options: GgufOptions) -> bool:
        return isinstance(weight.options, GgufOptions) and weight.options.type == options.type

    def stores(self, weight: Weight, options: GgufOptions) -> bool:
        return weight.options == options

    def pack(self, codes_OI: Tensor, grid: Grid, options: GgufOptions) -> Tensor:
        shifted_OI = codes_OI + options.shift if options.shift else codes_OI
        return in_file_order(options.blocks.pack(shifted_OI, grid), options.order)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return True

    def describe_options(self, options: GgufOptions) -> str:
        return options.type

    def check_range(self, stored_OI: Tensor, merged_OI: Tensor, name: str) -> None:
        if bool(stored_OI.isinf().any()):
            largest = float(merged_OI.abs().max())
            raise NumbersError(
                f"{name} reaches {largest:.6g}, which float16 cannot hold. Use --target gguf_bf16 or q8_0."
            )


def in_file_order(rows_OB: Tensor, order: tuple[int, ...]) -> Tensor:
    """Whole runs of the model's rows, in the order of the file."""
    if not order:
        return rows_OB
    return rows_OB.view(-1, len(order), rows_OB.shape[1])[:, list(order)].reshape(rows_OB.shape)


def in_model_order(rows_OB: Tensor, order: tuple[int, ...]) -> Tensor:
    """The reverse of ``in_file_order``."""
    return in_file_order(rows_OB, tuple(sorted(range(len(order)), key=order.__getitem__)))


FORMAT = Gguf("gguf")


@cache
def mix(name: str) -> Gguf:
    """The target of that name."""
    return Gguf(name)
