"""Adding up sums: over the row blocks of a weight, and over weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qmerge import plugins
from qmerge.grids import Grid
from qmerge.types import Rows, Update, dot


@dataclass(frozen=True)
class Comparison:
    """Some rows of one merged weight, all float32 [rows, I], and the grid that they were rounded to.

    base     what the adapter was added to
    merged   base + delta, before rounding
    stored   what a loader will read from the file that was written
    hessian  float32 [I, I], E[x xᵀ] of the layer's inputs (any scale), where they were seen
    """

    base_OI: Tensor
    merged_OI: Tensor
    stored_OI: Tensor
    base_codes_OI: Tensor
    codes_OI: Tensor
    grid: Grid
    rows: Rows
    update: Update
    hessian_II: Tensor | None = None

    @cached_property
    def delta_OI(self) -> Tensor:
        """merged − base: what was meant to change."""
        return self.merged_OI - self.base_OI

    @cached_property
    def change_OI(self) -> Tensor:
        """stored − base: what did change."""
        return self.stored_OI - self.base_OI

    @cached_property
    def seen_delta_OI(self) -> Tensor | None:
        """delta · H; None where the inputs were not seen."""
        return None if self.hessian_II is None else self.delta_OI @ self.hessian_II

    @cached_property
    def delta_delta(self) -> float:
        return dot(self.delta_OI, self.delta_OI)

    @cached_property
    def change_delta(self) -> float:
        return dot(self.change_OI, self.delta_OI)

    @cached_property
    def change_change(self) -> float:
        return dot(self.change_OI, self.change_OI)


Sums = dict[str, dict[str, Any]]
"""Metric → name of a sum → float, or one float per rank."""


def sums_of(comparison: Comparison) -> Sums:
    """Every metric's sums for some rows."""
    return {name: dict(metric.sums(comparison)) for name, metric in plugins.every("metrics").items()}


def added(total: Sums | None, more: Sums) -> Sums:
    """Sums over two disjoint sets of rows of the same weight."""
    if total is None:
        return more
    return {m: {name: total[m][name] + value for name, value in more[m].items()} for m in more}


def plain(sums: Sums) -> Sums:
    """Tensors as lists, ready for JSON."""
    return {
        metric: {name: v.tolist() if isinstance(v, torch.Tensor) else float(v) for name, v in inner.items()}
        for metric, inner in sums.items()
    }


def values_of(sums: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Every metric's value, from plain sums."""
    return {name: metric.value(sums[name]) if sums else None for name, metric in plugins.every("metrics").items()}


def over_weights(weights: Iterable[Mapping[str, Mapping[str, Any]]]) -> Sums:
    """Plain sums over several weights: numbers add (so each weight counts by its ‖delta‖²), lists follow one another."""
    total: Sums = {}
    for sums in weights:
        for metric, inner in sums.items():
            into = total.setdefault(metric, {})
            for name, value in inner.items():
                into[name] = into[name] + value if name in into else value
    return total
