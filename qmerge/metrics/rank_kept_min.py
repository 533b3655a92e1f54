"""rank_kept_min: survival of the delta's worst rank; below 0, rounding errors outweigh what this rank changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmerge.metrics._ranks import RankMetric, rank_survival


class RankKeptMin(RankMetric):
    """The minimum over all ranks of the delta; over several weights, over all ranks of all of them."""

    def value(self, sums: Mapping[str, Any]) -> float | None:
        return min(rank_survival(sums), default=None)


METRIC = RankKeptMin()
