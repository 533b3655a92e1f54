"""Adding up sums: over the row blocks of a weight, and over weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qmerge import plugins
from qmerge.types import Comparison

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
