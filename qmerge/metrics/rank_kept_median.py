"""rank_kept_median: survival of the delta's median rank."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from qmerge.metrics._ranks import RankMetric, rank_survival


class RankKeptMedian(RankMetric):
    """The median over all ranks of the delta; over several weights, over all ranks of all of them."""

    def value(self, sums: Mapping[str, Any]) -> float | None:
        survival = rank_survival(sums)
        return statistics.median(survival) if survival else None


METRIC = RankKeptMedian()
