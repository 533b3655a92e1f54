"""``--promote``: keep the weights that survive worst dense, as far as a budget of bytes goes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qmerge.forecast.preflight import run_preflight
from qmerge.formats import get_format
from qmerge.metrics.base import Sums
from qmerge.pipeline import Outcome
from qmerge.planning.plan import Plan, output_bytes, plan_from
from qmerge.progress import Progress
from qmerge.recipe import Recipe, parse_size
from qmerge.run.destinations import MeasureOnly
from qmerge.run.walk import run_steps
from qmerge.types import DENSE_FORMATS, TORCH_DTYPES, Step
from qmerge.weights.context import RunContext


def plan_with_promoted(recipe: Recipe, plan: Plan, context: RunContext, progress: Progress) -> Plan:
    """Measure the plan without writing, then plan again with the worst weights in the model's own dtype.

    The worst weights are those that lose most for each byte that they would take more.
    """
    assert recipe.promote is not None
    outcomes = _rehearse(recipe, plan, context, progress)
    dense_format = DENSE_FORMATS[plan.inputs.base.dtype]
    losses: dict[str, float] = {}
    costs: dict[str, int] = {}
    for step in plan.merged:
        losses[step.name] = output_error(outcomes[step.name].sums)
        costs[step.name] = extra_bytes(step, dense_format)
    chosen = choose_within_budget(losses, costs, budget=parse_size(recipe.promote))
    spent = sum(costs[name] for name in chosen)
    progress.note(f"Promoted to {dense_format}: {len(chosen)} of {len(losses)} weights, {spent / 1e6:.1f} MB more.")
    return plan_from(recipe, plan.inputs, frozenset(chosen))


def _rehearse(recipe: Recipe, plan: Plan, context: RunContext, progress: Progress) -> dict[str, Outcome]:
    """What the plan would do to every merged weight."""
    plan, preflight = run_preflight(plan, context, rounding=recipe.rounding)
    destination = MeasureOnly(context, plan.workers, progress)
    destination.start_stage("measuring which weights survive worst", plan.rounded)
    try:
        run_steps(plan, plan.rounded, destination, preflight.tokens)
    finally:
        progress.end()
    return destination.outcomes


def choose_within_budget(losses: Mapping[str, float], costs: Mapping[str, int], budget: int) -> list[str]:
    """Names with the largest loss per byte whose costs fit into the budget together; greedy, the worst first."""
    chosen: list[str] = []
    for name in sorted(losses, key=lambda name: -losses[name] / max(1, costs[name])):
        # A weight that is dense already costs nothing, and gains nothing.
        if 0 < costs[name] <= budget and losses[name] > 0:
            chosen.append(name)
            budget -= costs[name]
    return chosen


def output_error(sums: Sums) -> float:
    """‖error‖² of the layer's output; of the weight, where calibration did not see its inputs."""
    error = sums["output_noise"].get("error_error")
    if error is None:
        error = sums["noise"]["error_error"]
    return float(error)


def extra_bytes(step: Step, dense_format: str) -> int:
    """Bytes that a weight takes more in a dense format than as planned."""
    dtype = get_format(dense_format).info.dense_dtype
    assert dtype is not None
    return TORCH_DTYPES[dtype].itemsize * math.prod(step.shape) - output_bytes(step)
