"""What a rounding may know besides the values and the grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qmerge.rounding._metric import Metric
from qmerge.types import Rows


@dataclass(frozen=True)
class Context:
    """``near_OI``: the base's own codes when the grid is kept. ``name`` and ``rows`` say which part of which weight
    this is, so that random numbers depend on neither the order of the work nor on how rows are grouped. ``metric``:
    which errors matter, by calibration. ``delta_OI``: merged − base. ``original_OI``: the 16-bit weight with the delta,
    where it is known beside a quantized base."""

    name: str
    rows: Rows
    seed: int = 0
    near_OI: Tensor | None = None
    metric: Metric | None = None
    delta_OI: Tensor | None = None
    original_OI: Tensor | None = None
