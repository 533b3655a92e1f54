"""Metrics that need no more than a sample of a weight: about 2**14 entries out of every 2**22."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from qmerge.metrics.base import MergedRows, Metric


class SampledMetric(Metric):
    """A metric whose sums come from samples (``MergedRows.samples``)."""

    def sums(self, rows: MergedRows) -> Mapping[str, float | Tensor]:
        """Over the sampled rows among these; empty where there are none."""
        total: dict[str, float] = {}
        for sample in rows.samples:
            for name, value in self.sample_sums(sample).items():
                total[name] = total.get(name, 0.0) + value
        return total

    @abstractmethod
    def sample_sums(self, sample: MergedRows) -> Mapping[str, float]:
        """Name → sum over some sampled rows."""
