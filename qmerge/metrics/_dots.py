"""What a merge does to some rows of a weight: change, scalar products and number of other codes, in one pass over memory each."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmerge.types import dot

Array = NDArray[Any]

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes per entry → the signed integers of this size."""


class Dots(NamedTuple):
    """Scalar products, summed in float32 within a row and in float64 across rows, so that row blocks make no difference."""

    base_base: float
    delta_delta: float
    change_delta: float
    change_change: float
    error_error: float


class Changes(NamedTuple):
    """What a merge does to some rows: ``change_OI``, stored − base, float32, and scalar products."""

    change_OI: Tensor
    dots: Dots


def changes_of(base_OI: Tensor, merged_OI: Tensor, stored_OI: Tensor) -> Changes:
    """For float32 values before the merge, after it, and after rounding."""
    if base_OI.device.type == "cpu":
        change_OI = torch.empty(base_OI.shape, dtype=torch.float32)
        arrays = [tensor.contiguous().numpy() for tensor in (base_OI, merged_OI, stored_OI, change_OI)]
        return Changes(change_OI, Dots(*_changes(*arrays).tolist()))
    delta_OI, change_OI, error_OI = merged_OI - base_OI, stored_OI - base_OI, stored_OI - merged_OI
    dots = Dots(
        base_base=dot(base_OI, base_OI),
        delta_delta=dot(delta_OI, delta_OI),
        change_delta=dot(change_OI, delta_OI),
        change_change=dot(change_OI, change_OI),
        error_error=dot(error_OI, error_OI),
    )
    return Changes(change_OI, dots)


def count_different(codes: Tensor, others: Tensor) -> int:
    """Entries in which two tensors of codes differ; 0 and −0 do not."""
    if codes.device.type != "cpu":
        return int(torch.count_nonzero(codes != others))
    integer = INTEGERS[codes.element_size()]
    # All bits of an integer, all but the sign of a float: where these are 0 in both, so are the numbers.
    magnitude = torch.iinfo(integer).max if codes.is_floating_point() else -1
    arrays = [tensor.contiguous().view(integer).flatten().numpy() for tensor in (codes, others)]
    arrays.append(np.array(magnitude, arrays[0].dtype))
    return int(_count_different(*arrays))


# "reassoc" lets numba add in several lanes, as torch does.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc"})
def _changes(base: Array, merged: Array, stored: Array, changes: Array) -> Array:
    totals = np.zeros(5, np.float64)
    for row in range(len(base)):
        base_row, merged_row, stored_row, change_row = base[row], merged[row], stored[row], changes[row]
        base_base = delta_delta = change_delta = change_change = error_error = np.float32(0)
        for i in range(len(base_row)):
            delta = merged_row[i] - base_row[i]
            change = stored_row[i] - base_row[i]
            error = stored_row[i] - merged_row[i]
            change_row[i] = change
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


@numba.njit(nogil=True, cache=True)
def _count_different(codes: Array, others: Array, magnitude: Array) -> int:
    total = 0
    magnitude_bits = magnitude[()]
    # Counts that fit into a byte: as many lanes as codes have.
    for start in range(0, len(codes), 128):
        some, some_others = codes[start : start + 128], others[start : start + 128]
        count: Any = np.uint8(0)
        for i in range(len(some)):
            differ = (some[i] != some_others[i]) & (((some[i] | some_others[i]) & magnitude_bits) != 0)
            count = np.uint8(count + np.uint8(differ))
        total += count
    return total
