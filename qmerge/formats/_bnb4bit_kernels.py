"""NF4 and FP4 on the CPU, compiled by numba: bitsandbytes' arithmetic in one pass over memory.

Tensors are flat and contiguous. A test compares every result with that of bitsandbytes, bit by bit. Kernels run in the thread
that calls them, without Python's lock: several steps at once use several cores.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmerge.grids import FAR

SMALLEST_ABSMAX = 1e-38
"""bitsandbytes divides by no less."""

Array = NDArray[Any]


def nearest_codes(values: Tensor, absmax_B: Tensor, edges: tuple[np.float32, ...], block_size: int) -> Tensor:
    """uint8 codes in the order of the levels, as many as there are values.

    Args:
        values: float32.
        absmax_B: float32, one for every block of ``block_size`` values; the last block may be shorter.
        edges: between neighbouring levels, ascending; a value on an edge goes down.
    """
    assert absmax_B.numel() * block_size >= values.numel(), "a block has no absmax"
    codes = torch.empty(values.numel(), dtype=torch.uint8)
    _nearest_codes(values.numpy(), absmax_B.numpy(), edges, block_size, codes.numpy())
    return codes


def decoded(codes: Tensor, absmax_B: Tensor, levels_L: Tensor, block_size: int) -> Tensor:
    """float32: the level of every code times the absmax of its block."""
    assert absmax_B.numel() * block_size >= codes.numel(), "a block has no absmax"
    values = torch.empty(codes.numel(), dtype=torch.float32)
    _decode(codes.numpy(), absmax_B.numpy(), levels_L.numpy(), block_size, values.numpy())
    return values


def packed_nibbles(codes: Tensor) -> Tensor:
    """An even number of uint8 codes → bytes, the first code in the high nibble."""
    packed = torch.empty(codes.numel() // 2, dtype=torch.uint8)
    _pack(codes.numpy(), packed.numpy())
    return packed


def unpacked_nibbles(packed: Tensor) -> Tensor:
    """The reverse of ``packed_nibbles``."""
    codes = torch.empty(packed.numel() * 2, dtype=torch.uint8)
    _unpack(packed.numpy(), codes.numpy())
    return codes


def expected_slope(
    values_OI: Tensor, absmax_B: Tensor, levels_L: Tensor, block_size: int, sigma_O1: Tensor
) -> Tensor:  # fmt: skip
    """``Grid.expected_slope``, in one pass."""
    slope_OI = torch.empty(values_OI.shape, dtype=torch.float32)
    arrays = [tensor.contiguous().numpy() for tensor in (values_OI, absmax_B, levels_L, sigma_O1.flatten(), slope_OI)]
    _slope(block_size, *arrays)
    return slope_OI


@numba.njit(nogil=True, cache=True)
def _edges_below(value: np.float32, edges: tuple[np.float32, ...]) -> np.int32:
    count = np.int32(0)
    for edge in edges:
        count += np.int32(value > edge)
    return count


# numpy's error model: without it, a check for division by zero would keep numba from vector instructions.
@numba.njit(nogil=True, cache=True, error_model="numpy")
def _nearest_codes(values: Array, absmax: Array, edges: tuple[np.float32, ...], size: int, codes: Array) -> None:
    for block in range(len(absmax)):
        divisor = absmax[block]
        if abs(divisor) < np.float32(SMALLEST_ABSMAX):
            divisor = np.float32(SMALLEST_ABSMAX)
        value = values[block * size : (block + 1) * size]
        code = codes[block * size : (block + 1) * size]
        if len(value) == size:
            inverse = np.float32(1) / divisor
            for i in range(len(value)):
                code[i] = _edges_below(value[i] * inverse, edges)
        else:  # bitsandbytes divides in a short last block
            for i in range(len(value)):
                code[i] = _edges_below(value[i] / divisor, edges)


@numba.njit(nogil=True, cache=True)
def _decode(codes: Array, absmax: Array, levels: Array, size: int, values: Array) -> None:
    for block in range(len(absmax)):
        scale = absmax[block]
        code = codes[block * size : (block + 1) * size]
        value = values[block * size : (block + 1) * size]
        for i in range(len(value)):
            value[i] = levels[code[i]] * scale


@numba.njit(nogil=True, cache=True)
def _pack(codes: Array, packed: Array) -> None:
    for i in range(len(packed)):
        packed[i] = (codes[2 * i] << 4) | codes[2 * i + 1]


@numba.njit(nogil=True, cache=True)
def _unpack(packed: Array, codes: Array) -> None:
    for i in range(len(packed)):
        codes[2 * i] = packed[i] >> 4
        codes[2 * i + 1] = packed[i] & 15


@numba.njit(nogil=True, cache=True)
def _slope(size: int, values: Array, absmax: Array, levels: Array, sigmas: Array, slopes: Array) -> None:
    columns = values.shape[1]
    for row in range(len(values)):
        inverse = np.float32(1) / sigmas[row]
        for i in range(columns):
            scale = absmax[(row * columns + i) // size]
            total = np.float32(0)
            for below in range(len(levels) - 1):
                low, high = levels[below] * scale, levels[below + 1] * scale
                distance = ((low + high) / 2 - values[row, i]) * inverse
                if abs(distance) < FAR:
                    gap = abs(high - low) * inverse
                    total += gap * np.float32(np.exp(np.float32(-0.5) * distance * distance))
            slopes[row, i] = total * np.float32(1 / np.sqrt(2 * np.pi))
