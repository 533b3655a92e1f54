"""`qmerge plan`: every weight and its action, bytes, memory, disk, and predicted survival for every target."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from qmerge.adapters.combining.combined import CombinedUpdate
from qmerge.adapters.combining.interference import from_factors
from qmerge.base_check.declared import declared_warnings
from qmerge.base_check.deltas import check_deltas, delta_size_warnings
from qmerge.checkpoint import folder
from qmerge.checkpoint.scan import Checkpoint
from qmerge.forecast.predict import Survival, predict
from qmerge.forecast.targets import Candidate, all_candidates, resolve_auto
from qmerge.forecast.warnings import interference_warnings, survival_warnings
from qmerge.hub import Source
from qmerge.planning.inputs import Inputs, read_inputs
from qmerge.planning.plan import Plan, make_run_context, plan_from
from qmerge.recipe import Recipe
from qmerge.report.make import pair_records
from qmerge.report.terminal import err, out, pair_line, printable, readers, share, size_text, times
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import PairRecord


def describe(recipe: Recipe, target_given: bool) -> dict[str, Any]:
    """The plan as data: reads headers, the adapter, and a few rows of each adapted weight."""
    with Reader() as reader:
        inputs = read_inputs(recipe, reader)
        targets = [describe_target(found) for found in all_candidates(recipe, inputs, reader)]
        why = None
        if recipe.target == "auto":
            recipe, why = resolve_auto(recipe, inputs, reader)
        plan = plan_from(recipe, inputs)
        pairs = meeting(plan)
        context = make_run_context(plan, reader)
        check_deltas(plan, context)
        described: dict[str, Any] = {
            "base": describe_base(inputs.base_source, inputs.base),
            "adapter": describe_adapter(inputs),
            "interference": [pair.model_dump() for pair in pairs],
            "targets": targets,
            "target": recipe.target if target_given else None,
            "why": why,
            "warnings": declared_warnings(inputs, recipe) + interference_warnings(pairs, recipe.combine),
        }
        if target_given:
            predicted = predict(plan, context)
            described |= describe_plan(plan, predicted)
            described["warnings"] += delta_size_warnings(
                plan, {s.module: s.relative_size for s in predicted}
            ) + survival_warnings(predicted, predicted=True)
        return described


def describe_target(found: Candidate) -> dict[str, Any]:
    """Size and predicted survival of one target; a target that is not possible says why."""
    if found.impossible is not None:
        return {"target": found.target, "impossible": found.impossible, "loaders": found.loaders}
    return {
        "target": found.target,
        "bytes_out": found.nbytes,
        "bits_per_weight": found.bits,
        "predicted_kept": found.kept,
        "predicted_noise": found.noise,
        "gap_to_delta": found.gap_to_delta,
        "keeps_grid": found.keeps_grid,
        "loaders": found.loaders,
    }


def describe_base(source: Source, base: Checkpoint) -> dict[str, Any]:
    return {
        "name": source.name,
        "commit": source.commit,
        "formats": base.formats(),
        "bytes": sum(weight.nbytes for weight in base.weights.values()),
    }


def describe_adapter(inputs: Inputs) -> dict[str, Any]:
    updates = inputs.adapter.updates.values()
    return {
        "name": " + ".join(source.name for source in inputs.adapter_sources),
        "commit": inputs.adapter_source.commit,
        "kind": inputs.adapter.kind,
        "modules": len(updates),
        "ranks": sorted({update.rank for update in updates}),
    }


def meeting(plan: Plan) -> list[PairRecord]:
    """How several adapters get along, where their small factors tell (LoRA); no base is read for it."""
    found = {step.label: step.update for step in plan.merged if isinstance(step.update, CombinedUpdate)}
    names = [source.name for source in plan.inputs.adapter_sources]
    return pair_records(names, {module: from_factors(update) for module, update in found.items()})


def describe_plan(plan: Plan, predicted: list[Survival]) -> dict[str, Any]:
    where = Path(plan.recipe.out or plan.recipe.patch or ".").expanduser()
    free = folder.free_bytes(where)
    survivals = {s.module: s for s in predicted}
    return {
        "actions": dict(Counter(step.action for step in plan.steps)),
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "shards": [shard.file for shard in plan.shards],
        "peak_memory": plan.peak_memory,
        "disk_free": free,
        "disk_needed": plan.bytes_out + folder.SLACK,
        "enough_disk": free >= plan.bytes_out + folder.SLACK,
        "weights": [
            {
                "name": step.name,
                "action": step.action,
                "from": step.weight.format,
                "to": step.target,
                "shape": list(step.shape),
                "rank": step.update.rank if step.update else None,
                "keeps_grid": step.source.keeps_grid,
                "predicted_kept": survivals[step.label].kept if step.update else None,
                "predicted_noise": survivals[step.label].noise if step.update else None,
            }
            for step in plan.steps
        ],
    }


def show(described: dict[str, Any], all_weights: bool) -> None:
    """The plan for people: on stdout, warnings on stderr."""
    base, adapter, console = described["base"], described["adapter"], out()
    formats = ", ".join(f"{count} {name}" for name, count in base["formats"].items())
    ranks = ", ".join(map(str, adapter["ranks"]))
    console.print(f"base     {name_of(base)}: {size_text(base['bytes'])}; weights: {formats}")
    console.print(f"adapter  {name_of(adapter)}: {adapter['kind']}, {adapter['modules']} modules, rank {ranks}")
    for pair in described["interference"]:
        console.print(escape(printable(pair_line(PairRecord(**pair)))))
    if described["why"]:
        console.print(escape(printable(described["why"])))
    if described["target"]:
        show_plan(described, all_weights)
    console.print(targets_table(described["targets"]))
    for target in described["targets"]:
        if "impossible" in target:
            console.print(escape(printable(f"{target['target']}: not possible: {target['impossible']}")))
    for line in described["warnings"]:
        err().print(f"[yellow]warning:[/yellow] {escape(printable(line))}")


def name_of(described: dict[str, Any]) -> str:
    commit = f" at {described['commit'][:12]}" if described["commit"] else ""
    return escape(printable(f"{described['name']}{commit}"))


def show_plan(described: dict[str, Any], all_weights: bool) -> None:
    actions = ", ".join(f"{count} {action}" for action, count in described["actions"].items())
    room = "enough" if described["enough_disk"] else "NOT ENOUGH"
    written = f"writes {size_text(described['bytes_out'])} in {len(described['shards'])} file(s)"
    lines = [
        f"target   {described['target']}: {actions}",
        f"disk     reads {size_text(described['bytes_in'])}, {written}; {size_text(described['disk_free'])} free: {room}",
        f"memory   {size_text(described['peak_memory'])} for the weights being worked on, about 0.6 GB for the libraries",
    ]
    out().print("\n".join(lines))
    if all_weights:
        for weight in described["weights"]:
            shape = "x".join(map(str, weight["shape"]))
            kept = share(weight["predicted_kept"]) if weight["rank"] else ""
            line = (
                f"  {weight['action']:<8}{weight['from']:>5} → {weight['to']:<5}{shape:>12}{kept:>9}  {weight['name']}"
            )
            out().print(escape(printable(line)))


def targets_table(targets: list[dict[str, Any]]) -> Table:
    """Targets side by side, as predicted for nearest rounding."""
    table = Table(title="What rounding would keep of the delta (predicted)", title_justify="left", title_style="bold")
    table.add_column("target")
    for name in ("bits", "size", "kept", "noise", "step/delta"):
        table.add_column(name, justify="right")
    table.caption = "bits: per weight, with scales; noise: in deltas\n" + readers([t["target"] for t in targets])
    table.caption_justify = "left"
    for target in targets:
        if "impossible" in target:
            table.add_row(target["target"], *("–",) * 5)
            continue
        gap, noise = target["gap_to_delta"], target["predicted_noise"]
        table.add_row(
            target["target"],
            f"{target['bits_per_weight']:.3g}",
            size_text(target["bytes_out"]),
            share(target["predicted_kept"]),
            "–" if noise is None else f"{noise:.2f}",
            "–" if gap is None else times(gap),
        )
    return table
