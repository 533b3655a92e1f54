"""Survival of each matrix of a stack of experts: ``kept``, matrix by matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from qmerge.metrics.base import MergedRows, Metric


class ExpertMetric(Metric):
    """A number made of the survival of every expert. Subclasses define ``value``."""

    def sums(self, rows: MergedRows) -> dict[str, float | Tensor]:
        """``MergedRows.matrix_sums``."""
        return {**rows.matrix_sums}


def expert_survival(sums: Mapping[str, Sequence[float]]) -> list[float]:
    """⟨change, delta⟩ / ⟨delta, delta⟩ of every matrix that has a delta."""
    pairs = zip(sums.get("change_delta", []), sums.get("delta_delta", []), strict=True)
    return [change_delta / delta_delta for change_delta, delta_delta in pairs if delta_delta > 0]
