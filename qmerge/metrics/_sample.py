"""Some rows of a comparison, for numbers that need no more: the first of every row block, about 2**15 entries."""

from __future__ import annotations

from dataclasses import replace

from qmerge.metrics.base import Comparison
from qmerge.types import Rows

ENTRIES = 2**15


def some_rows(c: Comparison) -> Comparison:
    """The first rows; whole blocks of the grid."""
    step = c.grid.row_step
    count = max(step, ENTRIES // max(1, c.base_OI.shape[1]) // step * step)
    if count >= len(c.rows):
        return c
    part = slice(0, count)
    return replace(
        c, base_OI=c.base_OI[part], merged_OI=c.merged_OI[part], stored_OI=c.stored_OI[part],
        base_codes_OI=c.base_codes_OI[part], codes_OI=c.codes_OI[part],
        grid=c.grid.rows(Rows(0, count)), rows=Rows(c.rows.start, c.rows.start + count),
    )  # fmt: skip
