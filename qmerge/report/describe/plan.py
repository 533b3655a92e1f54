"""What a merge would do: every weight and its action, bytes, memory, disk, and predicted survival for every target."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from qmerge.adapters.combining.combined import CombinedUpdate
from qmerge.adapters.combining.interference import PairSums, sums_from_factors
from qmerge.base_check.declared import declared_warnings
from qmerge.base_check.deltas import check_deltas, delta_size_warnings
from qmerge.base_check.from_training import with_training
from qmerge.calibration.room import planned_memory
from qmerge.checkpoint import folder
from qmerge.forecast.calibration import tokens_of_source
from qmerge.forecast.kinds import predict_kinds
from qmerge.forecast.original import original_gap
from qmerge.forecast.predict import Survival
from qmerge.forecast.preflight import predicted_warnings, target_warnings, warnings_about_original
from qmerge.forecast.roundings import choose_roundings, rounding_names
from qmerge.forecast.targets import Candidate, all_candidates, resolve_auto
from qmerge.forecast.warnings import ANOTHER_MODEL, interference_warnings
from qmerge.planning.inputs import Inputs, read_inputs
from qmerge.planning.plan import Plan, make_run_context, plan_from, retargeted
from qmerge.recipe import Recipe
from qmerge.report.describe.model import describe_storage
from qmerge.report.describe.serving import describe_serving, first_choice
from qmerge.report.make import pair_records
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import PairRecord
from qmerge.types import Step
from qmerge.weights.context import compute_device


def describe_plan(recipe: Recipe, target_given: bool, served_with: str | None = None) -> dict[str, Any]:
    """The JSON of ``qmerge plan``. Reads headers, the adapter, and a few rows of some adapted weights.

    Args:
        recipe: the merge.
        target_given: False where ``recipe.target`` is only a default: then the targets are compared, and no weights listed.
        served_with: name of the program that will serve the model; then the targets are those that it loads.

    Raises:
        RecipeError, InputError: the merge is not possible.
    """
    if served_with and not target_given:
        recipe = retargeted(recipe, first_choice(served_with))  # a GGUF target is compared only where it is named
    with Reader() as reader:
        inputs = read_inputs(recipe, reader, headers_only=True)
        recipe, notes = with_training(recipe, inputs)
        candidates = all_candidates(recipe, inputs, reader)
        serve = None
        if served_with:
            serve = describe_serving(served_with, candidates, recipe.target if target_given else None)
        why = None
        if recipe.target == "auto":
            recipe, why = resolve_auto(recipe, inputs, candidates)
        plan = plan_from(recipe, inputs)
        pairs = _adapter_pairs(plan)
        context = make_run_context(plan, reader)
        check_deltas(plan, context)  # refuses an adapter of other weights, as a merge would
        described: dict[str, Any] = {
            "base": describe_storage(inputs.base_source, inputs.base),
            "adapter": _describe_adapters(inputs),
            "interference": [pair.model_dump() for pair in pairs],
            "targets": [
                _describe_candidate(candidate)
                for candidate in candidates
                if serve is None or candidate.target in (*serve["targets"], recipe.target)
            ],
            "serve": serve,
            "predicted_from": {
                "targets": max(candidate.read for candidate in candidates),
                "of": len(plan.merged),
            },
            "target": recipe.target if target_given else None,
            "why": why,
            "notes": notes,
            "warnings": declared_warnings(inputs, recipe) + interference_warnings(pairs, recipe.combine),
        }
        if target_given:
            prediction = predict_kinds(plan, context)
            predicted = prediction.survivals
            if recipe.rounding == "auto":
                plan, reason = choose_roundings(plan, predicted)
                described["notes"].append(f"Rounding {rounding_names(plan)}: {reason}.{_unpredicted(plan)}")
            described |= _describe_work(plan, predicted)
            described["predicted_from"]["weights"] = prediction.read
            relative_sizes = {survival.module: survival.relative_size for survival in predicted}
            described["warnings"] += target_warnings(plan)
            described["warnings"] += delta_size_warnings(plan, relative_sizes)
            gap = original_gap(plan, predicted, context)
            described["warnings"] += warnings_about_original(plan, gap)
            described["warnings"] += predicted_warnings(plan, predicted)
        elif recipe.original:
            described["warnings"].append(f"the adapter was trained on the quantized base. {ANOTHER_MODEL}")
        return described


def _unpredicted(plan: Plan) -> str:
    """A sentence about weights of which the numbers say what another rounding would keep."""
    if not plan.uses_preserve:
        return ""
    return " What preserve keeps is measured in the merge; the numbers here are those of nearest."


def _describe_candidate(candidate: Candidate) -> dict[str, Any]:
    """Size and predicted survival of one target; the reason for a target that is not possible."""
    if candidate.impossible is not None:
        return {"target": candidate.target, "impossible": candidate.impossible, "loaders": candidate.loaders}
    return {
        "target": candidate.target,
        "bytes_out": candidate.nbytes,
        "bits_per_weight": candidate.bits,
        "predicted_kept": candidate.kept,
        "predicted_noise": candidate.noise,
        "gap_to_delta": candidate.gap_to_delta,
        "keeps_grid": candidate.keeps_grid,
        "loaders": candidate.loaders,
    }


def _describe_adapters(inputs: Inputs) -> dict[str, Any]:
    updates = inputs.adapter.updates.values()
    return {
        "name": " + ".join(source.name for source in inputs.adapter_sources),
        "commit": inputs.adapter_source.commit,
        "kind": inputs.adapter.kind,
        "modules": len(updates),
        "ranks": sorted({update.rank for update in updates}),
    }


def _adapter_pairs(plan: Plan) -> list[PairRecord]:
    """How alike several adapters are, where their small factors tell (LoRA): the base is not read for it."""
    pairs_of_module: dict[str, PairSums] = {}
    for step in plan.merged:
        if isinstance(step.update, CombinedUpdate):
            pairs_of_module[step.label] = sums_from_factors(step.update)
    return pair_records([source.name for source in plan.inputs.adapter_sources], pairs_of_module)


def _describe_work(plan: Plan, predicted: list[Survival]) -> dict[str, Any]:
    """What the run reads, writes and needs, and every weight."""
    # Without a destination, the current folder's disk is a good guess.
    destination = Path(plan.recipe.out or plan.recipe.patch or ".").expanduser()
    free = folder.free_bytes(destination)
    needed = plan.bytes_out + folder.SLACK
    survivals = {survival.module: survival for survival in predicted}
    return {
        "actions": dict(Counter(step.action for step in plan.steps)),
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "shards": [shard.file for shard in plan.shards],
        "peak_memory": plan.peak_memory,
        "calibration_memory": _calibration_memory(plan),
        "disk_free": free,
        "disk_needed": needed,
        "enough_disk": free >= needed,
        "weights": [_describe_step(step, survivals.get(step.label)) for step in plan.steps],
    }


def _calibration_memory(plan: Plan) -> int:
    settings = plan.calibration
    if settings.source == "none":
        return 0
    tokens = tokens_of_source(settings.source, settings.tokens)
    needed, _ = planned_memory(plan, tokens, compute_device(plan.recipe.device))
    return needed


def _describe_step(step: Step, survival: Survival | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": step.name,
        "action": step.action,
        "from": step.weight.format,
        "to": step.target,
        "shape": list(step.shape),
        "rank": None,
        "keeps_grid": step.source.keeps_grid,
        "predicted_kept": None,
        "predicted_noise": None,
    }
    if step.update:
        assert survival is not None, "every merged weight has a prediction"
        described["rank"] = step.update.rank
        described["predicted_kept"] = survival.kept
        described["predicted_noise"] = survival.noise
    return described
