"""How GGUF's blocks pack the bits of codes and scales. The layouts are those of gguf-py's ``quants.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# uint8 [O, N, S], the scale bytes of N blocks → float32 [O, N, groups]: scales, and minima or None.
ScaleReader = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Plane:
    """Some bits of every code of a block, several to a byte.

    Attributes:
        bits: of every code: 1, 2, 4 or 8.
        width: the lowest bits of this many bytes belong to as many neighbouring values, the next bits to the next values.
        shift: position of the bits in the code.
    """

    bits: int
    width: int
    shift: int = 0

    def unpack(self, bytes_ONB: Tensor) -> Tensor:
        """uint8 [O, N, values] of the plane's bytes; the bits are at their position in the code."""
        shape = (*bytes_ONB.shape[:-1], -1)
        if self.bits == 8:
            return bytes_ONB
        steps = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=bytes_ONB.device)
        fields = bytes_ONB.reshape(*shape, 1, self.width) >> steps[:, None]
        fields &= 2**self.bits - 1
        return (fields << self.shift).view(shape)

    def pack(self, codes_ONV: Tensor) -> Tensor:
        """The reverse of ``unpack``; other bits of the codes are ignored."""
        shape = (*codes_ONV.shape[:-1], -1)
        if self.bits == 8:
            return codes_ONV
        per_byte = 8 // self.bits
        fields = ((codes_ONV >> self.shift) & (2**self.bits - 1)).view(*shape, per_byte, self.width)
        packed: Tensor = fields[..., 0, :].clone()
        for position in range(1, per_byte):
            packed |= fields[..., position, :] << (position * self.bits)
        return packed.view(shape)


def half(bytes_ONS: Tensor, start: int) -> Tensor:
    """float32 [O, N, 1]: the float16 number that begins at this byte of every block."""
    return bytes_ONS[..., start : start + 2].contiguous().view(torch.float16).float()


def one_scale(bytes_ONS: Tensor) -> tuple[Tensor, None]:
    """A float16 scale."""
    return half(bytes_ONS, 0), None


def scale_and_offset(bytes_ONS: Tensor) -> tuple[Tensor, Tensor]:
    """A float16 scale and the float16 value of code 0, which is −minimum."""
    return half(bytes_ONS, 0), -half(bytes_ONS, 2)


def q2_k_scales(bytes_ONS: Tensor) -> tuple[Tensor, Tensor]:
    """16 bytes with 4 bits of a scale and 4 of a minimum each; float16 factors of both."""
    both_ONg = bytes_ONS[..., :16]
    return half(bytes_ONS, 16) * (both_ONg & 15).float(), half(bytes_ONS, 18) * (both_ONg >> 4).float()


def q3_k_scales(bytes_ONS: Tensor) -> tuple[Tensor, None]:
    """16 scales of 6 bits, 32 means 0: low 4 bits in 8 bytes, high 2 bits in 4 bytes; a float16 factor."""
    low_ONg = Plane(bits=4, width=8).unpack(bytes_ONS[..., :8])
    high_ONg = Plane(bits=2, width=4, shift=4).unpack(bytes_ONS[..., 8:12])
    return half(bytes_ONS, 12) * ((low_ONg | high_ONg).float() - 32), None


def q4_k_scales(bytes_ONS: Tensor) -> tuple[Tensor, Tensor]:
    """Float16 factors of scales and of minima, then 8 of each in 12 bytes, 6 bits each.

    The first four bytes have the first four scales, and above them the high 2 bits of the other four; the next four have the
    same of the minima. The last four have the low 4 bits of the other scales and, above them, of the other minima.
    """
    scale_bytes, minimum_bytes, low_bytes = bytes_ONS[..., 4:].chunk(3, dim=-1)
    other_scales = (low_bytes & 15) | (scale_bytes >> 6 << 4)
    other_minima = (low_bytes >> 4) | (minimum_bytes >> 6 << 4)
    scale_ONg = torch.cat([scale_bytes & 63, other_scales], dim=-1)
    minimum_ONg = torch.cat([minimum_bytes & 63, other_minima], dim=-1)
    return half(bytes_ONS, 0) * scale_ONg.float(), half(bytes_ONS, 2) * minimum_ONg.float()


def q6_k_scales(bytes_ONS: Tensor) -> tuple[Tensor, None]:
    """16 int8 scales, and a float16 factor."""
    return half(bytes_ONS, 16) * bytes_ONS[..., :16].view(torch.int8).float(), None


def iq4_xs_scales(bytes_ONS: Tensor) -> tuple[Tensor, None]:
    """A float16 factor, then 8 scales of 6 bits, 32 means 0: high 2 bits in 2 bytes, low 4 bits in 4 bytes."""
    high_ONg = Plane(bits=2, width=1, shift=4).unpack(bytes_ONS[..., 2:4])
    low_ONg = Plane(bits=4, width=1).unpack(bytes_ONS[..., 4:8])
    return half(bytes_ONS, 0) * ((low_ONg | high_ONg).float() - 32), None
