"""Runs the steps of a plan, in the order that calibration asks for."""

from __future__ import annotations

from collections.abc import Sequence

from qmerge.calibration.statistics import CalibrationPass
from qmerge.calibration.texts import CalibrationTokens
from qmerge.planning.plan import Plan
from qmerge.run.destinations import Destination
from qmerge.schema import FidelityRecord
from qmerge.types import Step


def run_steps(
    plan: Plan, steps: Sequence[Step], destination: Destination, tokens: CalibrationTokens | None
) -> FidelityRecord | None:
    """Run every step once: first those that need no calibration, then the others group by group as calibration reaches
    them.

    Args:
        steps: all steps of the plan, those that a measurement needs, or those of one part of a run.
        tokens: to calibrate on; None without calibration.

    Returns:
        Fidelity of the merged model on the tokens that calibration held out; None without any.
    """
    others = list(steps)
    if tokens is not None:
        others = [step for step in steps if step.rounding != "preserve"]
    # These do not depend on what calibration sees, nor does it depend on the order in which they are done.
    destination.run(others, {})
    fidelity = None
    if tokens is not None and len(others) < len(steps):
        calibration = CalibrationPass(
            plan,
            destination.context,
            tokens,
            stored_values=destination.stored,
            report_progress=destination.progress.report,
        )
        for group in calibration.groups():
            destination.run(group.steps, group.statistics)
        fidelity = calibration.fidelity
    merged = {step.name for step in steps if step.action == "merge"}
    assert destination.outcomes.keys() == merged, "planned and applied updates differ"
    return fidelity
