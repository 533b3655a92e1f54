"""The grid of bitsandbytes' 4-bit formats, bit for bit (bitsandbytes 0.50, backends/default/ops.py, functional.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qmerge.formats._levels import next_codes
from qmerge.grids import UP, ColumnRounder, Grid, ScaleTable
from qmerge.types import Parts, Rows

# A value inside this part of its cell keeps its code, whatever float32 rounding does to the scaled value: the relative
# error is 2**-22 of absmax, and the narrowest cell of NF4 leaves 4e-5 of absmax beyond this part.
SAFE_PART = 0.999

# From this block size on, bitsandbytes on CPUs with AVX-512 leaves its kernel for torch.compile (backends/cpu/ops.py),
# which takes seconds to compile a gather and a product.
UNUSUAL_BLOCK = 2048

# bitsandbytes divides by no less.
SMALLEST_ABSMAX = 1e-38


@dataclass(frozen=True)
class CodeTable:
    """The 16 levels of NF4 or FP4."""

    levels_L: Tensor
    """float32 [16], ascending."""

    midpoints: Tensor
    """float32 [15], between neighbouring levels; a value on a midpoint belongs to the level below."""

    disk_L: Tensor
    """uint8 [16]: the code on disk of every level."""


@cache
def code_table(quant_type: str, device: torch.device) -> CodeTable:
    """The levels of ``nf4`` or ``fp4``."""
    values = bnb.get_4bit_type(quant_type, device=torch.device("cpu"))
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
        if near_OI is None:
            scaled = scale_blocks(values_OI, self.rounding_absmax_B, self.block_size)
            return self._encode(scaled).view(values_OI.shape)
        if self.quant_type == "nf4":
            return self._nearest_of_moved(values_OI, near_OI)
        # FP4 has two codes for zero: keep the one that the base has.
        codes_OI = self.nearest(values_OI)
        return torch.where(self.decode(codes_OI) == self.decode(near_OI), near_OI, codes_OI)

    def _nearest_of_moved(self, values_OI: Tensor, near_OI: Tensor) -> Tensor:
        """The same codes as ``nearest``, looked up only for entries that left their cell: a typical delta moves 1 %."""
        offset_OI = values_OI - self.decode(near_OI)
        moved_OI = offset_OI.abs().mul_(2 / SAFE_PART) > self.gap(near_OI, offset_OI)
        index_N = moved_OI.flatten().nonzero().squeeze(1)
        values_N = values_OI.flatten()[index_N]
        block_N = index_N // self.block_size
        absmax_N = without_zeros(self.rounding_absmax_B[block_N])
        # As in scale_blocks: multiplied in whole blocks, divided in a short last one.
        in_short_block = block_N >= values_OI.numel() // self.block_size
        scaled_N = torch.where(in_short_block, values_N / absmax_N, values_N * (1.0 / absmax_N)).clamp_(-1, 1)
        codes_OI = near_OI.clone()
        codes_OI.view(-1)[index_N] = self._encode(scaled_N)
        return codes_OI

    def _encode(self, scaled: Tensor) -> Tensor:
        """Scaled values in [−1, 1] → codes. A value on a midpoint goes down, as in bitsandbytes."""
        return torch.bucketize(scaled, self._table.midpoints, out_int32=True).to(torch.uint8)

    def decode(self, codes_OI: Tensor) -> Tensor:
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
    return torch.where(absmax.abs() < SMALLEST_ABSMAX, torch.full_like(absmax, SMALLEST_ABSMAX), absmax)


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
    return (flat[::2] << 4) | flat[1::2]


def unpack_nibbles(packed: Tensor, numel: int) -> Tensor:
    """The reverse of ``pack_nibbles``: uint8 [numel]."""
    codes = torch.empty(packed.numel() * 2, dtype=torch.uint8, device=packed.device)
    codes[::2] = packed >> 4
    codes[1::2] = packed & 15
    return codes[:numel]


def unpack_values(
    packed: Tensor, absmax_B: Tensor, *, block_size: int, quant_type: str, shape: tuple[int, ...]
) -> Tensor:
    """Bytes → float32 values of this shape, by bitsandbytes' own kernel.

    The kernel is given one flat row of even length. Rows of odd length, and rows that are not a multiple of the block size,
    would take slower or less tested paths; the blocks are the same.
    """
    numel = math.prod(shape)
    if block_size >= UNUSUAL_BLOCK and packed.device.type == "cpu":
        table = code_table(quant_type, packed.device)
        values_D = torch.empty_like(table.levels_L).index_copy_(0, table.disk_L.long(), table.levels_L)
        scale = absmax_B.repeat_interleave(block_size)[:numel]
        return (values_D[unpack_nibbles(packed, numel).long()] * scale).view(shape)
    values = torch.ops.bitsandbytes.dequantize_4bit(
        packed,
        absmax=absmax_B,
        blocksize=block_size,
        quant_type=quant_type,
        shape=(1, packed.numel() * 2),
        dtype=torch.float32,
    )
    result: Tensor = values.view(-1)[:numel].view(shape)
    return result
