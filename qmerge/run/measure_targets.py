"""The whole merge without writing the model: what survives, for one or several targets."""

from __future__ import annotations

import time
from collections.abc import Sequence

from qmerge.base_check.from_training import with_training
from qmerge.errors import RecipeError
from qmerge.forecast.preflight import run_preflight
from qmerge.formats import get_target
from qmerge.planning.inputs import Inputs, read_inputs
from qmerge.planning.plan import make_run_context, plan_from, retargeted
from qmerge.progress import NoProgress, Progress
from qmerge.recipe import Recipe
from qmerge.report.environment import device_name
from qmerge.report.make import make_report
from qmerge.report.records import input_records
from qmerge.run.destinations import MeasureOnly
from qmerge.run.merge_model import merge
from qmerge.run.texts import check_files, check_texts
from qmerge.run.walk import run_steps
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.temporary import temporary_folder
from qmerge.schema import InputRecord, ReportData


def measure(recipe: Recipe, targets: Sequence[str] = (), progress: Progress | None = None) -> list[ReportData]:
    """Measure what survives, without keeping a model.

    Args:
        targets: names of formats; none for the recipe's target.

    Returns:
        One report per target, without output files.

    Raises:
        RecipeError, InputError, NumbersError, RoomError: as for a merge.
    """
    progress = progress or NoProgress()
    targets = list(targets) or [recipe.target]
    check_options(recipe, targets)
    check_files(recipe)
    if recipe.verify:
        return [merge_and_judge(recipe, target, progress) for target in targets]
    with Reader() as reader:
        # The inputs are read and hashed once for all targets.
        inputs = read_inputs(recipe, reader)
        records = input_records(inputs, progress)
        reports = []
        noted: set[str] = set()
        for target in targets:
            one_target, notes = with_training(retargeted(recipe, target), inputs)
            for line in notes:
                if line not in noted:
                    progress.note(line)
            noted.update(notes)
            reports.append(measure_target(one_target, inputs, records, reader=reader, progress=progress))
        return reports


def check_options(recipe: Recipe, targets: Sequence[str]) -> None:
    """Raise RecipeError for an option that none of the targets has. An option that one of them has is for that one."""
    for name in recipe.format_options:
        if not any(name in get_target(target).info.accepted_options for target in targets):
            flag = f"--{name.replace('_', '-')}"
            raise RecipeError(f"{flag} is not an option of --target {' or '.join(targets)}: leave it out")


def check_targets(targets: Sequence[str]) -> None:
    """Raise RecipeError for a target that is not the name of a format."""
    if "auto" in targets:
        raise RecipeError(
            "measure takes formats by name, but the target is auto: name one or several; qmerge plan shows all of them"
        )


def measure_target(
    recipe: Recipe, inputs: Inputs, records: list[InputRecord], *, reader: Reader, progress: Progress
) -> ReportData:
    """Run every step that changes or rounds something, and measure it."""
    started = time.monotonic()
    plan = plan_from(recipe, inputs)
    check_texts(plan)
    context = make_run_context(plan, reader)
    # Its warnings are in the report, next to those about what was measured.
    plan, preflight = run_preflight(plan, context, rounding=recipe.rounding)
    destination = MeasureOnly(context, plan.workers, progress)
    destination.start_stage(f"measuring {plan.target}", plan.rounded)
    try:
        judged = run_steps(plan, plan.rounded, destination, preflight.tokens)
    finally:
        progress.end()
    return make_report(
        plan,
        device=device_name(context.device),
        records=records,
        outputs=[],
        preflight=preflight,
        outcomes=destination.outcomes,
        fidelity=judged,
        started=started,
    )


def merge_and_judge(recipe: Recipe, target: str, progress: Progress) -> ReportData:
    """A whole merge into a temporary folder (in TMPDIR), judged on the recipe's text and removed."""
    with temporary_folder() as folder:
        whole = retargeted(recipe, target).model_copy(update={"out": f"{folder}/{target}"})
        return merge(whole, progress=progress).model_copy(update={"outputs": [], "files": [], "checksum": None})
