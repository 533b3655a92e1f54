"""Codes and values of an ``AffineGrid`` on the CPU, compiled by numba: one pass over memory, the same bits as torch's."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def nearest_codes(
    values_OI: Tensor, inverse_OG: Tensor, zero_OG: Tensor, group_I: Tensor, *, last_code: int
) -> Tensor:  # fmt: skip
    """uint8 [O, I]: values · inverse + zero, rounded to an integer from 0 to ``last_code``, ties to even."""
    codes_OI = torch.empty(values_OI.shape, dtype=torch.uint8)
    _nearest_codes(np.float32(last_code), *_arrays(values_OI, inverse_OG, zero_OG, group_I, codes_OI))
    return codes_OI


def decoded(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor) -> Tensor:
    """float32 [O, I]: (code − zero) · scale."""
    values_OI = torch.empty(codes_OI.shape, dtype=torch.float32)
    _decode(*_arrays(codes_OI, scale_OG, zero_OG, group_I, values_OI))
    return values_OI


def _arrays(
    per_column_OI: Tensor, first_OG: Tensor, zero_OG: Tensor, group_I: Tensor, result_OI: Tensor
) -> list[Array]:
    rows, columns = per_column_OI.shape
    # Kernels do not check bounds.
    assert len(first_OG) == rows and len(group_I) == columns, "the grid is of another weight"
    zero_OG = zero_OG.expand_as(first_OG)
    return [tensor.contiguous().numpy() for tensor in (per_column_OI, first_OG, zero_OG, group_I, result_OI)]


@numba.njit(nogil=True, cache=True)
def _nearest_codes(
    last: np.float32, values: Array, inverses: Array, zeros: Array, group: Array, codes: Array
) -> None:  # fmt: skip
    for row in range(len(values)):
        value, code, inverse, zero = values[row], codes[row], inverses[row], zeros[row]
        for i in range(len(value)):
            position = value[i] * inverse[group[i]] + zero[group[i]]
            code[i] = np.uint8(min(max(np.rint(position), np.float32(0)), last))


@numba.njit(nogil=True, cache=True)
def _decode(codes: Array, scales: Array, zeros: Array, group: Array, values: Array) -> None:
    for row in range(len(codes)):
        code, value, scale, zero = codes[row], values[row], scales[row], zeros[row]
        for i in range(len(code)):
            value[i] = (np.float32(code[i]) - zero[group[i]]) * scale[group[i]]
