"""Survival before the run: what nearest rounding will keep of each weight's delta, from a few rows of the base.

The delta's size comes from its small factors, ‖B A‖² = tr(BᵀB · A Aᵀ); what a delta of that size survives comes from
where the base's values lie on the target's grid, by a closed form (``Grid.expected_slope``). About 2**14 values of
each weight are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qmerge.formats import get_format
from qmerge.formats.base import Format, Stored
from qmerge.grids import UP, Grid
from qmerge.metrics.gap_to_delta import gap_sum
from qmerge.metrics.predicted_kept import expected_kept
from qmerge.pipeline import RunContext, open_weight, row_groups
from qmerge.planning.plan import Plan
from qmerge.types import Rows, Step, Update


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


def predict(plan: Plan, context: RunContext) -> list[Survival]:
    """One prediction per merged weight of a plan: for stochastic rounding where it is asked for, else for nearest."""
    return [predict_step(step, context) for step in plan.merged]


def predict_step(step: Step, context: RunContext) -> Survival:
    assert step.update is not None
    rounding = "stochastic" if step.rounding == "stochastic" else "nearest"
    target = get_format(step.target)
    kept, gaps, inside, squares, errors, entries, weight = 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0
    source = open_weight(step.weight, step, context)
    original = open_weight(step.original, step, context) if step.original else None
    for rows in row_groups(step):
        base_OI, grid = base_and_grid(step, target, source, original, rows)
        merged_OI = step.update.to(base_OI.device).apply(base_OI, rows)
        norms = (merged_OI - base_OI).norm(dim=1)
        share = float(norms.double().square().sum())
        kept, weight = kept + share * (expected_kept(base_OI, norms, grid) or 0.0), weight + share
        errors += rounding_error(merged_OI, grid, rounding)
        gap, number = gap_sum(grid, grid.nearest(base_OI), torch.ones_like(base_OI))
        gaps, inside = gaps + gap, inside + number
        squares, entries = squares + float(base_OI.double().square().sum()), entries + base_OI.numel()
    expected = kept / weight if weight else None
    squared = delta_squared(step.update, weight, entries / math.prod(step.shape))
    rms_delta = math.sqrt(squared / math.prod(step.shape))
    return Survival(
        step.label, step.target, rounding, step.update.rank,
        # Stochastic rounding is right on average, whatever the grid.
        kept=expected if expected is None or rounding == "nearest" else 1.0,
        noise=math.sqrt(errors / weight) if weight else None,
        relative_size=rms_delta / math.sqrt(squares / entries) if squares else None,
        gap_to_delta=gaps / inside / rms_delta if rms_delta and inside else None,
        delta_squared=squared,
    )  # fmt: skip


def delta_squared(update: Update, seen: float, share: float) -> float:
    """‖delta‖², exact from the small factors; where the delta depends on the base, from the ``share`` that was ``seen``."""
    norms_O = update.row_norms()
    return seen / share if norms_O is None else float(norms_O.double().square().sum())


def original_gap(plan: Plan, predicted: Iterable[Survival], context: RunContext) -> float | None:
    """‖original − dequantized‖ / ‖delta‖ over all merged weights, from a few rows of each: what quantizing the base did to
    it, in sizes of what the adapter did. None without an original, or for a delta of zero."""
    if plan.inputs.original is None:
        return None
    squares, deltas = 0.0, sum(survival.delta_squared for survival in predicted)
    for step in plan.merged:
        quantized = open_weight(plan.inputs.base.weights[step.name], step, context)
        original = open_weight(plan.inputs.original.weights[step.name], step, context)
        groups = row_groups(step)
        seen = sum(float((original.values(r) - quantized.values(r)).double().square().sum()) for r in groups)
        squares += seen * step.shape[0] / sum(map(len, groups))
    return math.sqrt(squares / deltas) if deltas else None


def rounding_error(merged_OI: Tensor, grid: Grid, rounding: str) -> float:
    """Expected ‖stored − merged‖² of these rows: nearest as it is; stochastic rounding has variance
    (value − below)(above − value) in every entry."""
    if rounding == "nearest":
        return float((grid.decode(grid.nearest(merged_OI)) - merged_OI).double().square().sum())
    below_OI = grid.floor(merged_OI)
    low_OI, high_OI = grid.decode(below_OI), grid.decode(grid.step(below_OI, UP))
    return float(((merged_OI - low_OI) * (high_OI - merged_OI)).clamp(min=0).double().sum())


def total_kept(survivals: Iterable[Survival]) -> float | None:
    """kept of all weights together, each counted by its ‖delta‖²."""
    pairs = [(s.kept, s.delta_squared) for s in survivals if s.kept is not None]
    weight = sum(squared for _, squared in pairs)
    return sum(kept * squared for kept, squared in pairs) / weight if weight else None


def total_noise(survivals: Iterable[Survival]) -> float | None:
    """noise of all weights together: √(Σ ‖stored − merged‖² / Σ ‖delta‖²)."""
    pairs = [(s.noise, s.delta_squared) for s in survivals if s.noise is not None]
    weight = sum(squared for _, squared in pairs)
    return math.sqrt(sum(noise**2 * squared for noise, squared in pairs) / weight) if weight else None


def base_and_grid(
    step: Step, target: Format, source: Stored, original: Stored | None, rows: Rows
) -> tuple[Tensor, Grid]:
    """The values to merge onto, and the target's grid, of some rows alone."""
    base_OI, grid = source.values(rows), source.grid
    if step.trained_on:
        name, options = step.trained_on
        form = get_format(name)
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
