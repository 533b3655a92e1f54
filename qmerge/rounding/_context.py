"""What a rounding may know besides the values and the grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qmerge.types import Rows


@dataclass(frozen=True)
class Context:
    """``near_OI``: the base's own codes when the grid is kept. ``name`` and ``rows`` say which part of which weight
    this is, so that random numbers depend on neither the order of the work nor on how rows are grouped."""

    name: str
    rows: Rows
    seed: int = 0
    near_OI: Tensor | None = None
