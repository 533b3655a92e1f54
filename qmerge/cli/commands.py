"""argv → recipe → run → print. Results go to stdout; progress, warnings and errors to stderr.

The options of the recipe are made from its fields (``recipe.py``): one place for names, types and help.
Imports stand inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import inspect
import json as jsonlib
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qmerge.cli.folders import COMMANDS, Json, Quiet, nothing_left, show_warnings
from qmerge.errors import BELOW_MIN_KEPT, OK, QmergeError, RecipeError, StoppedError
from qmerge.recipe import JUDGED_TOKENS, OPTIONS, Recipe, make_recipe, read_recipe

app = typer.Typer(
    add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)  # fmt: skip

INPUTS = (
    "base", "adapter", "combine", "density",
    "target", "max_size", "out", "patch", "revision", "adapter_revision", "original", "original_revision", "trained_on",
)  # fmt: skip
HOW = (
    "rounding", "calibration", "calibration_tokens", "sequence_length", "sequential", "merge_onto", "scales", "residual",
    "promote", *OPTIONS, "seed",
)  # fmt: skip
WORK = ("device", "workers", "max_memory", "max_shard_size")
PANELS = {
    **dict.fromkeys(INPUTS, "What to merge"),
    **dict.fromkeys(HOW, "How"),
    **dict.fromkeys(WORK, "Where and with what"),
}
TYPES = {
    "adapter": list[str], "block_size": int, "calibration_tokens": int, "sequence_length": int, "seed": int, "workers": int,
    "residual": int, "min_kept": float, "double_quant": bool, "sequential": bool, "bits": int, "group_size": int,
    "sym": bool, "act_order": bool, "static_groups": bool, "density": float,
}  # fmt: skip
METAVARS = {
    **dict.fromkeys(("base", "adapter", "original"), "ID|DIR"),
    **dict.fromkeys(("max_memory", "max_shard_size", "max_size"), "SIZE"),
    **dict.fromkeys(("revision", "adapter_revision", "original_revision"), "REV"), "target": "FORMAT", "out": "DIR",
    "patch": "FILE",
    "calibration": "SOURCE", "verify": "FILE", "promote": "SIZE", "residual": "RANK",
}  # fmt: skip
EVERYTHING = (*INPUTS, *HOW, "verify", "min_kept", *WORK)

UNWRITTEN = ("target", "max_size", "out", "patch", "max_shard_size", "residual", "promote")
"""What ``measure`` has no use for, because it writes nothing, or takes in its own way."""

GO_ON = "interrupted. Nothing unfinished carries a final name; the same command with --resume goes on."

Resume = Annotated[bool, typer.Option("--resume", help="go on with an interrupted run")]
Finished = Annotated[Path, typer.Argument(help="a folder that qmerge wrote")]


def recipe_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per recipe field; it receives those that were given as ``**settings``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        made = [option(name) for name in names]
        first = [p for p in own if p.default is inspect.Parameter.empty]
        rest = [p for p in own if p.default is not inspect.Parameter.empty]

        def call(**given: Any) -> None:
            for name in names:
                if given[name] is None or given[name] == []:
                    del given[name]
            try:
                command(**given)
            except KeyboardInterrupt as cause:  # here, because typer would end the process without a word
                raise StoppedError(GO_ON) from cause

        call.__doc__ = command.__doc__
        call.__signature__ = inspect.Signature([*first, *made, *rest])  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in [*first, *made, *rest]}
        return call

    return decorate


def option(name: str) -> inspect.Parameter:
    """A recipe field as a command-line option."""
    field = Recipe.model_fields[name]
    default = "" if field.is_required() or field.default is None else f" (default: {field.default})"
    flag = f"--{name.replace('_', '-')}"
    flags = [f"{flag}/--no-{flag[2:]}"] if TYPES.get(name) is bool else [flag]
    shown = typer.Option(
        *flags,
        help=f"{field.description}{default}",
        rich_help_panel=PANELS.get(name, "How"),
        metavar=METAVARS.get(name),
    )
    annotation: Any = Annotated[Optional[TYPES.get(name, str)], shown]  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


@app.callback(invoke_without_command=True)
@recipe_options(*EVERYTHING)
def merge_command(
    context: typer.Context, resume: Resume = False, json: Json = False, quiet: Quiet = False,
    version: Annotated[bool, typer.Option("--version", help="show the version")] = False, **settings: Any,
) -> None:  # fmt: skip
    """Merge a QLoRA adapter into a quantized model, and be told how much of the fine-tuning survived.

    [bold]qmerge --base ID|DIR --adapter ID|DIR --target nf4 --out DIR[/bold]

    Exit codes: 0 done; 1 a bug; 2 command line or recipe; 3 input files; 4 numbers the target cannot hold;
    5 done, but below --min-kept; 6 no room; 130 interrupted (go on with --resume).
    """
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"qmerge {installed('qmerge')}")
    elif context.invoked_subcommand is not None:
        if settings:
            name = next(iter(settings)).replace("_", "-")
            raise RecipeError(f"--{name} belongs after the command: qmerge {context.invoked_subcommand} --{name} …")
    elif not settings:
        typer.echo(context.get_help())
    else:
        run_merge(settings, resume, json, quiet)


@app.command("run")
@recipe_options(*EVERYTHING)
def run_command(
    recipe: Annotated[Path, typer.Argument(help="a recipe (YAML)")], resume: Resume = False, json: Json = False,
    quiet: Quiet = False, **settings: Any,
) -> None:  # fmt: skip
    """Merge by a recipe file; options given here override the file."""
    written = read_recipe(recipe)
    for given, other in (("out", "patch"), ("patch", "out")):
        if given in settings and other not in settings:
            written.pop(other, None)
    run_merge({**written, **settings}, resume, json, quiet)


@app.command("plan")
@recipe_options(*INPUTS, *HOW, *WORK)
def plan_command(
    json: Json = False,
    all_weights: Annotated[bool, typer.Option("--all", help="list every weight")] = False,
    **settings: Any,
) -> None:
    """Headers only: every weight and its action, bytes, memory, disk, and predicted survival for every target."""
    from qmerge.report.describe.plan import describe_plan
    from qmerge.report.terminal.plan import show_plan

    described = describe_plan(checked({"target": "nf4", **settings}), target_given="target" in settings)
    if json:
        typer.echo(jsonlib.dumps(described, indent=1))
    else:
        show_plan(described, all_weights)


@app.command("measure")
@recipe_options(*(name for name in EVERYTHING if name not in UNWRITTEN))
def measure_command(
    target: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="format to measure; may be given several times (default: nf4)", rich_help_panel="What to merge"
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """The full run with a writer that throws away: what would survive, for one or several targets.

    With --verify FILE, whole models are judged: each is written to a temporary folder, and thrown away.
    """
    from qmerge import run
    from qmerge.report.terminal import tables
    from qmerge.report.terminal.console import stdout
    from qmerge.report.terminal.progress import TerminalProgress

    targets = target or ["nf4"]
    if "auto" in targets:
        raise RecipeError(
            "measure takes formats by name; qmerge plan shows all of them, and --target auto is for a merge"
        )
    recipe = checked({**settings, "target": targets[0]})
    reports = run.measure(recipe, targets, TerminalProgress(quiet))
    if json:
        typer.echo(jsonlib.dumps([report.model_dump() for report in reports], indent=1))
    else:
        table = tables.survival_table(reports[0]) if len(reports) == 1 else tables.measured_table(reports)
        stdout().print(table)
        for line in tables.extra_lines(reports[0]):  # adapters meet alike on the way to every target
            typer.echo(line)
        if len(reports) == 1 and reports[0].fidelity:
            stdout().print(tables.fidelity_table(reports[0].fidelity))
        for report in reports:
            show_warnings(report.warnings, f"{report.recipe['target']}: " if len(reports) > 1 else "")
    raise typer.Exit(exit_code(reports, recipe.min_kept))


@app.command("inspect")
def inspect_command(
    adapter: Annotated[str, typer.Argument(help="a PEFT adapter, or a model: folder or Hub id")],
    revision: Annotated[Optional[str], typer.Option(help="revision of it on the Hub")] = None,  # noqa: UP045
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="a model: was the adapter trained on it? (folder or Hub id)", metavar="ID|DIR"),
    ] = None,
    base_revision: Annotated[Optional[str], typer.Option(help="revision of the base on the Hub")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """What an adapter is: kind, ranks, scales, sizes, what it was trained on, what is suspicious.

    Of a model: how it is stored, its fingerprint, and what qmerge made it of.
    """
    from qmerge.report.describe.inspect import inspect as describe
    from qmerge.report.terminal.adapter import show_adapter
    from qmerge.report.terminal.model import show_model

    described = describe(adapter, revision, base, base_revision)
    if json:
        typer.echo(jsonlib.dumps(described, indent=1))
    elif "architectures" in described:
        show_model(described)
    else:
        show_adapter(described)
    raise typer.Exit(3 if described.get("problem") else OK)


@app.command("verify")
def verify_command(
    out: Finished,
    reload: Annotated[bool, typer.Option("--reload/--no-reload", help="also load it with a stock loader")] = True,
    loader: Annotated[str, typer.Option(help="which: transformers, gptqmodel or auto-gptq")] = "transformers",
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="held-out text: judge the model against the unmerged adapter model (txt or jsonl)"),
    ] = None,
    against: Annotated[
        Optional[tuple[str, str]],  # noqa: UP045
        typer.Option(help="BASE and ADAPTER to judge against (default: those of the recipe)", metavar="BASE ADAPTER"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="tokens of the text", min=2)] = JUDGED_TOKENS,
    sequence_length: Annotated[int, typer.Option(help="tokens per sequence", min=2)] = 512,
    device: Annotated[str, typer.Option(help="where to compute: auto, cpu or cuda")] = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a folder: hashes, headers, index, and that the stock loader loads it with nothing missing or left over.

    With --text, also what the whole model kept of the fine-tuning: losses, gain kept, KL ratio.
    """
    from qmerge.calibration import texts
    from qmerge.evaluation.fidelity import fidelity_of_folder
    from qmerge.evaluation.verify import verify
    from qmerge.report.terminal.console import stdout
    from qmerge.report.terminal.progress import TerminalProgress
    from qmerge.report.terminal.tables import check_line, fidelity_table

    if against and text is None:
        raise RecipeError("--against needs --text FILE: the held-out text to judge on")
    if text:
        texts.read_texts(text)  # what is wrong with it is said before gigabytes are hashed and loaded
    checks = verify(out, reload, loader)
    sound, record = all(check.ok for check in checks), None
    if text and sound:  # a damaged folder is not judged: what is wrong with it is the answer
        record = fidelity_of_folder(
            out,
            text,
            against=against,
            tokens=tokens,
            length=sequence_length,
            device=device,
            progress=TerminalProgress(quiet),
        )
    if json:
        judged = {"fidelity": record.model_dump()} if record else {}
        typer.echo(jsonlib.dumps({"checks": [vars(check) for check in checks], **judged}, indent=1))
    else:
        for check in checks:
            typer.echo(check_line(check.name, check.ok, check.found))
        if record:
            stdout().print(fidelity_table(record))
    raise typer.Exit(OK if sound else 3)


@app.command("report")
def report_command(
    out: Finished,
    html: Annotated[Optional[Path], typer.Option(help="write it here (default: OUT/qmerge.html)")] = None,  # noqa: UP045
) -> None:
    """The HTML report again, from qmerge.json."""
    from qmerge.report.html import NAME, html_report
    from qmerge.safetensors_io.writer import write_file
    from qmerge.schema import read_report

    path = html or out / NAME
    write_file(path, html_report(read_report(out)).encode())
    typer.echo(str(path))


for name, command in COMMANDS.items():
    app.command(name)(command)


@app.command("formats")
def formats_command(json: Json = False) -> None:
    """Every format, adapter kind, rounding and metric, one line each."""
    from qmerge import plugins

    found = {kind: {name: plugins.help_line(kind, name) for name in plugins.names(kind)} for kind in plugins.KINDS}
    if json:
        typer.echo(jsonlib.dumps(found, indent=1, ensure_ascii=False))
        return
    for kind, lines in found.items():
        typer.echo(kind)
        for name, line in lines.items():
            typer.echo(f"  {name:<18} {line.removeprefix(f'{name}: ').removeprefix(f'{name} = ')}")


@app.command("demo")
def demo_command(
    out: Annotated[Optional[Path], typer.Option(help="keep the merged models here (default: thrown away)")] = None,  # noqa: UP045
) -> None:
    """The whole job on a small trained model that ships with qmerge; no network."""
    from qmerge.demo import run_demo

    run_demo(out)


def checked(settings: dict[str, Any]) -> Recipe:
    """Settings → recipe; one adapter stands by itself."""
    adapters = settings.get("adapter")
    if isinstance(adapters, (list, tuple)) and len(adapters) == 1:
        settings = {**settings, "adapter": adapters[0]}
    return make_recipe(settings)


def run_merge(settings: dict[str, Any], resume: bool, json: bool, quiet: bool) -> None:
    from qmerge.patch import direct
    from qmerge.report.terminal import tables
    from qmerge.report.terminal.console import stdout
    from qmerge.report.terminal.progress import TerminalProgress

    recipe = checked(settings)
    with nothing_left() if recipe.patch else nullcontext():
        report, patch = direct.merge(recipe, resume, TerminalProgress(quiet))
    if json:
        typer.echo(report.model_dump_json(indent=1))
    else:
        stdout().print(tables.survival_table(report))
        for line in tables.extra_lines(report):
            typer.echo(line)
        if report.fidelity:
            stdout().print(tables.fidelity_table(report.fidelity))
        show_warnings(report.warnings)
        if patch:
            revision = f" --revision {recipe.revision}" if recipe.revision else ""
            again = f"The merged model: qmerge apply {recipe.base} {patch.file} --out DIR{revision}"
            typer.echo("\n".join([*patch.lines(), again]))
        else:
            typer.echo(f"Written to {recipe.out} in {report.seconds:.0f} s. Check it with: qmerge verify {recipe.out}")
    raise typer.Exit(exit_code([report], recipe.min_kept))


def exit_code(reports: list[Any], min_kept: float | None) -> int:
    from qmerge.schema import overall_kept

    kept = [overall_kept(report.total.values) for report in reports]
    worst = min((value for value in kept if value is not None), default=None)
    if min_kept is None or worst is None or worst >= min_kept:
        return OK
    print(f"qmerge: kept {worst:.4f} of the delta, --min-kept asks for {min_kept}", file=sys.stderr)
    return BELOW_MIN_KEPT


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The console command: errors raised on purpose become one line and their exit code."""
    signal.signal(signal.SIGTERM, interrupt)
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # optional kernels that nothing here uses
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        app()
    except QmergeError as error:
        print(f"qmerge: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
