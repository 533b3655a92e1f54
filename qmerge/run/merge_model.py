"""A recipe → a finished model folder: plan, check, run the steps, publish."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qmerge.calibration.tasks import task_of
from qmerge.checkpoint import folder
from qmerge.checkpoint.journal import NAME as JOURNAL
from qmerge.checkpoint.journal import Journal
from qmerge.checkpoint.parts import Part
from qmerge.errors import InputError, NumbersError, RecipeError
from qmerge.evaluation.fidelity import fidelity
from qmerge.evaluation.whole_fidelity import check_text
from qmerge.forecast.preflight import Preflight, run_preflight
from qmerge.forecast.targets import all_candidates, resolve_auto
from qmerge.formats import get_target
from qmerge.gguf.modelfile import modelfile
from qmerge.pipeline import Outcome
from qmerge.planning.inputs import Inputs, read_inputs
from qmerge.planning.plan import Plan, Shard, make_run_context, plan_from
from qmerge.progress import NoProgress, Progress
from qmerge.recipe import JUDGED_TOKENS, Device, Recipe, make_recipe
from qmerge.report import html
from qmerge.report.card import model_card
from qmerge.report.make import device_name, make_report
from qmerge.report.records import check_unchanged, input_records, input_states
from qmerge.run.destinations import OutputFolder
from qmerge.run.promote import plan_with_promoted
from qmerge.run.residual import Residual, write_residuals
from qmerge.run.walk import run_steps
from qmerge.safetensors_io.disk import write_file
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import NAME as REPORT_NAME
from qmerge.schema import RECIPE_NAME, FidelityRecord, FileRecord, InputRecord, ReportData, numbered_roles, read_report
from qmerge.weights.context import RunContext
from qmerge.wording import counted

IDENTITY_PACKAGES = ("qmerge", "torch", "bitsandbytes", "transformers")
"""Packages whose version may change an output byte, so that ``--resume`` needs the same one."""


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
        progress.note(f"{recipe.out} is complete already: there is nothing to resume.")
        return finished
    with Reader() as reader:
        run = prepare(recipe, reader, resume=resume, progress=progress)
        out_existed = run.out.exists()
        with folder.locked(run.out):
            report = write_or_discard(run, resume=resume, out_existed=out_existed)
            if recipe.verify:
                report = add_fidelity(report, run, Path(recipe.verify).expanduser())
            return report


def finished_report(recipe: Recipe) -> ReportData | None:
    """The report of a folder that a run with this recipe has completed; None for any other folder.

    A run that is interrupted in its last moment, when only locks are left to be removed, leaves such a folder.
    """
    out = Path(recipe.out or "").expanduser()
    if recipe.out is None or not (out / REPORT_NAME).is_file() or (out / JOURNAL).exists():
        return None
    report = read_report(out)
    if _without_revisions(make_recipe(report.recipe)) != _without_revisions(recipe):
        return None
    folder.remove_lock(out)
    return report


def _without_revisions(recipe: Recipe) -> dict[str, Any]:
    """What two recipes must have in common to make the same model. Revisions become commits in a finished model."""
    revisions = dict.fromkeys(("revision", "adapter_revision", "original_revision"))
    return make_recipe({**recipe.portable(), **revisions}).identity()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A merge that is ready to start.

    out        folder to write to
    preflight  what is known beforehand
    started    ``time.monotonic()`` when planning began
    part       which part of the model this process writes; None for all of it
    """

    recipe: Recipe
    plan: Plan
    context: RunContext
    out: Path
    preflight: Preflight
    progress: Progress
    started: float
    part: Part | None = None

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The output files that this process writes."""
        return shards_of_part(self.plan, self.part)


def shards_of_part(plan: Plan, part: Part | None) -> tuple[Shard, ...]:
    """The output files of a part, about the same number of bytes for each; all files without a part.

    Raises:
        RecipeError: there are more parts than files.
    """
    if part is None:
        return plan.shards
    if part.count > len(plan.shards):
        raise RecipeError(
            f"--shard {part}: --max-shard-size 500MB, for example, gives more files, or use fewer parts: the model has "
            f"{counted(len(plan.shards), 'file')} (--max-shard-size {plan.recipe.max_shard_size}), and each part writes at "
            f"least one"
        )
    mine = part.share({shard.file: shard.layout.most_bytes for shard in plan.shards})
    return tuple(shard for shard in plan.shards if shard.file in mine)


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
    inputs = read_inputs(recipe, reader)
    if recipe.target == "auto":
        recipe, reason = resolve_auto(recipe, inputs, all_candidates(recipe, inputs, reader))
        progress.note(reason)
    plan = plan_from(recipe, inputs)
    context = make_run_context(plan, reader, device)
    folder.check_place(out, input_folders(inputs))
    if part:
        folder.check_content_for_part(out, part, resume)
    elif not in_parts:
        folder.check_content(out, resume)
    if recipe.verify:
        # It is needed last, but an unreadable text should be an error first.
        check_text(Path(recipe.verify).expanduser(), task_of(plan.config))
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


@dataclass(frozen=True, kw_only=True)
class Written:
    """What is known when all files with weights are written.

    records    the inputs
    device     name of the device that computed them
    files      name of an output file → its size and hash
    texts      name → content of the tensors whose size was known only at the end
    outcomes   what was measured of every merged weight
    residuals  LoRAs that compensate for the rounding, if they were asked for
    fidelity   of the whole model, where calibration measured it
    """

    records: list[InputRecord]
    device: str
    files: Mapping[str, Mapping[str, Any]]
    texts: Mapping[str, str]
    outcomes: Mapping[str, Outcome]
    residuals: Mapping[str, Residual]
    fidelity: FidelityRecord | None


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


def complete_model(run: Run, written: Written) -> ReportData:
    """Write everything else. The index, the card and the config come last, so that an unfinished folder does not load as a
    model."""
    plan = run.plan
    if plan.is_gguf:  # the file has everything in it
        write_file(run.out / "Modelfile", modelfile(run.out / plan.shards[0].file).encode())
    else:
        folder.write_index(run.out, {shard.file: shard.layout for shard in plan.shards}, written.texts)
        folder.copy_side_files(run.out, folder.side_files(plan.inputs.base.folder, plan.inputs.adapter_files_folder))
    report = make_report(
        plan,
        device=written.device,
        records=written.records,
        outputs=[FileRecord(file=name, **written.files[name]) for name in sorted(written.files)],
        preflight=run.preflight,
        outcomes=written.outcomes,
        fidelity=written.fidelity,
        started=run.started,
    )
    if run.recipe.residual and written.residuals:
        report.residual = write_residuals(run.out, written.residuals, run.recipe.residual)
    # The report is complete now; without config.json the folder is not a model yet.
    write_file(run.out / RECIPE_NAME, with_commits(run.recipe, plan.inputs).to_yaml().encode())
    write_reports(report, plan, run.out)
    if not plan.is_gguf:
        write_configs(plan, run.out)
    return report


def add_fidelity(report: ReportData, run: Run, text: Path) -> ReportData:
    """Judge the finished model on a text, and write its reports again. The model stays, whatever happens."""
    run.progress.stage("measuring the merged model", 1)
    try:
        record = fidelity(
            run.out,
            run.recipe,
            text,
            device=run.context.device,
            tokens=JUDGED_TOKENS,
            length=run.recipe.sequence_length,
            report_progress=run.progress.report,
        )
        report = report.model_copy(update={"fidelity": record})
        write_reports(report, run.plan, run.out)
        return report
    finally:
        run.progress.end()


# --- the files -------------------------------------------------------------------------------------------------------


def write_reports(report: ReportData, plan: Plan, out: Path) -> None:
    """The report as JSON and as a page, and the model card."""
    write_file(out / REPORT_NAME, (report.model_dump_json(indent=1) + "\n").encode())
    write_file(out / html.NAME, html.html_report(report).encode())
    write_file(out / "README.md", model_card(report, plan).encode())


def write_configs(plan: Plan, out: Path) -> None:
    """config.json, after other files that the target's loaders read."""
    quantization = plan.config.get("quantization_config") or {}
    for name, content in get_target(plan.target).side_files(quantization).items():
        folder.write_json(out / name, content)
    folder.write_json(out / "config.json", plan.config, sort_keys=True)


def with_commits(recipe: Recipe, inputs: Inputs) -> Recipe:
    """The recipe with the commits that its revisions resolved to, so that it makes the same model again."""
    commits = {"revision": inputs.base_source.commit}
    if len(inputs.adapter_sources) == 1:
        # One revision is for all adapters, so it cannot name the commits of several.
        commits["adapter_revision"] = inputs.adapter_source.commit
    if inputs.original_source:
        commits["original_revision"] = inputs.original_source.commit
    return recipe.model_copy(update={name: commit for name, commit in commits.items() if commit})


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
