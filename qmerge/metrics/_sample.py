"""Metrics that need no more than a sample of a weight: about 2**14 entries out of every 2**22."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from qmerge.metrics.base import MergedRows, Metric
from qmerge.types import Rows

ENTRIES = 2**14
"""Entries of a sample."""

SPACING = 2**22
"""Entries from the start of one sample to the next. (Taken from all entries, these metrics would cost more than the merge.)"""


class SampledMetric(Metric):
    """A metric whose sums come from samples. The samples are the same however the rows are grouped in blocks."""

    def sums(self, rows: MergedRows) -> Mapping[str, float | Tensor]:
        """Over the sampled rows among these; empty where there are none."""
        total: dict[str, float] = {}
        for sample in _samples(rows):
            for name, value in self.sample_sums(sample).items():
                total[name] = total.get(name, 0.0) + value
        return total

    @abstractmethod
    def sample_sums(self, sample: MergedRows) -> Mapping[str, float]:
        """Name → sum over some sampled rows."""


def _samples(rows: MergedRows) -> Iterator[MergedRows]:
    """The parts of these rows that are in a sample."""
    step = rows.grid.row_step
    # Multiples of the grid's row_step, so that no block of the format is cut.
    count = _rows_of(ENTRIES, rows, step)
    spacing = max(count, _rows_of(SPACING, rows, step))
    for first in range(rows.position.start // spacing * spacing, rows.position.stop, spacing):
        start = max(first, rows.position.start)
        stop = min(first + count, rows.position.stop)
        if start < stop:
            part = rows.part(Rows(start, stop))
            rows_left = rows.weight_rows - first
            yield replace(part, stands_for=min(spacing, rows_left) / min(count, rows_left))


def _rows_of(entries: int, rows: MergedRows, step: int) -> int:
    """Rows with about so many entries, a multiple of ``step``."""
    columns = max(1, rows.base_OI.shape[1])
    return max(step, entries // columns // step * step)
