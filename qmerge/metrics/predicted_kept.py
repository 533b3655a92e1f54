"""predicted_kept: what nearest rounding keeps of a Gaussian delta of this size, by a closed form."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qmerge.grids import Grid
from qmerge.metrics._sample import some_rows
from qmerge.metrics.base import Comparison


def sums(c: Comparison) -> dict[str, float]:
    some = some_rows(c)
    kept = expected_kept(some.base_OI, some.delta_OI.norm(dim=1), some.grid)
    return {"expected": (kept or 0.0) * c.delta_delta, "weight": c.delta_delta}


def value(total: Mapping[str, float]) -> float | None:
    return total["expected"] / total["weight"] if total["weight"] else None


def expected_kept(base_OI: Tensor, row_norms_O: Tensor, grid: Grid) -> float | None:
    """Each row's delta is taken as Gaussian with the row's own rms, and rows weigh by their ‖delta‖².

    Args:
        base_OI: float32, what the delta is added to.
        row_norms_O: float32, ‖delta‖ of every row.
        grid: the grid of these rows.

    Returns:
        The expected share of the delta; None for a delta of zero.
    """
    variance_O = row_norms_O.square() / base_OI.shape[1]
    sigma_O = variance_O.where(variance_O > 0, variance_O.new_ones(())).sqrt()
    kept_O = grid.expected_slope(base_OI, sigma_O[:, None]).mean(dim=1)
    weight = float(variance_O.double().sum())
    return float((kept_O * variance_O).double().sum()) / weight if weight else None
