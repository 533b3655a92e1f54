"""The contract of a metric, the rows that it measures, and how its sums add up over row blocks and over weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qmerge.grids import Grid
from qmerge.metrics import all_metrics
from qmerge.metrics._dots import Changes, Dots, changes_of
from qmerge.types import Rows, Update

SAMPLE_ENTRIES = 2**14
"""Entries of a sample."""

SAMPLE_SPACING = 2**22
"""Entries from the start of one sample to the next. (Taken from all entries, some metrics would cost more than the merge.)"""

NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest one are rounding errors of the decomposition, not ranks of the delta."""


@dataclass(frozen=True, kw_only=True)
class MergedRows:
    """Some rows of one merged weight, before and after, all float32 [rows, I].

    Attributes:
        base_OI: the values that the adapter was added to.
        merged_OI: base + delta, before rounding.
        stored_OI: the values that a loader will read from the output file.
        base_codes_OI: codes of the base on the grid of the output.
        codes_OI: codes of ``stored_OI``.
        grid: the grid of these rows.
        position: which rows of the weight they are.
        weight_rows: how many rows the weight has.
        matrices: how many matrices of equal height the weight holds, one after the other: more than 1 for stacked experts.
        stands_for: how many rows of the weight each of these rows stands for: more than 1 in a sample.
        update: the adapter's update of the whole weight.
        hessian_II: float32 [I, I], E[x xᵀ] of the layer's inputs, at any scale; None where calibration saw no inputs.
    """

    base_OI: Tensor
    merged_OI: Tensor
    stored_OI: Tensor
    base_codes_OI: Tensor
    codes_OI: Tensor
    grid: Grid
    position: Rows
    weight_rows: int
    update: Update
    hessian_II: Tensor | None = None
    matrices: int = 1
    stands_for: float = 1.0

    def part(self, rows: Rows) -> MergedRows:
        """Some of these rows, by their position in the weight."""
        inside = slice(rows.start - self.position.start, rows.stop - self.position.start)
        return replace(
            self,
            base_OI=self.base_OI[inside],
            merged_OI=self.merged_OI[inside],
            stored_OI=self.stored_OI[inside],
            base_codes_OI=self.base_codes_OI[inside],
            codes_OI=self.codes_OI[inside],
            grid=self.grid.rows(Rows(inside.start, inside.stop)),
            position=rows,
        )

    # Several metrics use each of these: they are computed once for all.
    @cached_property
    def delta_OI(self) -> Tensor:
        """merged − base: the intended change."""
        return self.merged_OI - self.base_OI

    @cached_property
    def change_OI(self) -> Tensor:
        """stored − base: the actual change."""
        return self._changes.change_OI

    @cached_property
    def gap_OI(self) -> Tensor:
        """Distance from the base's levels to the next ones on the side of the delta; infinite at the ends of the grid."""
        return self.grid.gap(self.base_codes_OI, self.delta_OI)

    @cached_property
    def delta_hessian_OI(self) -> Tensor | None:
        """delta · H; None where calibration saw no inputs."""
        return None if self.hessian_II is None else self.delta_OI @ self.hessian_II

    @property
    def dots(self) -> Dots:
        """Scalar products of base, delta, actual change and rounding error."""
        return self._changes.dots

    @cached_property
    def _changes(self) -> Changes:
        return changes_of(self.base_OI, self.merged_OI, self.stored_OI)

    @property
    def delta_delta(self) -> float:
        """⟨delta, delta⟩."""
        return self.dots.delta_delta

    @cached_property
    def rank_sums(self) -> dict[str, Tensor]:
        """float64 [R] each: ``landed``, the change along every singular direction of the delta, and ``meant``, its singular value.

        A row block has its rows' share of both. Empty for a delta without small factors.
        """
        directions = self.update.directions()
        if directions is None:
            return {}
        u_OR, s_R, v_IR = directions
        u_rows = u_OR[self.position.start : self.position.stop]
        landed_OR = (self.change_OI @ v_IR) * u_rows
        # u_k has norm 1 over all rows of the weight: the shares of its rows add up to 1.
        meant_OR = s_R * u_rows.square()
        # Summed in float64, and rounded to float32 by ``plain``, so that row blocks make no difference.
        return {"landed": landed_OR.double().sum(dim=0), "meant": meant_OR.double().sum(dim=0)}

    @cached_property
    def matrix_sums(self) -> dict[str, Tensor]:
        """float64 [matrices] each: ``change_delta`` ⟨change, delta⟩ and ``delta_delta``, of the rows of every matrix.

        Empty for a weight that is one matrix.
        """
        if self.matrices == 1:
            return {}
        height = self.weight_rows // self.matrices
        matrix_of_row = torch.arange(self.position.start, self.position.stop, device=self.base_OI.device) // height
        sums = {}
        for name, other_OI in (("change_delta", self.change_OI), ("delta_delta", self.delta_OI)):
            products_O = torch.linalg.vecdot(other_OI, self.delta_OI).double()
            sums[name] = products_O.new_zeros(self.matrices).index_add_(0, matrix_of_row, products_O)
        return sums

    @cached_property
    def samples(self) -> list[MergedRows]:
        """Those of these rows that are in a sample. The samples are the same however the rows are grouped in blocks."""
        step = self.grid.row_step
        # Multiples of the grid's row_step, so that no block of the format is cut.
        count = self._rows_of(SAMPLE_ENTRIES, step)
        spacing = max(count, self._rows_of(SAMPLE_SPACING, step))
        samples = []
        for first in range(self.position.start // spacing * spacing, self.position.stop, spacing):
            start = max(first, self.position.start)
            stop = min(first + count, self.position.stop)
            if start < stop:
                rows_left = self.weight_rows - first
                stands_for = min(spacing, rows_left) / min(count, rows_left)
                samples.append(replace(self.part(Rows(start, stop)), stands_for=stands_for))
        return samples

    def _rows_of(self, entries: int, step: int) -> int:
        """Rows with about so many entries, a multiple of ``step``."""
        columns = max(1, self.base_OI.shape[1])
        return max(step, entries // columns // step * step)


class Metric(ABC):
    """One number about a merged weight, made of sums that add up over row blocks and, with a meaning, over weights."""

    @abstractmethod
    def sums(self, rows: MergedRows) -> Mapping[str, float | Tensor]:
        """Name → sum over these rows: a float, or float32 [R] with one sum per rank; empty where it cannot be computed."""

    @abstractmethod
    def value(self, sums: Mapping[str, Any]) -> float | None:
        """The number, from sums over all rows (tensors have become lists); None where it does not exist: a delta of zero."""


def ratio(numerator: float, denominator: float) -> float | None:
    """numerator / denominator; None where the denominator is 0."""
    if not denominator:
        return None
    return numerator / denominator


Sums = dict[str, dict[str, Any]]
"""Metric → name of a sum → float, or one float per rank."""


def sums_of(rows: MergedRows) -> Sums:
    """Every metric's sums for some rows."""
    return {name: dict(metric.sums(rows)) for name, metric in all_metrics().items()}


def added(total: Sums | None, more: Sums) -> Sums:
    """Sums over two disjoint sets of rows of the same weight."""
    if total is None:
        return more
    result: Sums = {}
    for metric, sums in more.items():
        # A metric that takes samples has no sums of a row block without any.
        result[metric] = dict(total[metric])
        for name, value in sums.items():
            result[metric][name] = result[metric].get(name, 0.0) + value
    return result


def plain(sums_by_metric: Sums) -> Sums:
    """The same with lists for tensors (rounded to float32), ready for JSON."""
    result: Sums = {metric: {} for metric in sums_by_metric}
    for metric, sums in sums_by_metric.items():
        for name, value in sums.items():
            result[metric][name] = value.float().tolist() if isinstance(value, torch.Tensor) else float(value)
    return result


def ranks_by_size(sums: Mapping[str, Sequence[float]]) -> list[tuple[float, float]]:
    """The ranks of ``MergedRows.rank_sums`` as (landed, meant), the largest first, without negligible ones.

    Args:
        sums: plain sums over all rows; without ranks, the result is empty.
    """
    pairs = zip(sums.get("landed", []), sums.get("meant", []), strict=True)
    by_size = sorted(pairs, key=lambda pair: -pair[1])
    return [pair for pair in by_size if pair[1] > NEGLIGIBLE * by_size[0][1]]


def values_of(sums_by_metric: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Every metric's value, from plain sums; all None where there are no sums (no weight was merged)."""
    if not sums_by_metric:
        return dict.fromkeys(all_metrics())
    return {name: metric.value(sums_by_metric[name]) for name, metric in all_metrics().items()}


def over_weights(weights: Iterable[Mapping[str, Mapping[str, Any]]]) -> Sums:
    """Plain sums over several weights: numbers add, so that each weight counts by its ‖delta‖²; lists are concatenated."""
    total: Sums = {}
    for sums_by_metric in weights:
        for metric, sums in sums_by_metric.items():
            # A weight whose inputs calibration did not see has no sums of outputs; the others still add up.
            total_of_metric = total.setdefault(metric, {})
            for name, value in sums.items():
                total_of_metric[name] = total_of_metric[name] + value if name in total_of_metric else value
    return total
