"""What is known before the first step: predicted survival, the roundings and why, calibration tokens, warnings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qmerge.base_check.declared import declared_warnings
from qmerge.base_check.deltas import check_deltas, delta_size_warnings
from qmerge.checkpoint import folder
from qmerge.forecast.calibration import Calibration, prepare_calibration
from qmerge.forecast.predict import Survival, original_gap, predict
from qmerge.forecast.roundings import choose_roundings, rounding_names
from qmerge.forecast.warnings import original_warnings, survival_warnings
from qmerge.formats import get_format, get_target
from qmerge.planning.plan import Plan
from qmerge.schema import CalibrationRecord
from qmerge.weights.context import RunContext


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What is known before the first step.

    predicted        survival of every merged weight, by nearest rounding (by stochastic rounding where the recipe names it)
    rounding_reason  why the plan has its roundings
    original_gap     ‖original − dequantized‖ / ‖delta‖; None without an original
    batches          token ids to calibrate on, int64 [sequences, length] each; None without calibration
    calibration      what the report contains about the calibration; None where no weight is rounded with ``preserve``
    notes            what the user should know, a line each
    """

    predicted: list[Survival]
    rounding_reason: str
    original_gap: float | None
    batches: list[Tensor] | None
    calibration: CalibrationRecord | None
    notes: tuple[str, ...]

    def warnings(self, plan: Plan) -> list[str]:
        """The warnings that need no run, a line each. ``preserve`` is judged by what it did, when the run is done."""
        sizes = {survival.module: survival.relative_size for survival in self.predicted}
        lines = input_warnings(plan)
        lines += delta_size_warnings(plan, sizes)
        lines += original_warnings(plan.merge_onto, self.original_gap)
        preserved = {step.label for step in plan.merged if step.rounding == "preserve"}
        others = [survival for survival in self.predicted if survival.module not in preserved]
        if others:
            lines += survival_warnings(others, predicted=True)
        return lines


def _show_nothing(_: str) -> None:
    pass


def run_preflight(
    plan: Plan, context: RunContext, *, rounding: str, report_progress: Callable[[str], None] = _show_nothing
) -> tuple[Plan, Preflight]:
    """Check the adapter against the base, predict survival, settle ``auto``, and get the calibration tokens.

    Args:
        rounding: the recipe's: ``auto``, or the name of a rounding.
        report_progress: called with a line while tokens are generated.

    Returns:
        The plan with a rounding for every weight, and what is known.

    Raises:
        RecipeError, CheckpointError: the calibration text cannot be used.
        AdapterError: the adapter's deltas show that it was trained on other weights.
    """
    check_deltas(plan, context)
    predicted = predict(plan, context)
    notes = target_notes(plan)
    reason = "as asked"
    if rounding == "auto":
        plan, reason = choose_roundings(plan, predicted)
        notes.append(f"Rounding {rounding_names(plan)}: {reason}.")
    calibration: Calibration | None = None
    if any(step.rounding == "preserve" for step in plan.rounded):
        calibration = prepare_calibration(plan, context, report_progress)
        if calibration.note:
            notes.append(calibration.note)
    return plan, Preflight(
        predicted=predicted,
        rounding_reason=reason,
        original_gap=None if _needs_original(plan) else original_gap(plan, predicted, context),
        batches=calibration.batches if calibration else None,
        calibration=calibration.record if calibration else None,
        notes=tuple(notes),
    )


def _needs_original(plan: Plan) -> bool:
    """Whether the adapter is right on 16-bit values only. Then nothing is gained from a comparison with the original."""
    return any(step.update is not None and step.update.needs_dense for step in plan.merged)


def target_notes(plan: Plan) -> list[str]:
    """How the target is written, where it could be written in other ways."""
    target = get_target(plan.target)
    options_used = dict.fromkeys(step.options for step in plan.steps if step.target == target.name)
    descriptions = [target.describe_options(options) for options in options_used]
    text = " and ".join(description for description in descriptions if description)
    return [f"Target {target.name}: {text}."] if text else []


def input_warnings(plan: Plan) -> list[str]:
    """Warnings about the base, the adapter and the target, a line each."""
    base = plan.inputs.base
    lines: list[str] = []
    files = folder.side_files(base.folder, plan.inputs.adapter_files_folder)
    tokenizer = folder.tokenizer_warning(files.get("tokenizer.json"), plan.config)
    if tokenizer:
        lines.append(tokenizer)
    lines += declared_warnings(plan.inputs, plan.recipe)
    for name in base.formats():
        stored = [weight for weight in base.weights.values() if weight.format == name]
        lines += get_format(name).base_warnings(stored, base.quantization)
    written = [step for step in plan.steps if step.target == plan.target]
    for options in dict.fromkeys(step.options for step in written):
        shapes = {step.name: step.shape for step in written if step.options == options}
        lines += get_target(plan.target).target_warnings(options, shapes)
    return lines
