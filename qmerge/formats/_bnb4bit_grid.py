"""The grid of bitsandbytes' 4-bit formats, bit for bit (bitsandbytes 0.50, backends/default/ops.py, functional.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from qmerge.formats import _bnb4bit_kernels as kernels
from qmerge.formats._levels import next_codes
from qmerge.grids import UP, ColumnRounder, Grid, ScaleTable
from qmerge.types import Parts, Rows

# Values by their codes on disk (bitsandbytes 0.50, functional.py, get_4bit_type; its import takes seconds).
QUANT_MAPS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12,
        0.0, -0.0625 / 12, -8 / 12, -1.0, -4 / 12, -6 / 12, -2 / 12, -3 / 12,
    ),
}  # fmt: skip

# Below this absmax, products with levels may be denormal, so that several codes have the same value.
TINY_ABSMAX = 1e-36


@dataclass(frozen=True)
class CodeTable:
    """The 16 levels of NF4 or FP4."""

    levels_L: Tensor
    """float32 [16], ascending."""

    midpoints: Tensor
    """float32 [15], between neighbouring levels; a value on a midpoint belongs to the level below."""

    disk_L: Tensor
    """uint8 [16]: the code on disk of every level."""

    @cached_property
    def edges(self) -> tuple[np.float32, ...]:
        """``midpoints`` as a compiled kernel takes them."""
        return tuple(np.float32(midpoint) for midpoint in self.midpoints.tolist())

    @cached_property
    def zero_code(self) -> int:
        """The code on disk of the value 0."""
        zero = torch.bucketize(torch.zeros(1, device=self.midpoints.device), self.midpoints)
        return int(self.disk_L[zero])


def standard_quant_map(quant_type: str) -> Tensor:
    """float32 [16]: the value of every code on disk, for an absmax of 1."""
    return torch.tensor(QUANT_MAPS[quant_type])


@cache
def code_table(quant_type: str, device: torch.device) -> CodeTable:
    """The levels of ``nf4`` or ``fp4``."""
    values = standard_quant_map(quant_type)
    order_L = torch.argsort(values)
    midpoints = (values[order_L[:-1]] + values[order_L[1:]]) / 2
    return CodeTable(values[order_L].to(device), midpoints.to(device), order_L.to(torch.uint8).to(device))


@dataclass(frozen=True, kw_only=True)
class Bnb4bitGrid(Grid):
    """Codes are uint8, 0 … 15 in ascending order of their levels."""

    quant_type: str
    """``nf4`` or ``fp4``."""

    block_size: int
    """Values that share an absmax."""

    columns: int
    """I: blocks run over the flattened weight, so they may span rows."""

    absmax_B: Tensor
    """float32, the scales that a loader multiplies by."""

    rounding_absmax_B: Tensor
    """float32, the scales that values are divided by. In a fresh grid with double quantization they are more exact than the
    stored ones, as in bitsandbytes; otherwise they are the same."""

    scale_parts: Parts = field(default_factory=dict)
    """Local names → the scales of a fresh grid as they are stored."""

    offset: float | None = None
    """Mean of the absmax, which double quantization takes off before it stores them; None without it."""

    levels_count = 16

    @property
    def row_step(self) -> int:
        return rows_of_whole_blocks(self.block_size, self.columns)

    @property
    def _table(self) -> CodeTable:
        return code_table(self.quant_type, self.absmax_B.device)

    def as_stored(self) -> Bnb4bitGrid:
        return replace(self, rounding_absmax_B=self.absmax_B)

    def rows(self, rows: Rows) -> Bnb4bitGrid:
        start = rows.start * self.columns // self.block_size
        stop = -(-rows.stop * self.columns // self.block_size)
        return replace(
            self,
            absmax_B=self.absmax_B[start:stop],
            rounding_absmax_B=self.rounding_absmax_B[start:stop],
            scale_parts={},
        )

    def nearest(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        codes_OI = self._nearest(values_OI)
        if near_OI is None or not self._codes_share_values:
            return codes_OI
        return torch.where(self.decode(codes_OI) == self.decode(near_OI), near_OI, codes_OI)

    def _nearest(self, values_OI: Tensor) -> Tensor:
        absmax_B = self.rounding_absmax_B
        if values_OI.device.type == "cpu":
            edges = self._table.edges
            codes = kernels.nearest_codes(values_OI.flatten(), absmax_B.contiguous(), edges, self.block_size)
        else:
            scaled = scale_blocks(values_OI, absmax_B, self.block_size)
            # A value on a midpoint goes down, as in bitsandbytes.
            codes = torch.bucketize(scaled, self._table.midpoints, out_int32=True).to(torch.uint8)
        return codes.view(values_OI.shape)

    @cached_property
    def _codes_share_values(self) -> bool:
        """FP4 has two codes for zero, and all codes mean zero where the absmax is zero."""
        return self.quant_type == "fp4" or bool((self.absmax_B.abs() < TINY_ABSMAX).any())

    def decode(self, codes_OI: Tensor) -> Tensor:
        if codes_OI.device.type == "cpu":
            levels_L = self._table.levels_L
            values = kernels.decoded(codes_OI.flatten(), self.absmax_B.contiguous(), levels_L, self.block_size)
            return values.view(codes_OI.shape)
        packed = pack_nibbles(to_disk_codes(codes_OI, self.quant_type))
        return unpack_values(
            packed, self.absmax_B, block_size=self.block_size, quant_type=self.quant_type, shape=codes_OI.shape
        )

    def column_rounder(self, columns: Tensor, rows: Tensor) -> ColumnRounder:
        blocks_IO = (rows[None] * self.columns + columns[:, None]) // self.block_size
        absmax_IO = self.absmax_B[blocks_IO]
        inverse_IO = 1.0 / without_zeros(absmax_IO)
        table = self._table

        def nearest(i: int, values_O: Tensor) -> Tensor:
            codes_O = torch.bucketize(values_O * inverse_IO[i], table.midpoints, out_int32=True)
            return table.levels_L[codes_O].mul_(absmax_IO[i])

        return nearest

    def scale_table(self, columns: int) -> ScaleTable:
        return ScaleTable(
            scale=self.absmax_B.contiguous(),
            inverse=1.0 / without_zeros(self.absmax_B),
            zero=torch.zeros_like(self.absmax_B),
            row_stride=self.columns,
            column_offset_I=torch.arange(columns, device=self.absmax_B.device),
            divisor=self.block_size,
            levels_L=self._table.levels_L,
            edges=self._table.midpoints,
        )

    def expected_slope(self, values_OI: Tensor, sigma_O1: Tensor) -> Tensor:
        if values_OI.device.type != "cpu":
            return super().expected_slope(values_OI, sigma_O1)
        levels_L = self._table.levels_L
        return kernels.expected_slope(values_OI, self.absmax_B, levels_L, self.block_size, sigma_O1)

    def step(self, codes_OI: Tensor, direction: int) -> Tensor:
        stepped_OI = self._step_levels(codes_OI, direction)
        if not self._has_negative_absmax:
            return stepped_OI
        # With a negative absmax the higher level has the lower value.
        is_negative = (self.absmax_B < 0).repeat_interleave(self.block_size)
        is_negative_OI = is_negative[: codes_OI.numel()].view(codes_OI.shape)
        return torch.where(is_negative_OI, self._step_levels(codes_OI, -direction), stepped_OI)

    @cached_property
    def _has_negative_absmax(self) -> bool:
        """Double quantization can make an absmax negative, see ``without_zeros``."""
        return bool((self.absmax_B < 0).any())

    def _step_levels(self, codes_OI: Tensor, direction: int) -> Tensor:
        """The next codes in the order of the levels."""
        if self.quant_type != "nf4":
            return next_codes(self._table.levels_L, direction)[codes_OI.long()]  # two of FP4's levels are zero
        if direction == UP:
            return (codes_OI + 1).clamp_(max=15)
        return torch.where(codes_OI == 0, codes_OI, codes_OI - 1)  # uint8: 0 − 1 would be 255


def rows_of_whole_blocks(block_size: int, columns: int) -> int:
    """The smallest number of rows that is made of whole blocks of the flattened weight."""
    return block_size // math.gcd(block_size, columns)


def scale_blocks(values_OI: Tensor, absmax_B: Tensor, block_size: int) -> Tensor:
    """Values / absmax of their block, in [−1, 1], flat.

    The arithmetic is bitsandbytes': whole blocks are multiplied by the reciprocal, a short last block is divided.
    """
    flat = values_OI.flatten()
    safe_B = without_zeros(absmax_B)
    whole_blocks = flat.numel() // block_size
    whole = whole_blocks * block_size
    scaled = (flat[:whole].view(-1, block_size) * (1.0 / safe_B[:whole_blocks])[:, None]).view(-1)
    if whole < flat.numel():
        scaled = torch.cat([scaled, flat[whole:] / safe_B[-1]])
    return scaled.clamp_(-1, 1)


def without_zeros(absmax: Tensor) -> Tensor:
    """absmax to divide by: bitsandbytes lifts zeros to 1e-38.

    A negative absmax keeps its sign, because the loader multiplies by it. (Double quantization can store a little less than
    zero for a block of zeros.)
    """
    return torch.where(absmax.abs() < kernels.SMALLEST_ABSMAX, torch.full_like(absmax, kernels.SMALLEST_ABSMAX), absmax)


def to_disk_codes(codes: Tensor, quant_type: str) -> Tensor:
    """Codes in the order of the levels → codes on disk. For NF4 they are the same."""
    if quant_type == "nf4":
        return codes
    return code_table(quant_type, codes.device).disk_L[codes.long()]


def from_disk_codes(disk_codes: Tensor, quant_type: str) -> Tensor:
    """The reverse of ``to_disk_codes``."""
    if quant_type == "nf4":
        return disk_codes
    level_of_code = torch.argsort(code_table(quant_type, disk_codes.device).disk_L).to(torch.uint8)
    return level_of_code[disk_codes.long()]


def pack_nibbles(codes: Tensor, padding: int = 0) -> Tensor:
    """uint8 codes → bytes, flat, the first code in the high nibble.

    Args:
        padding: code that follows an odd number of them.
    """
    flat = codes.flatten()
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_full((1,), padding)])
    if flat.device.type == "cpu":
        return kernels.packed_nibbles(flat)
    return (flat[::2] << 4) | flat[1::2]


def unpack_nibbles(packed: Tensor, numel: int) -> Tensor:
    """The reverse of ``pack_nibbles``: uint8 [numel]."""
    if packed.device.type == "cpu":
        return kernels.unpacked_nibbles(packed)[:numel]
    codes = torch.empty(packed.numel() * 2, dtype=torch.uint8, device=packed.device)
    codes[::2] = packed >> 4
    codes[1::2] = packed & 15
    return codes[:numel]


def unpack_values(
    packed: Tensor, absmax_B: Tensor, *, block_size: int, quant_type: str, shape: tuple[int, ...]
) -> Tensor:
    """Bytes on a GPU → float32 values of this shape, by bitsandbytes' own kernel.

    The kernel is given one flat row of even length. Rows of odd length, and rows that are not a multiple of the block size,
    would take slower or less tested paths; the blocks are the same.
    """
    import bitsandbytes  # noqa: F401  (defines the operation)

    values = torch.ops.bitsandbytes.dequantize_4bit(
        packed,
        absmax=absmax_B,
        blocksize=block_size,
        quant_type=quant_type,
        shape=(1, packed.numel() * 2),
        dtype=torch.float32,
    )
    result: Tensor = values.view(-1)[: math.prod(shape)].view(shape)
    return result
