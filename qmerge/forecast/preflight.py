"""What is known before the first step: survival as predicted, which rounding is used and why, and the calibration text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qmerge.base_check.declared import declared_warnings
from qmerge.base_check.deltas import check_deltas, delta_size_warnings
from qmerge.calibration import texts
from qmerge.calibration.generate import generate_tokens
from qmerge.calibration.layered import LayeredModel
from qmerge.checkpoint import folder
from qmerge.errors import CheckpointError
from qmerge.forecast.predict import Survival, original_gap, predict
from qmerge.forecast.warnings import original_warnings, survival_warnings
from qmerge.formats import get_format, get_target
from qmerge.planning.plan import Plan
from qmerge.schema import CalibrationRecord
from qmerge.weights.context import RunContext
from qmerge.wording import percent

NEAREST_IS_ENOUGH, FINE_ENOUGH = 0.95, 0.015
"""``auto`` takes nearest rounding for a weight that keeps so much of its delta, and, where the weight comes onto a fresh
grid, whose rounding error is no larger than this against the weight (int8 has about 0.01, 4 bits 0.1)."""

Tell = Callable[[str], None]
"""Is told how far the work is."""

BETTER_TEXT = (
    "Calibrated on random tokens. Text like that of your training is better: --calibration train.jsonl "
    "(on a small test model, KL ratio {text} instead of {random})."
)


@dataclass(frozen=True)
class Preflight:
    """``predicted``: survival by nearest rounding (by the rounding that was asked for, where it has a closed form).
    ``reason``: why this rounding. ``batches``: token ids to calibrate on, int64 [sequences, length] each."""

    predicted: list[Survival]
    reason: str
    batches: list[Tensor] | None
    calibration: CalibrationRecord | None
    notes: tuple[str, ...]
    original_gap: float | None = None

    def says(self, plan: Plan) -> list[str]:
        """Which rounding and why, where it was not asked for; and what would be better."""
        chosen = [] if plan.recipe.rounding != "auto" else [f"Rounding {rounding_name(plan)}: {self.reason}."]
        return [*written_as(plan), *chosen, *self.notes]

    def warnings(self, plan: Plan) -> list[str]:
        """What to say before the run starts; ``preserve`` is judged when it is done."""
        preserved = {step.label for step in plan.merged if step.rounding == "preserve"}
        judged = [survival for survival in self.predicted if survival.module not in preserved]
        lost = survival_warnings(judged, predicted=True) if judged else []
        about = [*input_warnings(plan), *delta_size_warnings(plan, {s.module: s.relative_size for s in self.predicted})]
        return [*about, *original_warnings(plan.recipe.merge_onto, self.original_gap), *lost]


def run_preflight(plan: Plan, context: RunContext, tell: Tell = lambda line: None) -> tuple[Plan, Preflight]:
    """Predict, settle ``auto``, and read the calibration text.

    Raises:
        RecipeError, CheckpointError: the calibration text cannot be used.
        AdapterError: the adapter's deltas show that it was trained on other weights.
    """
    check_deltas(plan, context)
    predicted = predict(plan, context)
    plan, reason = settled(plan, predicted)
    repeats = any(
        step.update.needs_dense for step in plan.merged if step.update
    )  # then the original is what was trained on
    gap = None if repeats else original_gap(plan, predicted, context)
    notes: list[str] = []
    batches, record = None, None
    if any(step.rounding == "preserve" for step in plan.rounded):
        plan, batches, record = calibration_of(plan, context, notes, tell)
    return plan, Preflight(predicted, reason, batches, record, tuple(notes), gap)


def settled(plan: Plan, predicted: Sequence[Survival]) -> tuple[Plan, str]:
    """The plan with a rounding for every merged weight, and why."""
    asked = plan.recipe.rounding
    if asked != "auto":
        return plan, "as asked"
    kept = {survival.module: 1.0 if survival.kept is None else survival.kept for survival in predicted}
    low = {module for module, share in kept.items() if share < NEAREST_IS_ENOUGH}
    fresh = {step.label for step in plan.merged if not step.source.keeps_grid}
    errors = {s.module: (s.noise or 0.0) * (s.relative_size or 0.0) for s in predicted if s.module in fresh}
    coarse = {module for module, error in errors.items() if error > FINE_ENOUGH}
    ordered = {
        step.label for step in plan.merged if getattr(step.options, "act_order", False) and not step.source.keeps_grid
    }
    chosen, least = low | coarse | ordered, min(kept.values(), default=1.0)
    reason = f"nearest rounding keeps {percent(least)} or more of every weight's delta (predicted)"
    if chosen:
        enough = len(kept) - len(chosen)
        others = f"; {enough} of {len(kept)} weights keep enough and are rounded to nearest" if enough else ""
        reason = f"nearest rounding would keep only {percent(least)} of a delta (predicted){others}"
        if not low and coarse:
            worst = percent(max(errors.values()))
            reason = f"nearest rounding would change weights by {worst} of their size (predicted){others}"
    roundings = {step.name: "preserve" if step.label in chosen else "nearest" for step in plan.merged}
    return with_roundings(
        plan, {**roundings, **(dict.fromkeys(fresh_ones(plan), "preserve") if coarse or ordered else {})}
    ), reason


def fresh_ones(plan: Plan) -> list[str]:
    """Weights without an update that come onto a fresh quantized grid."""
    target = get_target(plan.recipe.target)
    return [
        step.name
        for step in plan.steps
        if step.action == "convert"
        and step.target == target.name
        and target.info.is_quantized
        and not step.source.keeps_grid
    ]


def written_as(plan: Plan) -> list[str]:
    """How the target is written, where it could be otherwise."""
    target = get_target(plan.recipe.target)
    options = dict.fromkeys(step.options for step in plan.steps if step.target == target.name)
    described = " and ".join(filter(None, map(target.describe_options, options)))
    return [f"Target {target.name}: {described}."] if described else []


def with_roundings(plan: Plan, roundings: Mapping[str, str]) -> Plan:
    steps = {step.name: replace(step, rounding=roundings.get(step.name, step.rounding)) for step in plan.steps}
    shards = tuple(replace(shard, steps=tuple(steps[step.name] for step in shard.steps)) for shard in plan.shards)
    return replace(plan, steps=tuple(steps.values()), shards=shards)


def rounding_name(plan: Plan) -> str:
    """``preserve``, or ``preserve and nearest``: what the merged weights are rounded with."""
    names = Counter(step.rounding for step in plan.merged)
    return " and ".join(name for name, _ in names.most_common())


def calibration_of(
    plan: Plan, context: RunContext, notes: list[str], tell: Tell
) -> tuple[Plan, list[Tensor] | None, CalibrationRecord]:
    """Token batches for the recipe's ``calibration``; none where it says so, or where the default cannot be had."""
    recipe = plan.recipe
    source = recipe.calibration or "random"
    if source == "none":
        return plan, None, CalibrationRecord(source="none")
    try:
        LayeredModel(plan.config, (), context.device)
    except CheckpointError as error:
        if recipe.calibration:
            raise
        notes.append(f"No calibration (as with --calibration none), because the model cannot be run: {error}")
        return plan, None, CalibrationRecord(source="none")
    length = min(recipe.sequence_length, texts.max_sequence_length(plan.config))
    batches = token_batches(source, plan, context, length, tell)
    record = CalibrationRecord(
        source=source if source in ("random", "generate") else Path(source).name,
        tokens=sum(batch.numel() for batch in batches),
        sequence_length=length,
        sequential=recipe.sequential,
        sha256=texts.batches_sha256(batches),
    )
    if not recipe.calibration:
        notes.append(BETTER_TEXT.format(text="0.004", random="0.007"))
    return plan, batches, record


def token_batches(source: str, plan: Plan, context: RunContext, length: int, tell: Tell) -> list[Tensor]:
    recipe, config = plan.recipe, plan.config
    if source == "random":
        return texts.random_tokens(
            texts.vocab_size(config), tokens=recipe.calibration_tokens, length=length, seed=recipe.seed
        )
    if source == "generate":
        return generate_tokens(
            plan, context, tokens=recipe.calibration_tokens, length=length, seed=recipe.seed, report_progress=tell
        )
    return texts.token_batches(
        texts.find_text(source),
        plan.inputs.tokenizer_folder,
        tokens=recipe.calibration_tokens,
        length=length,
        vocab_size=texts.vocab_size(config),
    )


def input_warnings(plan: Plan) -> list[str]:
    """What is odd about the inputs, but no error."""
    files = folder.side_files(plan.inputs.base.folder, plan.inputs.adapter_files_folder)
    tokens = folder.tokenizer_warning(files.get("tokenizer.json"), plan.config)
    base, odd = plan.inputs.base, declared_warnings(plan.inputs, plan.recipe)
    for name in base.formats():
        stored = [weight for weight in base.weights.values() if weight.format == name]
        odd += get_format(name).base_warnings(stored, base.quantization)
    written = [step for step in plan.steps if step.target == plan.recipe.target]
    for options in dict.fromkeys(step.options for step in written):
        shapes = {step.name: step.shape for step in written if step.options == options}
        odd += get_target(plan.recipe.target).target_warnings(options, shapes)
    return [*([tokens] if tokens else []), *odd]


def for_identity(outlook: Preflight) -> dict[str, Any]:
    """What a resumed run must share, of what is settled here."""
    return {"calibration": outlook.calibration.model_dump() if outlook.calibration else None}
