"""What a rounding defines, and what it may know of a weight besides its values and its grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from qmerge.grids import Grid
from qmerge.rounding._objective import InputStatistics, Objective, make_objective, stack_statistics, upper_factor
from qmerge.types import Rows

__all__ = [
    "EFFORTS",
    "Effort",
    "InputStatistics",
    "Objective",
    "Rounding",
    "RoundingContext",
    "make_objective",
    "stack_statistics",
    "upper_factor",
]


@dataclass(frozen=True)
class Effort:
    """How long ``preserve`` searches, and on how much text.

    Attributes:
        tokens: of the calibration text, where no other number is asked for.
        orders: orders of the columns that are tried.
        sweeps: most sweeps of descent from each start; a row that did not move in a sweep has arrived.
    """

    tokens: int
    orders: int
    sweeps: int


EFFORTS = {
    "fast": Effort(tokens=8192, orders=1, sweeps=1),
    "default": Effort(tokens=16384, orders=2, sweeps=3),
    "best": Effort(tokens=32768, orders=8, sweeps=6),
}
"""What ``--effort`` names (docs/benchmarks.md has a row for each)."""


@dataclass(frozen=True, kw_only=True)
class RoundingContext:
    """What a rounding may know of some rows of a weight.

    Attributes:
        name: of the weight. With ``rows`` and ``seed`` it decides random draws, so that they depend on neither the order of the
            work nor the grouping of rows.
        rows: which rows of the weight these are.
        seed: of random draws.
        effort: of a search.
        base_codes_OI: the base's own codes, where the target keeps the base's grid: most of them are right already.
        objective: which errors matter, from calibration and the adapter's directions; None for other roundings.
        delta_OI: float32, merged − base.
        original_OI: float32, the 16-bit weight with the delta, where it is given for a quantized base.
    """

    name: str
    rows: Rows
    seed: int = 0
    effort: Effort = EFFORTS["default"]
    base_codes_OI: Tensor | None = None
    objective: Objective | None = None
    delta_OI: Tensor | None = None
    original_OI: Tensor | None = None


class Rounding(ABC):
    """A way to choose a code for every value."""

    @abstractmethod
    def choose(self, values_OI: Tensor, grid: Grid, context: RoundingContext) -> Tensor:
        """float32 [O, I] → codes [O, I], by asking the grid only; the values are not changed.

        Random draws must be a function of ``context.seed``, ``context.name`` and the position of the entry, so that no byte
        depends on the order of the work or on how rows are grouped.
        """
