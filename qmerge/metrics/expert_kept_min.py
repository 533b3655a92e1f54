"""expert_kept_min: kept of the expert that survived worst, where experts are stacked in one weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmerge.metrics._experts import ExpertMetric, expert_survival


class ExpertKeptMin(ExpertMetric):
    """The minimum over all experts of the stack; over several weights, over all experts of all of them."""

    def value(self, sums: Mapping[str, Any]) -> float | None:
        return min(expert_survival(sums), default=None)


METRIC = ExpertKeptMin()
