"""A sample of a row block, for metrics that need no more: its first rows, about 2**15 entries."""

from __future__ import annotations

from dataclasses import replace

from qmerge.metrics.base import MergedRows
from qmerge.types import Rows

ENTRIES = 2**15


def first_rows(rows: MergedRows) -> MergedRows:
    """The first of these rows: a multiple of the grid's ``row_step``, so that no block of the format is cut."""
    step = rows.grid.row_step
    columns = max(1, rows.base_OI.shape[1])
    count = max(step, ENTRIES // columns // step * step)
    if count >= len(rows.position):
        return rows
    return replace(
        rows,
        base_OI=rows.base_OI[:count],
        merged_OI=rows.merged_OI[:count],
        stored_OI=rows.stored_OI[:count],
        base_codes_OI=rows.base_codes_OI[:count],
        codes_OI=rows.codes_OI[:count],
        grid=rows.grid.rows(Rows(0, count)),
        position=Rows(rows.position.start, rows.position.start + count),
    )
