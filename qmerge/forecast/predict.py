"""Survival before the run: what nearest rounding will keep of each weight's delta, from a few rows of the base.

The size of a delta comes from its small factors, ‖B A‖² = tr(BᵀB · A Aᵀ). How much of a delta of that size survives
follows from the distances between the base's values and the target's levels, by a closed form
(``Grid.expected_slope``). About 2**14 values of each weight are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qmerge.formats import get_target
from qmerge.formats.base import Stored
from qmerge.grids import UP, Grid
from qmerge.metrics.gap_to_delta import gap_sum
from qmerge.metrics.predicted_kept import expected_kept
from qmerge.planning.plan import Plan
from qmerge.types import Rows, Step, Update
from qmerge.weights.context import RunContext
from qmerge.weights.rows import SAMPLED_ENTRIES, SAMPLED_GROUPS, sampled_rows
from qmerge.weights.values import open_weight


@dataclass(frozen=True, kw_only=True)
class Survival:
    """How much of one weight's delta survives on a target, predicted or measured.

    module         name of the module in reports
    target         format
    rounding       name of the rounding
    rank           rank of the update
    kept           ⟨stored − base, delta⟩ / ⟨delta, delta⟩; None for a delta of zero
    noise          ‖stored − merged‖ / ‖delta‖; None for a delta of zero
    relative_size  rms(delta) / rms(base)
    gap_to_delta   mean gap between levels / rms(delta)
    delta_squared  ‖delta‖², by which weights count in totals
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
    """The survival of every merged weight: by stochastic rounding where the plan has it, else by nearest rounding.

    (``kinds.predict_kinds`` needs a few weights of each kind only.)
    """
    return [predict_step(step, context) for step in plan.merged]


def predict_step(step: Step, context: RunContext, entries: int = SAMPLED_ENTRIES) -> Survival:
    """The survival of one merged weight, from a few groups of its rows.

    Args:
        entries: values of each group.
    """
    assert step.update is not None
    rounding = rounding_of(step)
    sample = _Sample()
    for base_OI, merged_OI, grid in _sampled_blocks(step, context, entries):
        sample.add(base_OI, merged_OI, grid, rounding)
    numel = math.prod(step.shape)
    squared = delta_squared(step.update, sample.delta_squared, sample.entries / numel)
    rms_delta = math.sqrt(squared / numel)
    kept = sample.kept
    if rounding == "stochastic" and kept is not None:
        kept = 1.0  # stochastic rounding is right on average, whatever the grid
    return Survival(
        module=step.label,
        target=step.target,
        rounding=rounding,
        rank=step.update.rank,
        kept=kept,
        noise=sample.noise,
        relative_size=sample.relative_size(rms_delta),
        gap_to_delta=sample.gap_to_delta(rms_delta),
        delta_squared=squared,
    )


def rounding_of(step: Step) -> str:
    """The rounding that a prediction is about."""
    return "stochastic" if step.rounding == "stochastic" else "nearest"


def _sampled_blocks(step: Step, context: RunContext, entries: int) -> Iterator[tuple[Tensor, Tensor, Grid]]:
    """Base and merged values of some rows, float32 [rows, I], and their grid."""
    assert step.update is not None
    weights = _open_weights(step, context)
    groups = sampled_rows(step, entries)
    enough = _enough_rows(step, entries) // len(groups)
    bases: list[Tensor] = []
    mergeds: list[Tensor] = []
    for rows in groups:
        base_OI, grid = base_and_grid(step, weights, rows)
        # The base may be on another device than the adapter was read to.
        merged_OI = step.update.to(base_OI.device).apply(base_OI, rows)
        if grid is None and len(rows) <= enough:
            # All groups together, as if they were the whole weight.
            bases.append(base_OI)
            mergeds.append(merged_OI)
            continue
        if grid is None:
            grid = get_target(step.target).sample_grid(base_OI, step.options)
        # Many rows may share a scale, and all of them are needed for it; the sums do without most of them.
        some = slice(0, max(1, enough))
        yield base_OI[some], merged_OI[some], grid.rows(Rows(0, len(base_OI[some])))
    if bases:
        base_OI = torch.cat(bases)
        yield base_OI, torch.cat(mergeds), get_target(step.target).sample_grid(base_OI, step.options)


def _enough_rows(step: Step, entries: int) -> int:
    """Rows that are summed over."""
    assert step.update is not None
    rows, columns = step.shape
    if step.update.whole:
        return rows
    return SAMPLED_GROUPS * max(1, entries // max(1, columns))


class _Sample:
    """Sums over the sampled rows of one weight."""

    def __init__(self) -> None:
        self.entries = 0
        self.delta_squared = 0.0
        self._kept = 0.0
        self._error_squared = 0.0
        self._base_squared = 0.0
        self._gaps = 0.0
        self._gap_entries = 0.0

    def add(self, base_OI: Tensor, merged_OI: Tensor, grid: Grid, rounding: str) -> None:
        """Some rows, float32 [rows, I], and their grid."""
        norms_O = (merged_OI - base_OI).norm(dim=1)
        squared = float(norms_O.double().square().sum())
        # Groups of rows count by their ‖delta‖², as weights do in totals.
        self._kept += squared * (expected_kept(base_OI, norms_O, grid) or 0.0)
        self.delta_squared += squared
        self._error_squared += rounding_error(merged_OI, grid, rounding)
        # The gaps above the base's levels; the direction of a delta is as often up as down.
        gaps, gap_entries = gap_sum(grid, grid.nearest(base_OI), torch.ones_like(base_OI))
        self._gaps += gaps
        self._gap_entries += gap_entries
        self._base_squared += float(base_OI.double().square().sum())
        self.entries += base_OI.numel()

    @property
    def kept(self) -> float | None:
        """Expected kept by nearest rounding."""
        if not self.delta_squared:
            return None
        return self._kept / self.delta_squared

    @property
    def noise(self) -> float | None:
        """Expected noise."""
        if not self.delta_squared:
            return None
        return math.sqrt(self._error_squared / self.delta_squared)

    def relative_size(self, rms_delta: float) -> float | None:
        """rms(delta) / rms(base)."""
        if not self._base_squared:
            return None
        return rms_delta / math.sqrt(self._base_squared / self.entries)

    def gap_to_delta(self, rms_delta: float) -> float | None:
        """Mean gap between levels / rms(delta)."""
        if not rms_delta or not self._gap_entries:
            return None
        return self._gaps / self._gap_entries / rms_delta


@dataclass(frozen=True)
class _OpenWeights:
    """The weights that a step reads: the one with the grid, and the original where the delta is added to it."""

    weight: Stored
    original: Stored | None


def _open_weights(step: Step, context: RunContext) -> _OpenWeights:
    source = step.source
    weight = open_weight(source.weight, step, context)
    original = None
    if source.base_weight is not source.weight:
        original = open_weight(source.base_weight, step, context)
    return _OpenWeights(weight, original)


def base_and_grid(step: Step, weights: _OpenWeights, rows: Rows) -> tuple[Tensor, Grid | None]:
    """The float32 values of some rows that the delta is added to, and their grid where it is kept; None for a fresh one.

    (``weights.values.open_source`` settles scales for the whole weight, which would read all of it.)
    """
    source = step.source
    base_OI = weights.weight.values(rows)
    if source.training_format is not None:
        training = get_target(source.training_format.format)
        loaded_OI = training.as_loaded(base_OI)
        training_grid = training.sample_grid(loaded_OI, source.training_format.options)
        if source.simulates_training:
            # The adapter was trained on these values, not on the dense ones.
            base_OI = training_grid.decode(training_grid.nearest(loaded_OI))
        if source.keeps_grid:
            return base_OI, training_grid
    if weights.original is not None:
        base_OI = weights.original.values(rows)
    if source.keeps_grid:
        return base_OI, weights.weight.grid.rows(rows)
    return base_OI, None


def delta_squared(update: Update, sampled: float, fraction: float) -> float:
    """‖delta‖² of a whole weight: exact from the small factors; where the delta depends on the base, from a sample.

    Args:
        sampled: ‖delta‖² of the sampled rows.
        fraction: fraction of all values that was sampled.
    """
    norms_O = update.row_norms()
    if norms_O is None:
        return sampled / fraction  # the rest of the weight is taken to be like the sample
    return float(norms_O.double().square().sum())


def rounding_error(merged_OI: Tensor, grid: Grid, rounding: str) -> float:
    """Expected ‖stored − merged‖² of some rows.

    The error of nearest rounding is computed. Stochastic rounding has the variance (value − below)(above − value) in
    each entry.
    """
    if rounding == "nearest":
        return float((grid.decode(grid.nearest(merged_OI)) - merged_OI).double().square().sum())
    below_OI = grid.floor(merged_OI)
    low_OI = grid.decode(below_OI)
    high_OI = grid.decode(grid.step(below_OI, UP))
    return float(((merged_OI - low_OI) * (high_OI - merged_OI)).clamp(min=0).double().sum())


def total_kept(survivals: Iterable[Survival]) -> float | None:
    """kept of all weights together, each counted by its ‖delta‖²; None where all deltas are zero."""
    pairs = [(s.kept, s.delta_squared) for s in survivals if s.kept is not None]
    total_squared = sum(squared for _, squared in pairs)
    if not total_squared:
        return None
    return sum(kept * squared for kept, squared in pairs) / total_squared


def total_noise(survivals: Iterable[Survival]) -> float | None:
    """noise of all weights together, √(Σ ‖stored − merged‖² / Σ ‖delta‖²); None where all deltas are zero."""
    pairs = [(s.noise, s.delta_squared) for s in survivals if s.noise is not None]
    total_squared = sum(squared for _, squared in pairs)
    if not total_squared:
        return None
    return math.sqrt(sum(noise**2 * squared for noise, squared in pairs) / total_squared)
