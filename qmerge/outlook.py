"""What is known before the first step: survival as predicted, which rounding is used and why, and the calibration text."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge import advice, plugins, provenance, texts, trained_base
from qmerge.adapters._updates import needs_dense
from qmerge.checkpoint import folder
from qmerge.errors import CheckpointError
from qmerge.generation import generated_tokens
from qmerge.layered import LayeredModel
from qmerge.pipeline import Bench
from qmerge.planning import Plan
from qmerge.predict import Survival, original_gap, predict
from qmerge.report.json import CalibrationRecord

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
class Outlook:
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
        lost = advice.warnings(judged, predicted=True) if judged else []
        about = [*input_warnings(plan), *trained_base.warnings(plan, self.predicted)]
        return [*about, *advice.onto(plan.recipe.merge_onto, self.original_gap), *lost]


def look_ahead(plan: Plan, bench: Bench, tell: Tell = lambda line: None) -> tuple[Plan, Outlook]:
    """Predict, settle ``auto``, and read the calibration text.

    Raises:
        RecipeError, CheckpointError: the calibration text cannot be used.
        AdapterError: the adapter's deltas show that it was trained on other weights.
    """
    trained_base.check(plan, bench)
    predicted = predict(plan, bench)
    plan, reason = settled(plan, predicted)
    repeats = any(
        needs_dense(step.update) for step in plan.merged if step.update
    )  # then the original is what was trained on
    gap = None if repeats else original_gap(plan, predicted, bench)
    notes: list[str] = []
    batches, record = None, None
    if any(step.rounding == "preserve" for step in plan.rounded):
        plan, batches, record = calibration_of(plan, bench, notes, tell)
    return plan, Outlook(predicted, reason, batches, record, tuple(notes), gap)


def settled(plan: Plan, predicted: Sequence[Survival]) -> tuple[Plan, str]:
    """The plan with a rounding for every merged weight, and why."""
    asked = plan.recipe.rounding
    if asked != "auto":
        return plan, "as asked"
    kept = {survival.module: 1.0 if survival.kept is None else survival.kept for survival in predicted}
    low = {module for module, share in kept.items() if share < NEAREST_IS_ENOUGH}
    fresh = {step.label for step in plan.merged if not step.keeps_grid}
    errors = {s.module: (s.noise or 0.0) * (s.relative_size or 0.0) for s in predicted if s.module in fresh}
    coarse = {module for module, error in errors.items() if error > FINE_ENOUGH}
    ordered = {step.label for step in plan.merged if getattr(step.options, "act_order", False) and not step.keeps_grid}
    chosen, least = low | coarse | ordered, min(kept.values(), default=1.0)
    reason = f"nearest rounding keeps {advice.percent(least)} or more of every weight's delta (predicted)"
    if chosen:
        enough = len(kept) - len(chosen)
        others = f"; {enough} of {len(kept)} weights keep enough and are rounded to nearest" if enough else ""
        reason = f"nearest rounding would keep only {advice.percent(least)} of a delta (predicted){others}"
        if not low and coarse:
            worst = advice.percent(max(errors.values()))
            reason = f"nearest rounding would change weights by {worst} of their size (predicted){others}"
    roundings = {step.name: "preserve" if step.label in chosen else "nearest" for step in plan.merged}
    return with_roundings(
        plan, {**roundings, **(dict.fromkeys(fresh_ones(plan), "preserve") if coarse or ordered else {})}
    ), reason


def fresh_ones(plan: Plan) -> list[str]:
    """Weights without an update that come onto a fresh quantized grid."""
    target = plugins.form(plan.recipe.target)
    return [
        step.name
        for step in plan.steps
        if step.action == "convert" and step.target == target.name and target.quant_method and not step.keeps_grid
    ]


def written_as(plan: Plan) -> list[str]:
    """How the target is written, where it could be otherwise."""
    target = plugins.form(plan.recipe.target)
    options = dict.fromkeys(step.options for step in plan.steps if step.target == target.name)
    described = " and ".join(filter(None, map(target.described, options)))
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
    plan: Plan, bench: Bench, notes: list[str], tell: Tell
) -> tuple[Plan, list[Tensor] | None, CalibrationRecord]:
    """Token batches for the recipe's ``calibration``; none where it says so, or where the default cannot be had."""
    recipe = plan.recipe
    source = recipe.calibration or "random"
    if source == "none":
        return plan, None, CalibrationRecord(source="none")
    try:
        LayeredModel(plan.config, (), bench.device)
    except CheckpointError as error:
        if recipe.calibration:
            raise
        notes.append(f"No calibration (as with --calibration none), because the model cannot be run: {error}")
        return plan, None, CalibrationRecord(source="none")
    length = min(recipe.sequence_length, longest(plan.config))
    batches = token_batches(source, plan, bench, length, tell)
    record = CalibrationRecord(
        source=source if source in ("random", "generate") else Path(source).name,
        tokens=sum(batch.numel() for batch in batches),
        sequence_length=length,
        sequential=recipe.sequential,
        sha256=digest(batches),
    )
    if not recipe.calibration:
        notes.append(BETTER_TEXT.format(text="0.004", random="0.007"))
    return plan, batches, record


def token_batches(source: str, plan: Plan, bench: Bench, length: int, tell: Tell) -> list[Tensor]:
    recipe, config = plan.recipe, plan.config
    if source == "random":
        return random_tokens(vocabulary(config), recipe.calibration_tokens, length, recipe.seed)
    if source == "generate":
        return generated_tokens(plan, bench, recipe.calibration_tokens, length, recipe.seed, tell)
    return texts.token_batches(
        texts.find(source), plan.inputs.tokenizer_folder, recipe.calibration_tokens, length, vocabulary(config)
    )


def random_tokens(vocabulary: int, tokens: int, length: int, seed: int) -> list[Tensor]:
    """int64 [sequences, length] each, uniform over the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, tokens // length)
    ids = torch.randint(0, vocabulary, (count, length), generator=generator)
    return texts.in_batches(ids)


def vocabulary(config: Mapping[str, Any]) -> int:
    """Number of token ids that the model knows."""
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not size:
        raise CheckpointError(
            "config.json has no vocab_size, so there are no random tokens; give a text: --calibration FILE"
        )
    return int(size)


def longest(config: Mapping[str, Any]) -> int:
    """Most tokens of a sequence (no limit where the config names none)."""
    text = {**config, **(config.get("text_config") or {})}
    return int(text.get("max_position_embeddings") or text.get("n_positions") or 2**20)


def digest(batches: Sequence[Tensor]) -> str:
    sha256 = hashlib.sha256()
    for batch in batches:
        sha256.update(f"{tuple(batch.shape)}".encode() + batch.contiguous().numpy().tobytes())
    return sha256.hexdigest()


def input_warnings(plan: Plan) -> list[str]:
    """What is odd about the inputs, but no error."""
    files = folder.side_files(plan.inputs.base.folder, plan.inputs.beside_adapter)
    tokens = folder.tokens_beyond(files.get("tokenizer.json"), plan.config)
    base, odd = plan.inputs.base, provenance.warnings(plan.inputs, plan.recipe)
    for name in base.formats():
        stored = [weight for weight in base.weights.values() if weight.format == name]
        odd += plugins.form(name).oddities(stored, base.quantization)
    written = [step for step in plan.steps if step.target == plan.recipe.target]
    for options in dict.fromkeys(step.options for step in written):
        shapes = {step.name: step.shape for step in written if step.options == options}
        odd += plugins.form(plan.recipe.target).cautions(options, shapes)
    return [*([tokens] if tokens else []), *odd]


def for_identity(outlook: Outlook) -> dict[str, Any]:
    """What a resumed run must share, of what is settled here."""
    return {"calibration": outlook.calibration.model_dump() if outlook.calibration else None}
