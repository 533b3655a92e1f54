"""Sums over the levels of a 16-bit float grid on the CPU, compiled by numba."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmerge.grids import FAR, FINE_LEVELS

Array = NDArray[Any]


def stepped_codes(codes: Tensor, direction: int) -> Tensor:
    """The next finite numbers up (1) or down (−1), in a 16-bit float dtype; the last one is its own neighbour."""
    stepped = torch.empty(codes.shape, dtype=codes.dtype)
    largest = _largest_bits(codes.dtype)
    _step(_bits(codes.contiguous()), np.int32(direction), np.int32(largest), _bits(stepped))
    return stepped


def expected_slope(values_OI: Tensor, nearest_OI: Tensor, sigma_O1: Tensor) -> Tensor:
    """``Grid.expected_slope`` on the numbers of the dtype of ``nearest_OI``, in one pass."""
    slope_OI = torch.empty(values_OI.shape, dtype=torch.float32)
    levels = ascending_levels(nearest_OI.dtype)
    codes = _bits(nearest_OI.contiguous()).reshape(nearest_OI.shape)
    _slope(values_OI.contiguous().numpy(), codes, sigma_O1.flatten().numpy(), levels.numpy(), slope_OI.numpy())
    return slope_OI


@cache
def ascending_levels(dtype: torch.dtype) -> Tensor:
    """float32: all finite numbers of a 16-bit float dtype, the two zeros as one."""
    positive = torch.arange(1, _largest_bits(dtype) + 1, dtype=torch.int16).view(dtype).float()
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


def _largest_bits(dtype: torch.dtype) -> int:
    """The largest finite number, as the integer that its bits are."""
    return int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16))


def _bits(codes: Tensor) -> Array:
    bits: Array = codes.view(torch.int16).flatten().numpy()
    return bits


@numba.njit(nogil=True, cache=True)
def _ordered(bits: int) -> int:
    """0 for both zeros, 1 for the smallest number above, −1 for the one below, and so on."""
    if bits < 0:
        return -(bits & 0x7FFF)
    return bits


@numba.njit(nogil=True, cache=True)
def _step(codes: Array, direction: np.int32, largest: np.int32, stepped: Array) -> None:
    for i in range(len(codes)):
        number = _ordered(codes[i]) + direction
        if abs(number) > largest:
            stepped[i] = codes[i]
        elif number < 0:
            stepped[i] = -0x8000 - number
        else:
            stepped[i] = number


@numba.njit(nogil=True, cache=True)
def _slope(values: Array, codes: Array, sigmas: Array, levels: Array, slopes: Array) -> None:
    zero = len(levels) // 2
    for row in range(len(values)):
        inverse = np.float32(1) / sigmas[row]
        for i in range(values.shape[1]):
            position = zero + _ordered(codes[row, i])
            slopes[row, i] = _slope_at(values[row, i], position, inverse, levels)


@numba.njit(nogil=True, cache=True)
def _slope_at(value: np.float32, position: int, inverse_sigma: np.float32, levels: Array) -> np.float32:
    last = len(levels) - 1
    total = np.float32(0)
    for direction in (1, -1):
        # As in Grid.expected_slope: where so many levels do not reach FAR sigma, the sum is an integral, which is 1.
        far = min(max(position + direction * FINE_LEVELS, 0), last)
        before = min(max(position + direction * (FINE_LEVELS - 1), 0), last)
        if far != before:
            distance = abs((levels[far] + levels[before]) / 2 - value) * inverse_sigma
            if distance < FAR:
                return np.float32(1)
        here = position
        while 0 <= here + direction <= last:
            threshold = (levels[here] + levels[here + direction]) / 2
            distance = (threshold - value) * inverse_sigma
            if abs(distance) >= FAR:
                break
            gap = abs(levels[here + direction] - levels[here]) * inverse_sigma
            total += gap * np.float32(np.exp(np.float32(-0.5) * distance * distance))
            here += direction
    return total * np.float32(1 / np.sqrt(2 * np.pi))
