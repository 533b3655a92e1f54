"""GGUF's block types: how a row is stored as blocks of codes and scales.

A block holds 32 or 256 neighbouring values of a row: scale bytes, then planes of codes, then scale bytes again (either may be
missing). A plane holds some bits of every code. Values are bit-identical to those of gguf-py.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import RecipeError
from qmerge.formats._dense import FloatGrid
from qmerge.formats._gguf_grid import BlockGrid, BlockLevelsGrid
from qmerge.formats._gguf_planes import (
    Plane,
    ScaleReader,
    iq4_xs_scales,
    one_scale,
    q2_k_scales,
    q3_k_scales,
    q4_k_scales,
    q6_k_scales,
    scale_and_offset,
)
from qmerge.formats._levels import Levels, levels_of
from qmerge.grids import Grid

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ4_LEVELS = levels_of(IQ4)

LEAST_WEIGHT = 1e-4
"""Weight of an input that calibration never saw, relative to the mean weight. (Without one, the scale of a group of such inputs
would be 0, and all of its weights would be lost.)"""


class BlockType(ABC):
    """A way to store rows of a weight in a GGUF file.

    Shapes: O rows, I columns, S bytes of scales a row, B bytes a row.

    Attributes:
        name: as in ``gguf.GGMLQuantizationType``.
        block: values in a block; a row must be a whole number of blocks.
    """

    name: str
    block: int

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of a block."""

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file for every value, scales included."""
        return self.block_bytes * 8 / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of this many values."""
        return columns // self.block * self.block_bytes

    @abstractmethod
    def codes(self, stored_OB: Tensor) -> Tensor:
        """Codes [O, I] of stored rows (uint8), as ``grid`` takes them."""

    @abstractmethod
    def scales(self, stored_OB: Tensor) -> Tensor:
        """uint8 [O, S]: all bytes of stored rows that are not codes, in the order of the file."""

    @abstractmethod
    def fresh_scales(self, values_OI: Tensor, inputs_I: Tensor | None = None) -> Tensor:
        """uint8 [O, S]: scales that suit these values.

        Args:
            values_OI: float32.
            inputs_I: float32, mean square of every input of the layer, which weights the errors; None: all count alike.

        Raises:
            RecipeError: the libgguf package is missing.
        """

    @abstractmethod
    def grid(self, scales_OS: Tensor, columns: int) -> Grid:
        """The grid of rows with these scales. Its values are bit-identical to gguf-py's in float32."""

    @abstractmethod
    def pack(self, codes_OI: Tensor, grid: Grid) -> Tensor:
        """uint8 [O, B]: stored rows of these codes, with the scales of ``grid``, which is one of this type."""


@dataclass(frozen=True)
class DenseType(BlockType):
    """Plain float numbers. Codes are the numbers themselves."""

    name: str
    dtype: torch.dtype

    block = 1

    @property
    def block_bytes(self) -> int:
        return self.dtype.itemsize

    def codes(self, stored_OB: Tensor) -> Tensor:
        return stored_OB.contiguous().view(self.dtype)

    def scales(self, stored_OB: Tensor) -> Tensor:
        return stored_OB[:, :0]

    def fresh_scales(self, values_OI: Tensor, inputs_I: Tensor | None = None) -> Tensor:
        return values_OI.new_empty((len(values_OI), 0), dtype=torch.uint8)

    def grid(self, scales_OS: Tensor, columns: int) -> Grid:
        return FloatGrid(self.dtype)

    def pack(self, codes_OI: Tensor, grid: Grid) -> Tensor:
        return codes_OI.contiguous().view(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class PackedType(BlockType):
    """Blocks of codes with scales.

    Attributes:
        block: values in a block.
        head: bytes of scales before the codes.
        planes: of the codes, in the order of the file.
        tail: bytes of scales after the codes.
        read_scales: decodes the bytes of scales.
        group_size: values that share a scale.
        levels: int, the code that means 0 (apart from a minimum), if levels are integers; otherwise their table.
        flipped: bits of every code that are inverted in the file.
    """

    name: str
    block: int
    head: int
    planes: tuple[Plane, ...]
    tail: int = 0
    read_scales: ScaleReader
    group_size: int
    levels: int | Levels = 0
    flipped: int = 0

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return sum(plane.bits for plane in self.planes)

    @property
    def block_bytes(self) -> int:
        return self.head + self.block * self.code_bits // 8 + self.tail

    def codes(self, stored_OB: Tensor) -> Tensor:
        _, planes, _ = self._split(stored_OB)
        first, *others = self.planes
        codes_ONV = first.unpack(planes[0])
        for plane, bytes_ONB in zip(others, planes[1:], strict=True):
            codes_ONV |= plane.unpack(bytes_ONB)
        return (codes_ONV ^ self.flipped).view(len(stored_OB), -1)

    def scales(self, stored_OB: Tensor) -> Tensor:
        head_ONB, _, tail_ONB = self._split(stored_OB)
        return torch.cat([head_ONB, tail_ONB], dim=-1).view(len(stored_OB), -1)

    def fresh_scales(self, values_OI: Tensor, inputs_I: Tensor | None = None) -> Tensor:
        libgguf = libgguf_package()
        weights = None
        if inputs_I is not None and bool(inputs_I.any()):
            weights = inputs_I.clamp(min=LEAST_WEIGHT * float(inputs_I.mean())).cpu().numpy()
        qtype = libgguf.GGMLQuantizationType[self.name]
        stored_OB = libgguf.quantize_rows(values_OI.cpu().numpy(), qtype, weights)
        return self.scales(torch.from_numpy(stored_OB)).to(values_OI.device)

    def grid(self, scales_OS: Tensor, columns: int) -> BlockGrid | BlockLevelsGrid:
        rows, blocks = len(scales_OS), columns // self.block
        scale_ONg, minimum_ONg = self.read_scales(scales_OS.view(rows, blocks, self.head + self.tail))
        scale_OG = scale_ONg.reshape(rows, -1)
        minimum_OG = None
        if minimum_ONg is not None:
            minimum_OG = minimum_ONg.reshape(rows, -1)
        if isinstance(self.levels, Levels):
            return BlockLevelsGrid(self.levels, scale_OG, self.group_size, scales_OS)
        return BlockGrid(
            scale_OG,
            minimum_OG,
            group_size=self.group_size,
            offset=self.levels,
            levels_count=2**self.code_bits,
            scales_OS=scales_OS,
        )

    def pack(self, codes_OI: Tensor, grid: Grid) -> Tensor:
        assert isinstance(grid, BlockGrid | BlockLevelsGrid), "a grid of another format"
        rows, columns = codes_OI.shape
        codes_ONV = (codes_OI ^ self.flipped).reshape(rows, columns // self.block, self.block)
        scales_ONS = grid.scales_OS.view(rows, columns // self.block, self.head + self.tail)
        planes = [plane.pack(codes_ONV) for plane in self.planes]
        parts = [scales_ONS[..., : self.head], *planes, scales_ONS[..., self.head :]]
        return torch.cat(parts, dim=-1).view(rows, -1)

    def _split(self, stored_OB: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The parts of the blocks, [O, N, bytes] each: scales before the codes, planes, scales after them."""
        blocks_ONB = stored_OB.reshape(len(stored_OB), -1, self.block_bytes)
        sizes = [self.head, *(self.block * plane.bits // 8 for plane in self.planes), self.tail]
        head_ONB, *planes, tail_ONB = blocks_ONB.split_with_sizes(sizes, dim=-1)
        return head_ONB, planes, tail_ONB


def libgguf_package() -> Any:
    """The ``libgguf`` package, an optional dependency. Its blocks are those of llama.cpp's quantizer, byte for byte.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        return importlib.import_module("libgguf")
    except ImportError as cause:
        raise RecipeError('the libgguf package is missing, install it with: pip install "qmerge[gguf]"') from cause


# --- the types --------------------------------------------------------------------------------------------------------

NIBBLES_16, NIBBLES_32, NIBBLES_64 = Plane(4, 16), Plane(4, 32), Plane(4, 64)

TYPES: tuple[BlockType, ...] = (
    DenseType("F32", torch.float32),
    DenseType("F16", torch.float16),
    DenseType("BF16", torch.bfloat16),
    PackedType(name="Q4_0", block=32, head=2, planes=(NIBBLES_16,), read_scales=one_scale, group_size=32, levels=8),
    PackedType(name="Q4_1", block=32, head=4, planes=(NIBBLES_16,), read_scales=scale_and_offset, group_size=32),
    PackedType(
        name="Q5_0", block=32, head=2, planes=(Plane(1, 1, shift=4), NIBBLES_16), read_scales=one_scale, group_size=32,
        levels=16,
    ),
    PackedType(
        name="Q5_1", block=32, head=4, planes=(Plane(1, 1, shift=4), NIBBLES_16), read_scales=scale_and_offset,
        group_size=32,
    ),
    # Codes are int8 in the file; with the sign bit inverted they ascend from 0.
    PackedType(
        name="Q8_0", block=32, head=2, planes=(Plane(8, 32),), read_scales=one_scale, group_size=32, levels=128,
        flipped=128,
    ),
    PackedType(name="Q2_K", block=256, head=16, planes=(Plane(2, 32),), tail=4, read_scales=q2_k_scales, group_size=16),
    PackedType(
        name="Q3_K", block=256, head=0, planes=(Plane(1, 32, shift=2), Plane(2, 32)), tail=14, read_scales=q3_k_scales,
        group_size=16, levels=4,
    ),
    PackedType(name="Q4_K", block=256, head=16, planes=(NIBBLES_32,), read_scales=q4_k_scales, group_size=32),
    PackedType(
        name="Q5_K", block=256, head=16, planes=(Plane(1, 32, shift=4), NIBBLES_32), read_scales=q4_k_scales,
        group_size=32,
    ),
    PackedType(
        name="Q6_K", block=256, head=0, planes=(NIBBLES_64, Plane(2, 32, shift=4)), tail=18, read_scales=q6_k_scales,
        group_size=16, levels=32,
    ),
    PackedType(
        name="IQ4_NL", block=32, head=2, planes=(NIBBLES_16,), read_scales=one_scale, group_size=32, levels=IQ4_LEVELS
    ),
    PackedType(
        name="IQ4_XS", block=256, head=8, planes=(NIBBLES_16,), read_scales=iq4_xs_scales, group_size=32,
        levels=IQ4_LEVELS,
    ),
)  # fmt: skip

BLOCK_TYPES = {block_type.name: block_type for block_type in TYPES}
"""Every type, by its name in ``gguf.GGMLQuantizationType``."""
