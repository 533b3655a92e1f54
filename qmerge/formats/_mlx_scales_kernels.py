"""The sums of ``fit_mlx`` on the CPU, compiled by numba: one pass over the values for each scale and bias that are tried.

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
    values_OGN: Tensor, weights_GN: Tensor, scale_OG: Tensor, bias_OG: Tensor, *, last_code: int
) -> Tensor:  # fmt: skip
    """float64 [O, G]: weighted squared error of the nearest codes. All tensors are float32 and contiguous."""
    error_OG = torch.empty(scale_OG.shape, dtype=torch.float64)
    arrays = [tensor.numpy() for tensor in (values_OGN, weights_GN, scale_OG, bias_OG, error_OG)]
    _squared_error(np.float32(last_code), *arrays)
    return error_OG


def regression(
    values_OGN: Tensor, weights_GN: Tensor, scale_OG: Tensor, bias_OG: Tensor, *, last_code: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """float32 [O, G] each, for the codes of these scales and biases: the slope of values over codes by least squares, the mean
    code, and the mean value. Where all codes are the same, the slope is ``scale_OG``."""
    results = [torch.empty_like(scale_OG) for _ in range(3)]
    arrays = [tensor.numpy() for tensor in (values_OGN, weights_GN, scale_OG, bias_OG, *results)]
    _regression(np.float32(last_code), *arrays)
    slope_OG, code_mean_OG, value_mean_OG = results
    return slope_OG, code_mean_OG, value_mean_OG


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _code(value: np.float32, scale: np.float32, bias: np.float32, last: np.float32) -> np.float32:
    code: np.float32 = np.rint(min(max((value - bias) / scale, np.float32(0)), last))
    return code


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _error(value: np.float32, scale: np.float32, bias: np.float32, last: np.float32) -> np.float32:
    error: np.float32 = _code(value, scale, bias, last) * scale + bias - value
    return error


# reassoc: the terms of a sum may be added in any order, without which numba would not use vector instructions.
@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _squared_error(
    last: np.float32, values: Array, weights: Array, scales: Array, biases: Array, errors: Array
) -> None:
    for row in range(values.shape[0]):
        for group in range(values.shape[1]):
            value, weight = values[row, group], weights[group]
            scale, bias = scales[row, group], biases[row, group]
            total = 0.0
            for i in range(len(value)):
                error = np.float64(_error(value[i], scale, bias, last))
                total += error * error * weight[i]
            errors[row, group] = total


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _regression(
    last: np.float32, values: Array, weights: Array, scales: Array, biases: Array, slopes: Array, code_means: Array,
    value_means: Array,
) -> None:  # fmt: skip
    for row in range(values.shape[0]):
        for group in range(values.shape[1]):
            value, weight = values[row, group], weights[group]
            scale, bias = scales[row, group], biases[row, group]
            total, code_sum, value_sum = 0.0, 0.0, 0.0
            for i in range(len(value)):
                total += weight[i]
                code_sum += np.float64(_code(value[i], scale, bias, last)) * weight[i]
                value_sum += np.float64(value[i]) * weight[i]
            # Inputs that are all 0 have means of 0.
            code_mean = code_sum / total if total > 0 else 0.0
            value_mean = value_sum / total if total > 0 else 0.0
            product, square = 0.0, 0.0
            for i in range(len(value)):
                distance = np.float64(_code(value[i], scale, bias, last)) - code_mean
                product += distance * value[i] * weight[i]
                square += distance * distance * weight[i]
            slopes[row, group] = product / square if square > 0 else scale
            code_means[row, group] = code_mean
            value_means[row, group] = value_mean
