"""A recipe → a finished folder: plan, check, walk the steps, publish. The same walk without writing is ``measure``."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from qmerge.calibration import texts
from qmerge.calibration.statistics import calibrated_groups
from qmerge.checkpoint import folder
from qmerge.checkpoint.journal import Journal
from qmerge.errors import InputError, NumbersError, RecipeError
from qmerge.evaluation.fidelity import fidelity
from qmerge.forecast.preflight import Preflight, for_identity, run_preflight
from qmerge.forecast.targets import resolve_auto
from qmerge.formats import get_target
from qmerge.metrics.base import Sums
from qmerge.planning.inputs import Inputs, read_inputs
from qmerge.planning.plan import Plan, make_run_context, plan_from, retargeted
from qmerge.planning.targets import DENSE_FORMATS
from qmerge.progress import NoProgress, Progress
from qmerge.recipe import JUDGED_TOKENS, Recipe, parse_size
from qmerge.report import html
from qmerge.report.card import model_card
from qmerge.report.make import make_report
from qmerge.report.records import input_records
from qmerge.run import residual
from qmerge.run.destinations import Measuring, Writing
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.writer import write_file
from qmerge.schema import NAME as REPORT_NAME
from qmerge.schema import RECIPE_NAME, FileRecord, InputRecord, ReportData, numbered
from qmerge.types import Step
from qmerge.weights.context import RunContext


def merge(recipe: Recipe, resume: bool = False, progress: Progress | None = None) -> ReportData:
    """Merge an adapter into a base and write the model.

    Raises:
        RecipeError, InputError, NumbersError, RoomError: see ``errors.py``; nothing stays behind but what --resume needs.
    """
    progress, started = progress or NoProgress(), time.monotonic()
    if recipe.out is None:
        raise RecipeError("out is needed (--out): folder to write to; must not exist, or be empty")
    out = Path(recipe.out).expanduser()
    with Reader() as reader:
        inputs = read_inputs(recipe, reader)
        if recipe.target == "auto":
            recipe, why = resolve_auto(recipe, inputs, reader)
            progress.say(why)
        plan = plan_from(recipe, inputs)
        context = make_run_context(plan, reader)
        folder.check_out(out, input_folders(plan.inputs), resume)
        if recipe.verify:
            texts.read_texts(Path(recipe.verify).expanduser())  # now, not when all else is done
        if recipe.promote:
            plan = with_promoted(plan, context, progress)
        folder.check_room(out, plan.bytes_out - reserved(out))
        progress.stage("looking ahead", 1)
        plan, outlook = run_preflight(plan, context, lambda at: progress.advance(0, at))
        progress.end()
        for line in outlook.says(plan):
            progress.say(line)
        for line in outlook.warnings(plan):
            progress.warn(line)
        existed = out.exists()
        with folder.locked(out):
            try:
                report = write_model(plan, context, out, resume, outlook, progress, started)
            except (NumbersError, InputError):  # no --resume can mend these
                folder.discard(out, made_by_us=not existed)
                raise
            finally:
                progress.end()
            try:
                return judged(report, plan, context, out, progress) if recipe.verify else report
            finally:
                progress.end()


def measure(recipe: Recipe, targets: Sequence[str] = (), progress: Progress | None = None) -> list[ReportData]:
    """The full run with a writer that throws away: what would survive, for one or several targets."""
    progress, targets = progress or NoProgress(), list(targets or [recipe.target])
    check_options(recipe, targets)
    if recipe.verify:
        return [judged_elsewhere(recipe, target, progress) for target in targets]
    reports = []
    with Reader() as reader:
        inputs = read_inputs(recipe, reader)
        records = input_records(inputs, progress)
        for target in targets:
            started = time.monotonic()
            plan = plan_from(retargeted(recipe, target), inputs)
            context = make_run_context(plan, reader)
            plan, outlook = run_preflight(plan, context)
            place = Measuring(context, recipe.workers, progress)
            progress.stage(f"measuring {target}", sum(step.weight.nbytes for step in plan.rounded))
            try:
                walk(plan, plan.rounded, context, place, outlook.batches, progress)
            finally:
                progress.end()
            reports.append(make_report(plan, context, records, [], outlook, place.outcomes, started))
    return reports


def check_options(recipe: Recipe, targets: Sequence[str]) -> None:
    """An option that none of the targets takes is an error; one that some take is for those."""
    for name in recipe.asked:
        if not any(name in get_target(target).info.accepted_options for target in targets):
            raise RecipeError(f"--{name.replace('_', '-')}: none of {', '.join(targets)} takes it")


def judged_elsewhere(recipe: Recipe, target: str, progress: Progress) -> ReportData:
    """A whole merge into a temporary folder (TMPDIR says where), judged there and thrown away."""
    with tempfile.TemporaryDirectory(prefix="qmerge-") as place:
        there = retargeted(recipe, target).model_copy(update={"out": f"{place}/{target}"})
        return merge(there, progress=progress).model_copy(update={"outputs": []})


def with_promoted(plan: Plan, context: RunContext, progress: Progress) -> Plan:
    """A first pass that writes nothing; the weights whose output is worst for each byte that 16 bits would cost are then
    planned in the model's own dtype, as far as the budget goes."""
    assert plan.recipe.promote is not None
    rehearsed, outlook = run_preflight(plan, context)
    place = Measuring(context, plan.recipe.workers, progress)
    progress.stage("measuring which weights survive worst", sum(step.weight.nbytes for step in rehearsed.rounded))
    try:
        walk(rehearsed, rehearsed.rounded, context, place, outlook.batches, progress)
    finally:
        progress.end()
    losses = {step.name: loss(place.outcomes[step.name].sums) for step in rehearsed.merged}
    form = DENSE_FORMATS[plan.inputs.base.dtype]
    width = 4 if form == "fp32" else 2
    costs = {step.name: extra_bytes(step, width) for step in rehearsed.merged}
    budget, chosen = parse_size(plan.recipe.promote), list[str]()
    for name in sorted(losses, key=lambda name: -losses[name] / max(1, costs[name])):
        if 0 < costs[name] <= budget and losses[name] > 0:
            chosen, budget = [*chosen, name], budget - costs[name]
    spent = sum(costs[name] for name in chosen)
    progress.say(f"Promoted to {form}: {len(chosen)} of {len(losses)} weights, {spent / 1e6:.1f} MB more.")
    return plan_from(plan.recipe, plan.inputs, frozenset(chosen))


def loss(sums: Sums) -> float:
    """What rounding does to the layer's output (to the weight, where its inputs were not seen)."""
    error = sums["output_noise"].get("error_error")
    return float(sums["noise"]["error_error"] if error is None else error)


def extra_bytes(step: Step, width: int) -> int:
    """What the weight takes more when it is dense, ``width`` bytes per value, than as planned."""
    return width * math.prod(step.shape) - sum(max(0, spec.nbytes) for spec in step.outputs.values())


def write_model(
    plan: Plan, context: RunContext, out: Path, resume: bool, outlook: Preflight, progress: Progress, started: float
) -> ReportData:  # fmt: skip
    """Every step, then every file; index, card and config last, so that an unfinished folder does not load."""
    records = input_records(plan.inputs, progress)
    journal = Journal(out, identity(plan, context, records, outlook), resume)
    place = Writing(plan, context, out, resume, journal, progress)
    progress.stage("merging", sum(step.weight.nbytes for step in plan.steps))
    try:
        walk(plan, plan.steps, context, place, outlook.batches, progress)
    finally:
        place.close()
    folder.write_index(out, place.writers)
    folder.copy_side_files(out, folder.side_files(plan.inputs.base.folder, plan.inputs.adapter_files_folder))
    outputs = [FileRecord(file=name, **journal.files[name]) for name in sorted(journal.files)]
    report = make_report(plan, context, records, outputs, outlook, place.outcomes, started)
    if place.rank and place.residuals:
        report.residual = residual.write(out, place.residuals, place.rank)
    write_file(out / RECIPE_NAME, pinned(plan).to_yaml().encode())
    write_faces(report, plan, out)
    target = get_target(plan.recipe.target)
    for name, content in target.side_files(plan.config.get("quantization_config") or {}).items():
        folder.write_json(out / name, content)
    folder.write_json(out / "config.json", plan.config, sort_keys=True)
    journal.remove()
    return report


def judged(report: ReportData, plan: Plan, context: RunContext, out: Path, progress: Progress) -> ReportData:
    """The report with the fidelity of the finished model; the model stays, whatever happens here."""
    assert plan.recipe.verify is not None
    progress.stage("judging", 1)
    text, length = Path(plan.recipe.verify).expanduser(), plan.recipe.sequence_length
    record = fidelity(
        out,
        plan.recipe,
        text,
        device=context.device,
        tokens=JUDGED_TOKENS,
        length=length,
        report_progress=lambda line: progress.advance(0, line),
    )
    report = report.model_copy(update={"fidelity": record})
    write_faces(report, plan, out)
    return report


def write_faces(report: ReportData, plan: Plan, out: Path) -> None:
    write_file(out / REPORT_NAME, (report.model_dump_json(indent=1) + "\n").encode())
    write_file(out / html.NAME, html.html_report(report).encode())
    write_file(out / "README.md", model_card(report, plan).encode())


def walk(
    plan: Plan, steps: Sequence[Step], context: RunContext, place: Writing | Measuring,
    batches: Sequence[Tensor] | None, progress: Progress,
) -> None:  # fmt: skip
    """Every step once: those that need no calibration as they come, the others group by group of the calibration."""
    calibrated = {step.name for step in steps if step.rounding == "preserve"} if batches is not None else set()
    place.do([step for step in steps if step.name not in calibrated], {})
    if calibrated:
        assert batches is not None
        groups = calibrated_groups(
            plan,
            context,
            batches,
            stored_values=place.stored,
            report_progress=lambda line: progress.advance(0, line),
        )
        for group in groups:
            place.do(group.steps, group.statistics)
    applied = {step.name for step in plan.merged}
    assert place.outcomes.keys() == applied, "planned and applied updates differ"


def pinned(plan: Plan) -> Recipe:
    """The recipe with the commits that its revisions stood for, so that it makes the same model again."""
    inputs = plan.inputs
    commits = {
        "revision": inputs.base_source.commit,
        "adapter_revision": inputs.adapter_source.commit if len(inputs.adapter_sources) == 1 else None,
        "original_revision": inputs.original_source.commit if inputs.original_source else None,
    }
    return plan.recipe.model_copy(update={name: commit for name, commit in commits.items() if commit})


def identity(plan: Plan, context: RunContext, records: Sequence[InputRecord], outlook: Preflight) -> dict[str, Any]:
    """What a resumed run must share with the one it resumes."""
    return {
        **{name: version(name) for name in ("qmerge", "torch", "bitsandbytes", "transformers")},
        "device": context.device.type,
        "recipe": plan.recipe.identity(),
        "input": {f"{role} {f.file}": f.sha256 for role, r in numbered(records) for f in r.files},
        **for_identity(outlook),
        "promoted": sorted(plan.promoted),
        "output": {shard.file: len(shard.steps) for shard in plan.shards},
    }


def input_folders(inputs: Inputs) -> dict[str, Path]:
    folders = {"the base": inputs.base_source.folder}
    folders |= {f"the adapter {source.folder.name}": source.folder for source in inputs.adapter_sources}
    return {**folders, "the original": inputs.original_source.folder} if inputs.original_source else folders


def reserved(out: Path) -> int:
    """Bytes that an unfinished run in ``out`` has taken already."""
    return sum(path.stat().st_size for path in out.glob("*.safetensors*")) if out.is_dir() else 0
