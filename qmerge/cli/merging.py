"""The commands that merge, or would: merge, run, plan, measure."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmerge.cli.options import HelpAll, Json, Quiet, Resume, Shard, flag, with_recipe_options
from qmerge.cli.output import exit_code, nothing_to_resume, print_json, print_report
from qmerge.errors import RecipeError, StoppedError
from qmerge.recipe import DEFAULT_TARGET, Recipe, find_inputs, make_recipe, read_recipe
from qmerge.report.headline import measuring_command_of
from qmerge.schema import RECIPE_NAME
from qmerge.wording import counted

if TYPE_CHECKING:
    from qmerge.patch.make import Summary
    from qmerge.report.terminal.progress import TerminalProgress
    from qmerge.schema import ReportData

ALL_FIELDS = tuple(Recipe.model_fields)
WITHOUT_USE_FOR_PLAN = ("verify", "continuations", "min_kept", "max_kl_ratio", "push_to_hub", "private")
PLAN_FIELDS = tuple(name for name in ALL_FIELDS if name not in WITHOUT_USE_FOR_PLAN)
# measure writes nothing, and takes --target several times.
WITHOUT_USE_FOR_MEASURE = (
    "target",
    "max_size",
    "out",
    "patch",
    "max_shard_size",
    "residual",
    "promote",
    "push_to_hub",
    "private",
)
MEASURE_FIELDS = tuple(name for name in ALL_FIELDS if name not in WITHOUT_USE_FOR_MEASURE)


@with_recipe_options(*ALL_FIELDS)
def merge_command(
    resume: Resume = False,
    shard: Shard = None,
    json: Json = False,
    quiet: Quiet = False,
    help_all: HelpAll = False,
    **settings: Any,
) -> None:
    """Merge adapters into a base: the same as qmerge without a command."""
    run_merge(settings, resume=resume, shard=shard, json=json, quiet=quiet)


@with_recipe_options(*ALL_FIELDS)
def run_command(
    recipe: Annotated[Path, typer.Argument(help="a recipe (YAML)")],
    resume: Resume = False,
    shard: Shard = None,
    json: Json = False,
    quiet: Quiet = False,
    help_all: HelpAll = False,
    **settings: Any,
) -> None:
    """Merge as a recipe file says; options given here override it."""
    written = read_recipe(recipe)
    if recipe.name == RECIPE_NAME:  # of a finished model: it names its inputs without absolute paths
        not_replaced = {name: value for name, value in written.items() if name not in settings}
        written |= find_inputs(not_replaced, recipe.parent, strict=True)
    # --out on the command line also replaces a patch of the file, and the other way round.
    if "out" in settings and "patch" not in settings:
        written.pop("patch", None)
    if "patch" in settings and "out" not in settings:
        written.pop("out", None)
    run_merge({**written, **settings}, resume=resume, shard=shard, json=json, quiet=quiet)


def finalize_command(
    out: Annotated[Path, typer.Argument(help="the --out of the parts", metavar="OUT")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Complete a model whose parts were written with --shard."""
    from qmerge import run
    from qmerge.report.terminal.progress import TerminalProgress

    progress = TerminalProgress(quiet)
    started = time.monotonic()
    try:
        report = run.finalize(out, progress)
    except KeyboardInterrupt as cause:
        raise StoppedError("interrupted. All parts are kept; the same command goes on.") from cause
    recipe = make_recipe({**report.recipe, "out": str(out)})
    _end_merge(report, recipe, None, seconds=time.monotonic() - started, json=json, progress=progress)


@with_recipe_options(*PLAN_FIELDS)
def plan_command(
    json: Json = False,
    served_with: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="name the best target for this program: vllm, sglang, ollama, llama.cpp, lmstudio, mlx, transformers, colab",
            metavar="PROGRAM",
        ),
    ] = None,
    all_weights: Annotated[bool, flag("--all", help="list every weight")] = False,
    help_all: HelpAll = False,
    **settings: Any,
) -> None:
    """Predict what each target keeps, its size, and the memory needed.

    Writes nothing. Reads headers, the adapter, and a few rows of some adapted weights. With --target, it also describes every
    weight and what is done to it.
    """
    from qmerge.report.describe.plan import describe_plan
    from qmerge.report.terminal.plan import show_plan
    from qmerge.report.terminal.progress import TerminalProgress

    recipe = _recipe({"target": DEFAULT_TARGET, **settings}, TerminalProgress())
    described = describe_plan(recipe, target_given="target" in settings, served_with=served_with)
    if json:
        print_json(described)
    else:
        show_plan(described, all_weights)


@with_recipe_options(*MEASURE_FIELDS)
def measure_command(
    target: Annotated[
        list[str] | None,
        typer.Option(help=f"measure this format; may be repeated (default: {DEFAULT_TARGET})", metavar="FORMAT"),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="also write a page to this file, targets side by side", metavar="FILE")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    help_all: HelpAll = False,
    **settings: Any,
) -> None:
    """Do the merge without writing the model; report what is kept.

    With --verify FILE, whole models are compared: each is written to a temporary folder, and deleted.
    """
    from qmerge import run
    from qmerge.report.terminal.progress import TerminalProgress

    targets = target or [DEFAULT_TARGET]
    run.check_targets(targets)
    progress = TerminalProgress(quiet)
    recipe = _recipe({**settings, "target": targets[0]}, progress)
    reports = run.measure(recipe, targets, progress)
    if json:
        print_json([report.model_dump() for report in reports])
    elif len(reports) == 1:
        print_report(reports[0])
        progress.warn_again(reports[0].warnings)
    else:
        _print_comparison(reports)
        for report in reports:
            progress.warn_again([f"{report.recipe['target']}: {line}" for line in report.warnings])
    if html is not None:
        _write_page(reports, html, quiet=json)
    raise typer.Exit(exit_code(reports, min_kept=recipe.min_kept, max_kl_ratio=recipe.max_kl_ratio))


def run_merge(settings: dict[str, Any], *, resume: bool, shard: str | None, json: bool, quiet: bool) -> None:
    """Merge, print what survived, and end with the exit code.

    Args:
        settings: fields of the recipe that were given.
        resume: go on with an interrupted run.
        shard: ``i/n`` for one part of the model.
        json: print qmerge.json instead of tables.
        quiet: show no progress.
    """
    from qmerge import publish
    from qmerge.patch import direct
    from qmerge.report.terminal.progress import TerminalProgress

    progress = TerminalProgress(quiet)
    recipe = _recipe(settings, progress)
    if recipe.push_to_hub and shard is not None:
        raise RecipeError(
            "--push-to-hub: one part of a model is none; after qmerge finalize OUT use: qmerge push OUT ID"
        )
    if recipe.push_to_hub:
        publish.check_destination(recipe.push_to_hub, recipe.private)
    if shard is not None:
        _run_part(recipe, shard, resume=resume, json=json, progress=progress)
        return
    # A run that ends in a patch keeps nothing that --resume could go on with.
    started = time.monotonic()
    with nothing_to_resume() if recipe.patch else nullcontext():
        report, patch = direct.merge(recipe, resume, progress)
    _end_merge(report, recipe, patch, seconds=time.monotonic() - started, json=json, progress=progress)


def _run_part(recipe: Recipe, shard: str, *, resume: bool, json: bool, progress: TerminalProgress) -> None:
    """Merge one part, and tell what to do when all are merged."""
    from qmerge import run
    from qmerge.checkpoint.parts import read_part

    part = read_part(shard)
    files = run.merge_part(recipe, part, resume, progress)
    if json:
        print_json({"part": part.number, "parts": part.count, "files": files})
    else:
        typer.echo(
            f"Part {part} is written ({counted(len(files), 'file')}). When all parts are: qmerge finalize {recipe.out}"
        )


def _end_merge(
    report: ReportData, recipe: Recipe, patch: Summary | None, *, seconds: float, json: bool, progress: TerminalProgress
) -> None:
    """Print what survived, upload the model if the recipe says so, and end with the exit code.

    Args:
        seconds: all of the run, the judging of the finished model included.
    """
    from qmerge import publish

    if json:
        typer.echo(report.model_dump_json(indent=1))
    else:
        print_report(report, measuring_command_of(recipe))
        progress.warn_again(report.warnings)
        for line in _closing_lines(recipe, report.seconds, seconds, patch):
            typer.echo(line)
    publish.push_merged(report, recipe, quiet=progress.quiet, progress=progress)
    raise typer.Exit(exit_code([report], min_kept=recipe.min_kept, max_kl_ratio=recipe.max_kl_ratio))


def _recipe(settings: dict[str, Any], progress: TerminalProgress) -> Recipe:
    """The settings as a checked recipe, with the base that the adapter names; a single adapter is a text, not a list."""
    from qmerge.base_check.from_training import with_named_base

    adapters = settings.get("adapter")
    if isinstance(adapters, (list, tuple)) and len(adapters) == 1:
        settings = {**settings, "adapter": adapters[0]}
    return with_named_base(make_recipe(settings), progress.note)


def _closing_lines(recipe: Recipe, to_write: float, in_all: float, patch: Summary | None) -> list[str]:
    """Where the result is, and what to do with it."""
    if patch is None:
        from qmerge.gguf.output import FILE

        file = Path(recipe.out or ".").expanduser() / FILE
        written = file if file.is_file() else recipe.out
        judged = f", judged in {max(in_all - to_write, 0):.0f} s" if recipe.verify else ""
        return [f"Written to {written} in {to_write:.0f} s{judged}. Check it with: qmerge verify {recipe.out}"]
    revision = f" --revision {recipe.revision}" if recipe.revision else ""
    return [*patch.lines(), f"To get the merged model: qmerge apply {recipe.base} {patch.file} --out DIR{revision}"]


def _write_page(reports: list[ReportData], file: Path, *, quiet: bool) -> None:
    """One target as a report, several side by side. ``quiet``: do not say where it is."""
    from qmerge.report.html import comparison_page, html_report
    from qmerge.safetensors_io.disk import write_file

    if len(reports) == 1:
        page = html_report(reports[0])
    else:
        page = comparison_page(reports, [report.recipe["target"] for report in reports])
    write_file(file, page.encode())
    if not quiet:
        typer.echo(f"Page written to {file}")


def _print_comparison(reports: list[Any]) -> None:
    """Several targets side by side."""
    from qmerge.report.terminal.console import stdout
    from qmerge.report.terminal.tables import extra_lines, measured_table

    stdout().print(measured_table(reports))
    for line in extra_lines(reports[0]):  # how alike the adapters are does not depend on the target
        typer.echo(line)
