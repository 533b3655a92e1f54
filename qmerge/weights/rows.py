"""Which rows of a weight are worked on at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

from qmerge.formats import get_format
from qmerge.types import Rows, Step

SAMPLED_GROUPS = 4
"""Groups of rows that are read where a sample of a weight is enough."""

SAMPLED_ENTRIES = 2**12
"""Values in each of these groups."""


def row_blocks(step: Step, entries: int) -> Iterator[Rows]:
    """Blocks of about ``entries`` values that cover all rows of a step's weight, in order.

    One block covers the whole weight where it is transposed, or where its rows depend on one another. Of a transposed stack,
    every matrix is a block.
    """
    rows, columns = step.shape
    multiple = row_multiple(step)
    if step.source.transposed_stack:
        entries = 0
    count = max(1, entries // max(1, columns))  # a weight may have no columns at all
    # Of a transposed weight, some rows would be some columns on disk.
    if step.source.conv1d or _rows_depend_on_each_other(step):
        count = rows
    count = max(multiple, count // multiple * multiple)
    for start in range(0, rows, count):
        yield Rows(start, min(start + count, rows))


def sampled_rows(step: Step, entries: int = SAMPLED_ENTRIES) -> list[Rows]:
    """A few groups of rows, spread over the weight, of about ``entries`` values each."""
    rows, columns = step.shape
    multiple = row_multiple(step)
    size = max(multiple, entries // max(1, columns) // multiple * multiple)
    if _rows_depend_on_each_other(step) or size * SAMPLED_GROUPS >= rows:
        return [Rows(0, rows)]
    starts = set()
    for i in range(SAMPLED_GROUPS):
        # From the first row to the last one, evenly.
        start = i * (rows - size) // (SAMPLED_GROUPS - 1)
        starts.add(start // multiple * multiple)
    return [Rows(start, min(start + size, rows)) for start in sorted(starts)]


def row_multiple(step: Step) -> int:
    """Row blocks must start at a multiple of this: the least common one of all formats of a step."""
    # A block of NF4 scales may span several rows, as may packed codes.
    stored = get_format(step.weight.format).row_step(step.shape, step.weight.options)
    written = get_format(step.target).row_step(step.shape, step.options)
    if step.source.transposed_stack:
        return step.weight.shape[2]
    training = step.source.training_format
    if training is None:
        return math.lcm(stored, written)
    return math.lcm(stored, written, get_format(training.format).row_step(step.shape, training.options))


def _rows_depend_on_each_other(step: Step) -> bool:
    return step.update is not None and step.update.whole
