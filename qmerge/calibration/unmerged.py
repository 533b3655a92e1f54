"""The base and the unmerged adapter model of a plan, with one decoder layer in memory at a time."""

from __future__ import annotations

from torch import Tensor

from qmerge.calibration.layered import LayeredModel, Values
from qmerge.planning.plan import Plan
from qmerge.types import Step
from qmerge.weights.context import RunContext
from qmerge.weights.values import unmerged_values


def steps_with_values(plan: Plan) -> dict[str, Step]:
    """Name → step of every weight that transformers loads as numbers.

    Left out are ``raw`` tensors (integers, …): they are copied, and no layer computes with them.
    """
    return {step.name: step for step in plan.steps if step.weight.format != "raw"}


def unmerged_model(plan: Plan, context: RunContext, *, with_delta: bool = True) -> tuple[LayeredModel, Values]:
    """A model without weights, and the values to load into it.

    Args:
        with_delta: the adapter model; without, the base.

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    steps = steps_with_values(plan)
    model = LayeredModel(plan.config, steps, context.device)

    def values(name: str) -> Tensor:
        return unmerged_values(steps[name], context, model.is_conv1d(name), with_delta)

    return model, values
