"""How far the 16-bit original of a quantized base is from it, in sizes of the delta."""

from __future__ import annotations

import math
from collections.abc import Iterable

from qmerge.forecast.kinds import READ_WEIGHTS, spread, weights_by_kind
from qmerge.forecast.predict import Survival
from qmerge.formats.base import Stored
from qmerge.planning.plan import Plan
from qmerge.types import Rows, Step
from qmerge.weights.context import RunContext
from qmerge.weights.rows import sampled_rows
from qmerge.weights.values import open_weight


def original_gap(plan: Plan, predicted: Iterable[Survival], context: RunContext) -> float | None:
    """‖original − dequantized‖ / ‖delta‖ over all merged weights, from some rows of some weights of each kind: the
    quantization error of the base, in sizes of the delta. None without an original, for a delta of zero, and for an adapter
    that is right on 16-bit values only: it is merged onto the original, and there is nothing to compare."""
    if plan.inputs.original is None:
        return None
    if any(step.update is not None and step.update.needs_dense for step in plan.merged):
        return None
    errors = 0.0
    deltas = sum(survival.delta_squared for survival in predicted)
    for steps in weights_by_kind(plan.merged).values():
        read = [steps[i] for i in spread(len(steps), READ_WEIGHTS)]
        errors += sum(_squared_error(step, plan, context) for step in read) * len(steps) / len(read)
    return math.sqrt(errors / deltas) if deltas else None


def _squared_error(step: Step, plan: Plan, context: RunContext) -> float:
    """‖original − dequantized‖² of one weight."""
    assert plan.inputs.original is not None
    # Not step.weight, which is the original's where the delta is added to that.
    quantized_weight = open_weight(plan.inputs.base.weights[step.name], step, context)
    original_weight = open_weight(plan.inputs.original.weights[step.name], step, context)
    groups = sampled_rows(step)
    sampled = sum(_squared_distance(original_weight, quantized_weight, rows) for rows in groups)
    return sampled * step.shape[0] / sum(map(len, groups))


def _squared_distance(a: Stored, b: Stored, rows: Rows) -> float:
    return float((a.values(rows) - b.values(rows)).double().square().sum())
