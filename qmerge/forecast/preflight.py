"""What is known before the first step: predicted survival, the roundings and why, calibration tokens, warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qmerge.base_check.declared import declared_warnings
from qmerge.base_check.deltas import check_deltas, delta_size_warnings
from qmerge.calibration.texts import CalibrationTokens, is_of_user
from qmerge.checkpoint import folder
from qmerge.checkpoint.consistency import config_problem, tokenizer_problem
from qmerge.errors import RecipeError
from qmerge.forecast.calibration import NO_CALIBRATION, prepare_calibration
from qmerge.forecast.kinds import predict_kinds
from qmerge.forecast.original import original_gap
from qmerge.forecast.predict import Survival
from qmerge.forecast.roundings import choose_roundings, is_settled, rounding_names, without_calibration
from qmerge.forecast.warnings import original_warnings, survival_warnings
from qmerge.formats import get_format, get_target
from qmerge.planning.modules import dense_expert_steps
from qmerge.planning.plan import Plan, output_bytes
from qmerge.schema import CalibrationRecord
from qmerge.types import Options
from qmerge.weights.context import RunContext
from qmerge.weights.parallel import one_torch_thread
from qmerge.wording import percent, size_text


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What is known before the first step.

    predicted        survival of every merged weight, by nearest rounding (by stochastic, where the recipe names it)
    rounding_reason  why the plan has its roundings
    original_gap     ‖original − dequantized‖ / ‖delta‖; None without an original
    tokens           what to calibrate on; None without calibration
    calibration      what the report contains about the calibration; None where no weight is rounded with ``preserve``
    notes            what the user should know, a line each
    uncalibrated     warning about a calibration that is not possible; empty where it is, or is not needed
    """

    predicted: list[Survival]
    rounding_reason: str
    original_gap: float | None
    tokens: CalibrationTokens | None
    calibration: CalibrationRecord | None
    notes: tuple[str, ...]
    uncalibrated: str = ""

    def warnings(self, plan: Plan) -> list[str]:
        """The warnings that need no run, a line each. ``preserve`` is judged by what it did, when the run is done."""
        sizes: dict[str, float | None] = {}
        for survival in self.predicted:
            sizes[survival.module] = survival.relative_size
        lines = input_warnings(plan)
        lines += delta_size_warnings(plan, sizes)
        lines += warnings_about_original(plan, self.original_gap)
        if self.uncalibrated:
            lines.append(self.uncalibrated)
        return [*lines, *predicted_warnings(plan, self.predicted)]


def predicted_warnings(plan: Plan, predicted: Sequence[Survival]) -> list[str]:
    """What the weights will lose, of those whose rounding can be predicted.

    Predictions are about nearest rounding, or about stochastic where the recipe names it: they mean nothing for other weights.
    """
    rounding_of = {step.label: step.rounding for step in plan.merged}
    told = {"nearest", plan.recipe.rounding} - {"preserve"}
    found = [survival for survival in predicted if rounding_of[survival.module] in told]
    return survival_warnings(found, predicted=True) if found else []


def _show_nothing(_: str) -> None:
    pass


def run_preflight(
    plan: Plan,
    context: RunContext,
    *,
    rounding: str,
    may_calibrate: bool = True,
    report_progress: Callable[[str], None] = _show_nothing,
) -> tuple[Plan, Preflight]:
    """Check the adapter against the base, predict survival, settle ``auto``, and get the calibration tokens.

    Args:
        rounding: the recipe's: ``auto``, or the name of a rounding.
        may_calibrate: False for a run in parts, whose processes do not see each other's layers.
        report_progress: called with a line while tokens are generated.

    Returns:
        The plan with a rounding for every weight, and what is known.

    Raises:
        RecipeError, CheckpointError: the calibration text cannot be used, or a run in parts would need one.
        AdapterError: the adapter's deltas show that it was trained on other weights.
    """
    # A wrong base is an error, which comes before the predictions for it.
    with one_torch_thread():  # for samples, more threads only wait for one another
        check_deltas(plan, context)
        # Only auto chooses by the prediction, weight by weight.
        settled = is_settled if rounding == "auto" else None
        predicted = predict_kinds(plan, context, is_settled=settled).survivals
    notes = target_notes(plan)
    reason = "as asked"
    if rounding == "auto":
        plan, reason = choose_roundings(plan, predicted)
    calibration = NO_CALIBRATION
    if plan.uses_preserve:
        if not may_calibrate and plan.calibration.source != "none":
            raise RecipeError(
                "add --rounding stochastic or --calibration none, or merge in one process: preserve with calibration cannot be "
                f"done in parts (--shard, --workers ray), and rounding {rounding} takes it here"
            )
        calibration = prepare_calibration(plan, context, report_progress)
        if rounding == "auto" and calibration.tokens is None:
            plan, reason = without_calibration(plan, reason)
    if rounding == "auto":
        notes.append(f"Rounding {rounding_names(plan)}: {reason}.")
    if calibration.note:
        notes.append(calibration.note)
    gap = original_gap(plan, predicted, context)
    return plan, Preflight(
        predicted=predicted,
        rounding_reason=reason,
        original_gap=gap,
        tokens=calibration.tokens,
        calibration=calibration.record,
        notes=tuple(notes),
        uncalibrated=calibration.warning,
    )


def warnings_about_original(plan: Plan, gap: float | None) -> list[str]:
    """The price of the base that the plan merges onto, where its original is known (``original_warnings``)."""
    # An adapter that is right on 16-bit values only has no other base to be merged onto.
    if any(step.update is not None and step.update.needs_dense for step in plan.merged):
        return []
    return original_warnings(
        plan.merge_onto,
        gap,
        dense_target=get_target(plan.target).info.is_dense,
        trained_on=plan.recipe.trained_on,
    )


def target_notes(plan: Plan) -> list[str]:
    """How the target is written, where it could be written in other ways."""
    target = get_target(plan.target)
    written = [step for step in plan.steps if step.target == plan.target]
    descriptions = Counter(target.describe_options(step.options) for step in written)
    # Most formats have one way to be written, and describe nothing.
    text = " and ".join(filter(None, descriptions))
    if target.info.container:  # a mix of types
        text = ", ".join(f"{count} {description}" for description, count in descriptions.most_common())
    return [f"Target {target.name}: {text}."] if text else []


def _options_used(plan: Plan) -> list[Options]:
    """The options of the weights that are stored in the target format, each once."""
    return list(dict.fromkeys(step.options for step in plan.steps if step.target == plan.target))


def input_warnings(plan: Plan) -> list[str]:
    """Warnings about the base, the adapter and the target, a line each."""
    base = plan.inputs.base
    lines: list[str] = []
    files = folder.side_files(base.folder, plan.inputs.adapter_files_folder)
    tokenizer = folder.tokenizer_warning(files.get("tokenizer.json"), plan.config)
    if tokenizer:
        lines.append(tokenizer)
    # Merged all the same: a user may add the files later.
    missing = tokenizer_problem(files, plan.config)
    if missing:
        lines.append(
            f"neither the base nor the adapter has a tokenizer, {missing} into the base's folder, and merge again"
        )
    problem = config_problem(base.config, base.weights)
    if problem is not None:
        lines.append(
            f"the base's config.json does not fit its tensors: {problem}. Loaders will refuse the merged model, or fill it with "
            f"random numbers: use the config.json that belongs to these files"
        )
    lines += declared_warnings(plan.inputs, plan.recipe)
    for name in base.formats():
        stored = [weight for weight in base.weights.values() if weight.format == name]
        lines += get_format(name).base_warnings(stored, base.quantization)
    if _is_judged_on_its_calibration(plan):
        text = Path(str(plan.recipe.verify)).name
        lines.append(
            f"--verify and --calibration are the same file ({text}): the model is judged on text that "
            f"rounding was fitted to, so the numbers flatter. Give another text, or leave out --verify: then a part is kept apart"
        )
    return lines + target_warnings(plan)


def _is_judged_on_its_calibration(plan: Plan) -> bool:
    recipe = plan.recipe
    if not (plan.uses_preserve and recipe.verify and is_of_user(recipe.calibration)):
        return False
    verify, calibration = (Path(str(text)).expanduser() for text in (recipe.verify, recipe.calibration))
    return calibration.is_file() and verify.exists() and verify.samefile(calibration)


def target_warnings(plan: Plan) -> list[str]:
    """Warnings about the target and how it is written, a line each."""
    lines: list[str] = []
    target = get_target(plan.target)
    for options in _options_used(plan):
        shapes: dict[str, tuple[int, int]] = {}
        for step in plan.steps:
            if step.target == plan.target and step.options == options:
                shapes[step.name] = step.shape
        lines += target.target_warnings(options, shapes)
    return lines + dense_expert_warnings(plan)


def dense_expert_warnings(plan: Plan) -> list[str]:
    """How much of the model are experts that stay dense, and why, where the target is quantized."""
    target = get_target(plan.target)
    dense = [step for step in dense_expert_steps(plan.steps, target) if step.name not in plan.promoted]
    if not dense:
        return []
    reasons = []
    if any(len(step.weight.shape) == 3 for step in dense):
        reasons.append(f"{target.name} stores matrices, and these experts are stacks")
    if any(len(step.weight.shape) == 2 for step in dense):
        reasons.append(target.info.experts_problem or "they are dense in the base")
    nbytes = sum(output_bytes(step) for step in dense)
    share = percent(nbytes / plan.bytes_out)
    return [
        f"{len(dense)} weights of experts stay dense, {share} of the model's {size_text(plan.bytes_out)}: {'; '.join(reasons)}"
    ]
