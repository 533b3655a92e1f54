"""The grid of bitsandbytes' 4-bit formats, bit for bit (bitsandbytes 0.50, backends/default/ops.py, functional.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qmerge.grids import UP, ColumnRounder, Grid
from qmerge.types import Parts, Rows

# Inside this part of its cell a value keeps its code whatever float32 rounding does to the scaled value (relative
# error 2**-22 of absmax; the narrowest NF4 cell leaves 4e-5 of absmax beyond this part).
SAFE_PART = 0.999

# On CPUs with AVX-512 bitsandbytes leaves its kernel for torch.compile from this block size on
# (backends/cpu/ops.py): seconds of compiling for a gather and a product.
UNUSUAL_BLOCK = 2048


@cache
def levels(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [16] levels in ascending order, float32 [15] midpoints, and uint8 [16] their codes on disk."""
    table_L = bnb.get_4bit_type(quant_type, device=torch.device("cpu"))
    order_L = torch.argsort(table_L)
    midpoints = (table_L[order_L[:-1]] + table_L[order_L[1:]]) / 2
    return table_L[order_L].to(device), midpoints.to(device), order_L.to(torch.uint8).to(device)


@dataclass(frozen=True)
class Bnb4bitGrid(Grid):
    """Codes are uint8, 0 … 15 in ascending order of their levels.

    columns            I: the blocks run over the flattened weight
    absmax_B           float32, what a loader multiplies with
    rounding_absmax_B  float32, what values are divided by: the exact absmax of a fresh grid, also when double
                       quantization will store it less exactly (as in bitsandbytes); else the same as ``absmax_B``
    scale_parts        the scales as they will lie on disk (a fresh grid's; local names)
    """

    quant_type: str
    block_size: int
    columns: int
    absmax_B: Tensor
    rounding_absmax_B: Tensor
    scale_parts: Parts = field(default_factory=dict)
    offset: float | None = None

    levels_count = 16

    @property
    def row_step(self) -> int:
        return self.block_size // math.gcd(self.block_size, self.columns)

    def as_stored(self) -> Bnb4bitGrid:
        return replace(self, rounding_absmax_B=self.absmax_B)

    @property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return levels(self.quant_type, self.absmax_B.device)

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
            return self._encode(scale_blocks(values_OI, self.rounding_absmax_B, self.block_size)).view(values_OI.shape)
        if self.quant_type != "nf4":  # FP4 has two codes for zero: keep the one that is there
            codes_OI = self.nearest(values_OI)
            return torch.where(self.decode(codes_OI) == self.decode(near_OI), near_OI, codes_OI)
        return self._nearest_of_moved(values_OI, near_OI)

    def _nearest_of_moved(self, values_OI: Tensor, near_OI: Tensor) -> Tensor:
        """Looks up only the entries that left their cell (a typical delta moves 1 %); same codes as ``nearest``."""
        offset_OI = values_OI - self.decode(near_OI)
        moved_OI = offset_OI.abs().mul_(2 / SAFE_PART) > self.gap(near_OI, offset_OI)
        index_N = moved_OI.flatten().nonzero().squeeze(1)
        values_N, block_N = values_OI.flatten()[index_N], index_N // self.block_size
        absmax_N = without_zeros(self.rounding_absmax_B[block_N])
        tail = block_N >= values_OI.numel() // self.block_size
        scaled_N = torch.where(tail, values_N / absmax_N, values_N * (1.0 / absmax_N)).clamp_(-1, 1)
        codes_OI = near_OI.clone()
        codes_OI.view(-1)[index_N] = self._encode(scaled_N)
        return codes_OI

    def _encode(self, scaled: Tensor) -> Tensor:
        """Scaled values in [−1, 1] → codes; a value on a midpoint goes down, as in bitsandbytes."""
        return torch.bucketize(scaled, self._tables[1], out_int32=True).to(torch.uint8)

    def decode(self, codes_OI: Tensor) -> Tensor:
        disk_OI = codes_OI if self.quant_type == "nf4" else self._tables[2][codes_OI.long()]
        return unpack_values(pack_nibbles(disk_OI), self.absmax_B, self.block_size, self.quant_type, codes_OI.shape)

    def column_rounder(self, columns: Tensor, rows: Tensor) -> ColumnRounder:
        absmax = self.absmax_B[(rows[None] * self.columns + columns[:, None]) // self.block_size]
        inverse, (table_L, midpoints, _) = 1.0 / without_zeros(absmax), self._tables

        def nearest(here: int, values_O: Tensor) -> Tensor:
            return table_L[torch.bucketize(values_O * inverse[here], midpoints, out_int32=True)].mul_(absmax[here])

        return nearest

    def step(self, codes_OI: Tensor, direction: int) -> Tensor:
        stepped_OI = self._stepped(codes_OI, direction)
        if not self._has_backwards:
            return stepped_OI
        backwards_OI = (self.absmax_B < 0).repeat_interleave(self.block_size)[: codes_OI.numel()].view(codes_OI.shape)
        return torch.where(backwards_OI, self._stepped(codes_OI, -direction), stepped_OI)

    @cached_property
    def _has_backwards(self) -> bool:
        """Whether an absmax is negative (see ``without_zeros``): there a higher code is a lower value."""
        return bool((self.absmax_B < 0).any())

    def _stepped(self, codes_OI: Tensor, direction: int) -> Tensor:
        if self.quant_type != "nf4":
            return self._neighbours(direction)[codes_OI.long()]
        return (codes_OI + 1).clamp_(max=15) if direction == UP else torch.where(codes_OI == 0, codes_OI, codes_OI - 1)

    def _neighbours(self, direction: int) -> Tensor:
        """uint8 [16]: the next code of another value (FP4's two zeros are one value)."""
        table = self._tables[0].tolist()
        walk = range(16) if direction == UP else range(15, -1, -1)
        following = [next((c for c in walk if (table[c] - table[code]) * direction > 0), code) for code in range(16)]
        return torch.tensor(following, dtype=torch.uint8, device=self.absmax_B.device)


def scale_blocks(values_OI: Tensor, absmax_B: Tensor, block_size: int) -> Tensor:
    """Values / absmax of their block, in [−1, 1], flat; bitsandbytes' own arithmetic: whole blocks are multiplied by
    the reciprocal, a short last block is divided."""
    flat, safe_B = values_OI.flatten(), without_zeros(absmax_B)
    whole = flat.numel() // block_size * block_size
    scaled = (flat[:whole].view(-1, block_size) * (1.0 / safe_B[: whole // block_size])[:, None]).view(-1)
    if whole < flat.numel():
        scaled = torch.cat([scaled, flat[whole:] / safe_B[-1]])
    return scaled.clamp_(-1, 1)


def without_zeros(absmax: Tensor) -> Tensor:
    """absmax to divide by. bitsandbytes lifts zeros to 1e-38; a negative one (double quantization can store a little
    less than zero for a block of zeros) keeps its sign, because the loader multiplies with it."""
    return torch.where(absmax.abs() < 1e-38, torch.full_like(absmax, 1e-38), absmax)


def pack_nibbles(codes: Tensor, padding: int = 0) -> Tensor:
    """uint8 codes → bytes, the first code in the high nibble; an odd one out is followed by ``padding``."""
    flat = codes.flatten()
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_full((1,), padding)])
    return (flat[::2] << 4) | flat[1::2]


def unpack_nibbles(packed: Tensor, numel: int) -> Tensor:
    codes = torch.empty(packed.numel() * 2, dtype=torch.uint8, device=packed.device)
    codes[::2], codes[1::2] = packed >> 4, packed & 15
    return codes[:numel]


def unpack_values(packed: Tensor, absmax_B: Tensor, block_size: int, quant_type: str, shape: tuple[int, ...]) -> Tensor:
    """Bytes → float32 values, by bitsandbytes' own kernel.

    One flat row of even length: rows of odd length, and rows that are no multiple of the block size, would send
    bitsandbytes into slower or less trodden code; the blocks are the same.
    """
    numel = math.prod(shape)
    if block_size >= UNUSUAL_BLOCK and packed.device.type == "cpu":
        ordered_L, _, disk_L = levels(quant_type, packed.device)
        table_L = torch.empty_like(ordered_L).index_copy_(0, disk_L.long(), ordered_L)
        scale = absmax_B.repeat_interleave(block_size)[:numel]
        return (table_L[unpack_nibbles(packed, numel).long()] * scale).view(shape)
    flat = (1, packed.numel() * 2)
    values = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax_B, block_size, quant_type, flat, torch.float32)
    result: Tensor = values.view(-1)[:numel].view(shape)
    return result
