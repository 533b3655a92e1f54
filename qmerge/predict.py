"""Survival before the run: what nearest rounding will keep of each weight's delta, from a few rows of the base.

The delta's size comes from its small factors, ‖B A‖² = tr(BᵀB · A Aᵀ); what a delta of that size survives comes from
where the base's values lie on the target's grid, by a closed form (``Grid.expected_slope``). About 2**16 values of
each weight are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qmerge import plugins
from qmerge.formats._base import Format, Stored
from qmerge.grids import Grid
from qmerge.metrics.gap_to_delta import mean_gap
from qmerge.metrics.predicted_kept import expected_kept
from qmerge.pipeline import Bench, open_weight, row_step
from qmerge.plan import Plan
from qmerge.types import Rows, Step

GROUPS, ENTRIES = 4, 2**14
"""Row groups that are looked at in each weight, and values per group."""


@dataclass(frozen=True)
class Survival:
    """How one weight's delta fares on a target. ``kept`` and ``noise`` are None for a delta of zero.

    ``relative_size``: rms(delta)/rms(base); ``gap_to_delta``: mean gap between levels / rms(delta);
    ``delta_squared``: ‖delta‖², the weight in totals.
    """

    module: str
    target: str
    rounding: str
    rank: int
    kept: float | None
    noise: float | None
    relative_size: float | None
    gap_to_delta: float | None
    delta_squared: float


def predict(plan: Plan, bench: Bench) -> list[Survival]:
    """One prediction per merged weight of a plan."""
    return [predict_step(step, plan.recipe.rounding, bench) for step in plan.merged]


def predict_step(step: Step, rounding: str, bench: Bench) -> Survival:
    assert step.update is not None
    target: Format = plugins.load("formats", step.target).FORMAT
    norms_O = step.update.row_norms()
    squared = float(norms_O.double().square().sum())
    rms_delta = math.sqrt(squared / math.prod(step.shape))
    kept, gaps, squares, entries, weight = 0.0, 0.0, 0.0, 0, 0.0
    source, original = (
        open_weight(step.weight, step, bench),
        open_weight(step.original, step, bench) if step.original else None,
    )
    for rows in row_groups(step):
        base_OI, grid = base_and_grid(step, target, source, original, rows)
        norms = norms_O[rows.start : rows.stop].to(base_OI.device)
        share = float(norms.double().square().sum())
        kept, weight = kept + share * (expected_kept(base_OI, norms, grid) or 0.0), weight + share
        gaps += mean_gap(grid, grid.nearest(base_OI), torch.ones_like(base_OI)) * base_OI.numel()
        squares, entries = squares + float(base_OI.double().square().sum()), entries + base_OI.numel()
    gap_ratio = gaps / entries / rms_delta if rms_delta else None
    expected = kept / weight if weight else None
    return Survival(
        step.weight.module, step.target, rounding, step.update.rank,
        kept=_by_rounding(expected, rounding),
        noise=_noise(expected, gap_ratio, rounding),
        relative_size=rms_delta / math.sqrt(squares / entries) if squares else None,
        gap_to_delta=gap_ratio,
        delta_squared=squared,
    )  # fmt: skip


def total_kept(survivals: Iterable[Survival]) -> float | None:
    """kept of all weights together, each counted by its ‖delta‖²."""
    pairs = [(s.kept, s.delta_squared) for s in survivals if s.kept is not None]
    weight = sum(squared for _, squared in pairs)
    return sum(kept * squared for kept, squared in pairs) / weight if weight else None


def base_and_grid(
    step: Step, target: Format, source: Stored, original: Stored | None, rows: Rows
) -> tuple[Tensor, Grid]:
    """The values to merge onto, and the target's grid, of some rows alone."""
    base_OI, grid = source.values(rows), source.grid
    if step.trained_on:
        name, options = step.trained_on
        form: Format = plugins.load("formats", name).FORMAT
        seen_OI = form.as_loaded(base_OI)
        grid = form.grid(form.scales(seen_OI, options), (len(rows), step.shape[1]), options)
        base_OI = base_OI if step.onto_original else grid.decode(grid.nearest(seen_OI))
        if step.keeps_grid:
            return base_OI, grid
    if original is not None:
        base_OI = original.values(rows)
    if step.keeps_grid:
        return base_OI, grid.rows(rows)
    return base_OI, target.grid(target.scales(base_OI, step.options), (len(rows), step.shape[1]), step.options)


def row_groups(step: Step) -> list[Rows]:
    """A few groups of rows, spread over the weight."""
    rows, columns = step.shape
    unit = row_step(step)
    size = max(unit, ENTRIES // max(1, columns) // unit * unit)
    if size * GROUPS >= rows:
        return [Rows(0, rows)]
    starts = {i * (rows - size) // (GROUPS - 1) // unit * unit for i in range(GROUPS)}
    return [Rows(start, min(start + size, rows)) for start in sorted(starts)]


def _by_rounding(nearest: float | None, rounding: str) -> float | None:
    """Stochastic rounding is right on average, whatever the grid."""
    return nearest if nearest is None or rounding == "nearest" else 1.0


def _noise(kept: float | None, gap_ratio: float | None, rounding: str) -> float | None:
    """‖stored − merged‖/‖delta‖ on a kept grid: nearest loses what it does not keep; stochastic rounding has variance
    |d| (gap − |d|) per entry, with E|d| = 0.8 rms for a Gaussian delta."""
    if kept is None or gap_ratio is None:
        return None
    if rounding == "nearest":
        return math.sqrt(max(0.0, 1 - kept))
    return math.sqrt(max(0.0, 0.8 * gap_ratio - 1))
