"""The survival of all merged weights, predicted from a few weights of each kind.

A kind is one module of all layers or experts (``layers.*.self_attn.q_proj``), as long as its weights have the same shape and
are read and written in the same way. The sizes of all deltas are known from their small factors. The weights with the smallest
and the largest delta of a kind are read, and some between them. What is predicted for the others is interpolated by the size
of their deltas: the larger a delta, the more of it survives.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from qmerge.forecast.predict import Survival, predict_step, rounding_of
from qmerge.planning.plan import Plan
from qmerge.types import Step
from qmerge.weights.context import RunContext
from qmerge.weights.rows import SAMPLED_ENTRIES

READ_WEIGHTS = 4
"""Weights of each kind that are read."""

NUMBER = re.compile(r"\d+")
"""Of a layer or an expert, in the name of a module."""

Point = tuple[float, float]
"""‖delta‖ of a weight, and a value."""

IsSettled = Callable[[Sequence[Step], Sequence[Survival]], bool]
"""Of the weights of a kind that were read, whether the others need not be read."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was predicted, and from how many weights.

    survivals  of every merged weight, in the order of the plan
    kinds      number of kinds
    read       number of weights that were read
    """

    survivals: list[Survival]
    kinds: int
    read: int


def predict_kinds(
    plan: Plan,
    context: RunContext,
    *,
    weights: int = READ_WEIGHTS,
    entries: int = SAMPLED_ENTRIES,
    is_settled: IsSettled | None = None,
) -> Prediction:
    """Predict the survival of every merged weight.

    Args:
        weights: number of weights of each kind to read, at least 2.
        entries: values in each of the groups of rows of a weight.
        is_settled: where it says no, every weight of the kind is read.
    """
    kinds = weights_by_kind(plan.merged)
    survivals: dict[str, Survival] = {}
    read = 0
    for steps in kinds.values():
        sizes = [delta_size(step) for step in steps]
        predicted: dict[int, Survival] = {}
        for i in _chosen(sizes, weights):
            predicted[i] = predict_step(steps[i], context, entries)
        if predicted and is_settled and not is_settled(steps, list(predicted.values())):
            for i in range(len(steps)):
                predicted[i] = predicted.get(i) or predict_step(steps[i], context, entries)
        read += len(predicted)
        curves = _Curves(list(predicted.values()))
        for i, step in enumerate(steps):
            survivals[step.name] = predicted.get(i) or curves.survival(step, sizes[i])
    return Prediction(
        survivals=[survivals[step.name] for step in plan.merged],
        kinds=len(kinds),
        read=read,
    )


def weights_by_kind(merged: Sequence[Step]) -> dict[Hashable, list[Step]]:
    """The steps of each kind, in the order of the plan."""
    kinds: dict[Hashable, list[Step]] = defaultdict(list)
    for step in merged:
        weight = step.source.base_weight
        read = (weight.format, weight.options, step.source.training_format, type(step.update))
        written = (step.target, step.options, step.source.keeps_grid, rounding_of(step))
        kinds[NUMBER.sub("*", step.label), step.shape, read, written].append(step)
    return dict(kinds)


def delta_size(step: Step) -> float | None:
    """‖delta‖ from its small factors; None where it depends on the base."""
    assert step.update is not None
    norms_O = step.update.row_norms()
    return None if norms_O is None else float(norms_O.double().norm())


def _chosen(sizes: Sequence[float | None], count: int) -> list[int]:
    """Positions of the weights to read: evenly by size, or by position where the sizes are not known."""
    # A delta of zero needs no prediction.
    order = [i for i, size in enumerate(sizes) if size != 0]
    if None not in sizes:
        order.sort(key=lambda i: sizes[i] or 0.0)
    return [order[i] for i in spread(len(order), count)]


def spread(length: int, count: int) -> list[int]:
    """``count`` different positions of a list, from the first to the last one, evenly; all of them of a shorter list."""
    if length <= count:
        return list(range(length))
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]


class _Curves:
    """What was predicted for some weights of a kind, as functions of the size of the delta."""

    def __init__(self, read: Sequence[Survival]) -> None:
        self._mean_size = math.sqrt(sum(survival.delta_squared for survival in read) / max(1, len(read)))
        self._kept: list[Point] = []
        self._error: list[Point] = []
        self._base: list[Point] = []
        self._gap: list[Point] = []
        for survival in sorted(read, key=lambda survival: survival.delta_squared):
            size = math.sqrt(survival.delta_squared)
            if survival.kept is not None:
                self._kept.append((size, survival.kept))
            if survival.noise is not None:
                self._error.append((size, survival.noise * size))
            if survival.relative_size:
                self._base.append((size, size / survival.relative_size))
            if survival.gap_to_delta is not None:
                self._gap.append((size, survival.gap_to_delta * size))

    def survival(self, step: Step, size: float | None) -> Survival:
        """The survival of another weight of the kind.

        Args:
            size: ‖delta‖; None: as large as those that were read.
        """
        assert step.update is not None
        if size is None:
            size = self._mean_size
        kept = noise = gap_to_delta = None
        if size:
            kept = _interpolated(self._kept, size)
            noise = _divided(_interpolated(self._error, size), size)
            gap_to_delta = _divided(_interpolated(self._gap, size), size)
        return Survival(
            module=step.label,
            target=step.target,
            rounding=rounding_of(step),
            rank=step.update.rank,
            kept=kept,
            noise=noise,
            relative_size=_divided(size, _interpolated(self._base, size)),
            gap_to_delta=gap_to_delta,
            delta_squared=size**2,
        )


def _divided(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _interpolated(points: Sequence[Point], x: float) -> float | None:
    """Linear between the points, which are in the order of x, and constant beyond them; None without points."""
    if not points:
        return None
    i = bisect_left(points, (x, -math.inf))
    if i == 0:
        return points[0][1]
    if i == len(points):
        return points[-1][1]
    (low, low_value), (high, high_value) = points[i - 1], points[i]
    share = (x - low) / (high - low)
    return low_value + share * (high_value - low_value)
