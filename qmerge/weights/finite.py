"""Values that no weight should have: NaN, infinity, and numbers whose squares are past float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qmerge.errors import NumbersError
from qmerge.types import TORCH_DTYPES, TensorInfo

PARAMETERS = ("weight", "bias")
"""Names in modules of what was trained. Other tensors (masks) may hold infinity."""

FLOATS = ("F64", "F32", "F16", "BF16")

LARGEST_VALUE = 1e18
"""Largest value of a merged weight: a sum of squares of larger ones may be past float32."""


def check_merged(values: Tensor, name: str) -> None:
    """Raise NumbersError for NaN, infinity, and values past ``LARGEST_VALUE`` in a weight that has been merged."""
    low, high = _extremes(values)
    if not math.isfinite(low) or not math.isfinite(high):
        raise NumbersError(
            f"{name}: the base or the merged weight contains NaN or infinity, which no target stores; check that the "
            f"base and the adapter are finite"
        )
    largest = max(-low, high)
    if largest > LARGEST_VALUE:
        raise NumbersError(
            f"{name} reaches {largest:.3g}, which no trained weight does: its square is past float32. Check the base and the "
            f"adapter's alpha"
        )


def check_copied(data: bytearray, info: TensorInfo) -> None:
    """Raise NumbersError for NaN and infinity in bytes of a tensor that is copied: every output of the model would be."""
    if info.dtype not in FLOATS:
        return
    low, high = _extremes(torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]))
    if not math.isfinite(low) or not math.isfinite(high):
        raise NumbersError(
            f"{info.name}: the base contains NaN or infinity, so the model would put out nothing else: the file is "
            f"damaged; download it again"
        )


def _extremes(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest value. They show NaN and infinity, several times faster than a test of every value."""
    if not values.numel():
        return 0.0, 0.0
    low, high = values.aminmax()
    return float(low), float(high)
