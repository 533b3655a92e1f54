"""expert_kept_median: kept of the middle expert, where experts are stacked in one weight."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from qmerge.metrics._experts import ExpertMetric, expert_survival


class ExpertKeptMedian(ExpertMetric):
    """The median over all experts of the stack; over several weights, over all experts of all of them."""

    def value(self, sums: Mapping[str, Any]) -> float | None:
        survival = expert_survival(sums)
        return median(survival) if survival else None


METRIC = ExpertKeptMedian()
