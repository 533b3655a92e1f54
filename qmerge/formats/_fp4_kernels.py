"""The sums of ``least_error_scales`` on the CPU, compiled by numba: one pass over the values for each scale that is tried."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

LARGEST = np.float32(6)
"""FP4's largest level."""


def squared_error(values_OGN: Tensor, weights_GN: Tensor, scale_OG: Tensor) -> Tensor:
    """float64 [O, G]: weighted squared error of the nearest levels, summed in float64. All tensors are float32 and contiguous."""
    error_OG = torch.empty(scale_OG.shape, dtype=torch.float64)
    _squared_error(*(tensor.numpy() for tensor in (values_OGN, weights_GN, scale_OG, error_OG)))
    return error_OG


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _error(value: np.float32, scale: np.float32, divisor: np.float32) -> np.float32:
    scaled = min(max(value / divisor, -LARGEST), LARGEST)
    # Levels are 0.5 apart up to 2, 1 apart up to 4, then 2 apart; ties go to the even code, as in rint.
    size = abs(scaled)
    step = np.float32(2)
    if size < 4:
        step = np.float32(1)
    if size < 2:
        step = np.float32(0.5)
    level = np.rint(scaled / step) * step
    error: np.float32 = level * scale - value
    return error


# reassoc: the terms of a sum may be added in any order, without which numba would not use vector instructions.
@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _squared_error(values: Array, weights: Array, scales: Array, errors: Array) -> None:
    for row in range(values.shape[0]):
        for group in range(values.shape[1]):
            value, weight, scale = values[row, group], weights[group], scales[row, group]
            divisor = scale if scale != 0 else np.float32(1)
            total = 0.0
            for i in range(len(value)):
                error = np.float64(_error(value[i], scale, divisor))
                total += error * error * weight[i]
            errors[row, group] = total
