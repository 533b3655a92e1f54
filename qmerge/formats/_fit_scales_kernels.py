"""The sums of ``fit_scales`` on the CPU, compiled by numba: one pass over the values for each scale that is tried.

Codes are those of torch's float32 arithmetic. Sums are float64, so that their order decides nothing.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def squared_error(
    values_OGN: Tensor, weights_GN: Tensor, scale_OG: Tensor, zero_OG: Tensor, *, last_code: int
) -> Tensor:  # fmt: skip
    """float64 [O, G]: weighted squared error of the nearest codes. All tensors are float32 and contiguous."""
    error_OG = torch.empty(scale_OG.shape, dtype=torch.float64)
    arrays = [tensor.numpy() for tensor in (values_OGN, weights_GN, scale_OG, zero_OG, error_OG)]
    _squared_error(np.float32(last_code), *arrays)
    return error_OG


def refitted_scale(
    values_OGN: Tensor, weights_GN: Tensor, scale_OG: Tensor, zero_OG: Tensor, *, last_code: int
) -> Tensor:  # fmt: skip
    """float32 [O, G]: the scale with the least weighted squared error for the codes of ``scale_OG``."""
    refitted_OG = torch.empty_like(scale_OG)
    arrays = [tensor.numpy() for tensor in (values_OGN, weights_GN, scale_OG, zero_OG, refitted_OG)]
    _refit(np.float32(last_code), *arrays)
    return refitted_OG


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _step(value: np.float32, scale: np.float32, zero: np.float32, last: np.float32) -> np.float32:
    """code − zero, for the nearest code."""
    step: np.float32 = np.rint(min(max(value / scale + zero, np.float32(0)), last)) - zero
    return step


# reassoc: the terms of a sum may be added in any order, without which numba would not use vector instructions.
@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _squared_error(last: np.float32, values: Array, weights: Array, scales: Array, zeros: Array, errors: Array) -> None:
    for row in range(values.shape[0]):
        for group in range(values.shape[1]):
            value, weight = values[row, group], weights[group]
            scale, zero = scales[row, group], zeros[row, group]
            total = 0.0
            for i in range(len(value)):
                error = np.float64(_step(value[i], scale, zero, last) * scale - value[i])
                total += error * error * weight[i]
            errors[row, group] = total


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _refit(last: np.float32, values: Array, weights: Array, scales: Array, zeros: Array, refitted: Array) -> None:
    for row in range(values.shape[0]):
        for group in range(values.shape[1]):
            value, weight = values[row, group], weights[group]
            scale, zero = scales[row, group], zeros[row, group]
            product, square = 0.0, 0.0
            for i in range(len(value)):
                step = np.float64(_step(value[i], scale, zero, last))
                product += step * value[i] * weight[i]
                square += step * step * weight[i]
            refitted[row, group] = product / square if square > 0 else scale
