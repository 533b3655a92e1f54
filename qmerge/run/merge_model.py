"""A recipe → a finished model folder: plan, check, run the steps, publish."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qmerge.base_check.from_training import with_training
from qmerge.checkpoint import folder
from qmerge.checkpoint.journal import NAME as JOURNAL
from qmerge.checkpoint.journal import Journal
from qmerge.checkpoint.parts import Part
from qmerge.errors import InputError, NumbersError, RecipeError
from qmerge.forecast.preflight import Preflight, run_preflight
from qmerge.forecast.targets import all_candidates, resolve_auto
from qmerge.planning.inputs import Inputs, read_inputs
from qmerge.planning.plan import Plan, Shard, make_run_context, plan_from
from qmerge.progress import NoProgress, Progress
from qmerge.recipe import Device, Recipe, make_recipe
from qmerge.report.environment import device_name
from qmerge.report.make import IDENTITY_PACKAGES
from qmerge.report.records import check_unchanged, input_records, input_states
from qmerge.run.complete import add_fidelity, complete_model
from qmerge.run.destinations import OutputFolder
from qmerge.run.promote import plan_with_promoted
from qmerge.run.state import Run, Written, shards_of_part
from qmerge.run.texts import check_files, check_texts
from qmerge.run.walk import run_steps
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import NAME as REPORT_NAME
from qmerge.schema import InputRecord, ReportData, numbered_roles, read_report
from qmerge.weights.context import RunContext


def merge(recipe: Recipe, resume: bool = False, progress: Progress | None = None) -> ReportData:
    """Merge an adapter into a base and write the model.

    Args:
        resume: go on with an interrupted run in the same output folder.

    Returns:
        The content of qmerge.json.

    Raises:
        RecipeError, InputError, NumbersError, RoomError: see ``errors.py``. Nothing is left behind except what --resume
        needs.
    """
    progress = progress or NoProgress()
    finished = finished_report(recipe) if resume else None
    if finished is not None:
        progress.note(f"{recipe.out} is complete already.")
        return finished if _is_judged(finished, recipe) else _judge(finished, recipe, progress)
    with Reader() as reader:
        run = prepare(recipe, reader, resume=resume, progress=progress)
        out_existed = run.out.exists()
        with folder.locked(run.out):
            report = write_or_discard(run, resume=resume, out_existed=out_existed)
            if recipe.verify:
                report = add_fidelity(report, run.recipe, run.plan, run.context, progress)
            return report


def finished_report(recipe: Recipe) -> ReportData | None:
    """The report of a folder that a run with this recipe has completed; None for any other folder.

    A run that is interrupted in its last moment, when only locks are left to be removed, leaves such a folder.
    """
    out = Path(recipe.out or "").expanduser()
    if recipe.out is None or not (out / REPORT_NAME).is_file() or (out / JOURNAL).exists():
        return None
    report = read_report(out)
    recorded = make_recipe(report.recipe)
    # A finished model records what the training folder answered where the recipe left it open.
    if recipe.trained_on is None:
        recorded = recorded.model_copy(update={"trained_on": None})
    if _without_revisions(recorded) != _without_revisions(recipe):
        return None
    folder.remove_lock(out)
    return report


def _is_judged(report: ReportData, recipe: Recipe) -> bool:
    """Whether a finished model was judged on the text that the recipe names, if it names one."""
    if not recipe.verify:
        return True
    fidelity = report.fidelity
    return fidelity is not None and fidelity.text_kind == "given" and fidelity.text == Path(recipe.verify).name


def _judge(report: ReportData, recipe: Recipe, progress: Progress) -> ReportData:
    """Judge a finished model: the run that wrote it was interrupted after that."""
    with Reader() as reader:
        plan = _plan(recipe, reader, progress)
        check_texts(plan)
        with folder.locked(Path(recipe.out or "").expanduser()):
            return add_fidelity(report, plan.recipe, plan, make_run_context(plan, reader), progress)


def _without_revisions(recipe: Recipe) -> dict[str, Any]:
    """What two recipes must have in common to make the same model. Revisions become commits in a finished model."""
    revisions = dict.fromkeys(("revision", "adapter_revision", "original_revision"))
    return recipe.published().model_copy(update=revisions).identity()


# --- before the first step -------------------------------------------------------------------------------------------


def prepare(
    recipe: Recipe,
    reader: Reader,
    *,
    resume: bool,
    progress: Progress,
    part: Part | None = None,
    in_parts: bool = False,
    device: Device | None = None,
) -> Run:
    """Plan the merge, and check everything that would otherwise fail when the long work is done.

    Args:
        part: which part of the model this process writes; None for all of it.
        in_parts: the processes of other parts write the weights: this one does not look for an unfinished run.
        device: instead of the recipe's.

    Raises:
        RecipeError, InputError, RoomError: see ``errors.py``. Nothing was written.
    """
    started = time.monotonic()
    if recipe.out is None:
        raise RecipeError("out is needed (--out): folder to write to; must not exist, or be empty")
    out = Path(recipe.out).expanduser()
    plan = _plan(recipe, reader, progress)
    recipe = plan.recipe
    context = make_run_context(plan, reader, device)
    folder.check_place(out, input_folders(plan.inputs))
    if part:
        folder.check_content_for_part(out, part, resume)
    elif not in_parts:
        folder.check_content(out, resume)
    check_texts(plan)
    if recipe.promote:
        plan = plan_with_promoted(recipe, plan, context, progress)
    shards = shards_of_part(plan, part)
    folder.check_room(out, sum(shard.layout.most_bytes for shard in shards) - bytes_written(out, shards))
    plan, preflight = show_preflight(plan, context, progress, may_calibrate=not (part or in_parts))
    return Run(
        recipe=recipe,
        plan=plan,
        context=context,
        out=out,
        preflight=preflight,
        progress=progress,
        started=started,
        part=part,
    )


def _plan(recipe: Recipe, reader: Reader, progress: Progress) -> Plan:
    """The plan of a recipe, with what the training folder says and ``--target auto`` chooses, which is shown."""
    check_files(recipe)
    inputs = read_inputs(recipe, reader)
    recipe, notes = with_training(recipe, inputs)
    for line in notes:
        progress.note(line)
    if recipe.target == "auto":
        recipe, reason = resolve_auto(recipe, inputs, all_candidates(recipe, inputs, reader))
        progress.note(reason)
    return plan_from(recipe, inputs)


def show_preflight(
    plan: Plan, context: RunContext, progress: Progress, *, may_calibrate: bool
) -> tuple[Plan, Preflight]:
    """Run the preflight, and show its notes and warnings before the long work begins."""
    progress.stage("predicting what survives", 1)
    plan, preflight = run_preflight(
        plan,
        context,
        rounding=plan.recipe.rounding,
        may_calibrate=may_calibrate,
        report_progress=progress.report,
    )
    progress.end()
    for line in preflight.notes:
        progress.note(line)
    for line in preflight.warnings(plan):
        progress.warn(line)
    return plan, preflight


def input_folders(inputs: Inputs) -> dict[str, Path]:
    """What an input is, in words → its folder."""
    # A GGUF file may be anywhere, next to other models too.
    folders = {"the base": inputs.base_source.file or inputs.base_source.folder}
    for source in inputs.adapter_sources:
        folders[f"the adapter {source.folder.name}"] = source.folder
    if inputs.original_source:
        folders["the original"] = inputs.original_source.folder
    return folders


def bytes_written(out: Path, shards: Sequence[Shard]) -> int:
    """Bytes of disk space that an unfinished run has taken already for these files."""
    nbytes = 0
    for shard in shards:
        for path in out.glob(f"{shard.file}*"):  # finished or partial
            nbytes += path.stat().st_size
    return nbytes


# --- the run ---------------------------------------------------------------------------------------------------------


def write_or_discard(run: Run, *, resume: bool, out_existed: bool) -> ReportData:
    """Write the model. After an error that --resume cannot mend, remove what was written."""
    try:
        return write_model(run, resume=resume)
    except (NumbersError, InputError):
        folder.discard(run.out, made_by_us=not out_existed)
        raise
    finally:
        run.progress.end()


def write_model(run: Run, *, resume: bool) -> ReportData:
    """Run every step, then write the other files."""
    # Hashes of all inputs come first: a resumed run must have the same ones.
    before = input_states(run.plan.inputs)
    records = input_records(run.plan.inputs, run.progress)
    journal = Journal(run.out, run_identity(run, records), resume)
    written = write_weights(run, records, journal, resume=resume)
    check_unchanged(run.plan.inputs, before, records)
    report = complete_model(run, written)
    journal.remove()
    return report


def write_weights(run: Run, records: list[InputRecord], journal: Journal, *, resume: bool) -> Written:
    """Run every step of this process: its output files are whole, and have their final names."""
    steps = [step for shard in run.shards for step in shard.steps]
    destination = OutputFolder(
        run.shards,
        run.context,
        run.out,
        journal,
        workers=run.plan.workers,
        resume=resume,
        residual_rank=run.recipe.residual,
        progress=run.progress,
    )
    destination.start_stage("merging", steps)
    try:
        judged = run_steps(run.plan, steps, destination, run.preflight.tokens)
        destination.finish()
    finally:
        destination.close()
    return Written(
        records=records,
        device=device_name(run.context.device),
        files=journal.files,
        texts=destination.texts(),
        outcomes=destination.outcomes,
        residuals=destination.residuals,
        fidelity=judged,
    )


def run_identity(run: Run, records: Sequence[InputRecord]) -> dict[str, Any]:
    """What a resumed run must have in common with the run that it resumes."""
    hashes: dict[str, str] = {}
    for role, record in numbered_roles(records):
        for file in record.files:
            hashes[f"{role} {file.file}"] = file.sha256
    calibration = run.preflight.calibration
    return {
        **{name: version(name) for name in IDENTITY_PACKAGES},
        "device": run.context.device.type,  # other devices give other last bits
        "recipe": run.recipe.identity(),
        "input": hashes,
        "calibration": calibration.model_dump() if calibration else None,
        "rounding": dict(Counter(step.rounding for step in run.plan.merged)),  # auto may choose others elsewhere
        "promoted": sorted(run.plan.promoted),
        "output": {shard.file: len(shard.steps) for shard in run.plan.shards},
    }
