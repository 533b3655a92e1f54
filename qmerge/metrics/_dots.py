"""The scalar products of base, delta, actual change and rounding error over some rows of a weight, in one pass over memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qmerge.types import dot

Array = NDArray[Any]


class Dots(NamedTuple):
    """Scalar products, summed in float32 within a row and in float64 across rows, so that row blocks make no difference."""

    base_base: float
    delta_delta: float
    change_delta: float
    change_change: float
    error_error: float


def dots_of(base_OI: Tensor, merged_OI: Tensor, stored_OI: Tensor) -> Dots:
    """For float32 values before the merge, after it, and after rounding."""
    if base_OI.device.type == "cpu":
        arrays = [tensor.contiguous().numpy() for tensor in (base_OI, merged_OI, stored_OI)]
        return Dots(*_dots(*arrays).tolist())
    delta_OI, change_OI, error_OI = merged_OI - base_OI, stored_OI - base_OI, stored_OI - merged_OI
    return Dots(
        base_base=dot(base_OI, base_OI),
        delta_delta=dot(delta_OI, delta_OI),
        change_delta=dot(change_OI, delta_OI),
        change_change=dot(change_OI, change_OI),
        error_error=dot(error_OI, error_OI),
    )


# "reassoc" lets numba add in several lanes, as torch does.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc"})
def _dots(base: Array, merged: Array, stored: Array) -> Array:
    totals = np.zeros(5, np.float64)
    for row in range(len(base)):
        base_row, merged_row, stored_row = base[row], merged[row], stored[row]
        base_base = delta_delta = change_delta = change_change = error_error = np.float32(0)
        for i in range(len(base_row)):
            delta = merged_row[i] - base_row[i]
            change = stored_row[i] - base_row[i]
            error = stored_row[i] - merged_row[i]
            base_base += base_row[i] * base_row[i]
            delta_delta += delta * delta
            change_delta += change * delta
            change_change += change * change
            error_error += error * error
        totals[0] += base_base
        totals[1] += delta_delta
        totals[2] += change_delta
        totals[3] += change_change
        totals[4] += error_error
    return totals
