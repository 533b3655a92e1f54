"""argv → recipe → run → print. Results go to stdout; progress, warnings and errors to stderr."""

from __future__ import annotations

import json as jsonlib
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qmerge.errors import BELOW_MIN_KEPT, INTERRUPTED, OK, QmergeError, RecipeError

app = typer.Typer(
    add_completion=False, no_args_is_help=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)  # fmt: skip

INPUTS, HOW, WORK, SHOW = "What to merge", "How", "Where and with what", "What to show"

Base = Annotated[
    str | None, typer.Option(help="The model the adapter was trained on: folder or Hub id.", rich_help_panel=INPUTS)
]
Adapter = Annotated[list[str] | None, typer.Option(help="The PEFT adapter: folder or Hub id.", rich_help_panel=INPUTS)]
Target = Annotated[
    str | None, typer.Option(help="Format to write: nf4, fp4, int8, fp16, bf16, fp32.", rich_help_panel=INPUTS)
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="Format to measure; may be given several times.", rich_help_panel=INPUTS),
]
Out = Annotated[str | None, typer.Option(help="Folder to write to; new or empty.", rich_help_panel=INPUTS)]
Revision = Annotated[str | None, typer.Option(help="Revision of the base on the Hub.", rich_help_panel=INPUTS)]
AdapterRevision = Annotated[
    str | None, typer.Option(help="Revision of the adapter on the Hub.", rich_help_panel=INPUTS)
]
Original = Annotated[str | None, typer.Option(help="The 16-bit original of a quantized base.", rich_help_panel=INPUTS)]
OriginalRevision = Annotated[
    str | None, typer.Option(help="Revision of the original on the Hub.", rich_help_panel=INPUTS)
]
TrainedOn = Annotated[
    str | None,
    typer.Option(
        help="For a dense base: how training quantized it on the fly: nf4, nf4-dq (double quantization), fp4, fp4-dq, int8.",
        rich_help_panel=INPUTS,
    ),
]
Rounding = Annotated[str | None, typer.Option(help="nearest or stochastic. [default: nearest]", rich_help_panel=HOW)]
MergeOnto = Annotated[
    str | None,
    typer.Option(help="dequantized (what the adapter saw) or original. [default: dequantized]", rich_help_panel=HOW),
]
BlockSize = Annotated[
    int | None, typer.Option(help="NF4/FP4 block size. [default: the base's, else 64]", rich_help_panel=HOW)
]
DoubleQuant = Annotated[
    bool | None,
    typer.Option(
        "--double-quant/--no-double-quant",
        help="NF4/FP4 double quantization. [default: the base's]",
        rich_help_panel=HOW,
    ),
]
QuantStorage = Annotated[
    str | None, typer.Option(help="NF4/FP4 storage dtype. [default: the base's, else uint8]", rich_help_panel=HOW)
]
Seed = Annotated[int | None, typer.Option(help="Seed of stochastic rounding. [default: 0]", rich_help_panel=HOW)]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda. [default: auto]", rich_help_panel=WORK)]
Workers = Annotated[int | None, typer.Option(help="Weights worked on at once. [default: 1]", rich_help_panel=WORK)]
MaxMemory = Annotated[
    str | None, typer.Option(help="Memory for weights being worked on. [default: 2GB]", rich_help_panel=WORK)
]
MaxShardSize = Annotated[str | None, typer.Option(help="Largest output file. [default: 5GB]", rich_help_panel=WORK)]
MinKept = Annotated[
    float | None,
    typer.Option(help="Exit with 5 when less than this share of the delta was kept.", rich_help_panel=HOW),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=WORK)]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.", rich_help_panel=SHOW)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=SHOW)]


@app.callback(invoke_without_command=True)
def merge_command(
    context: typer.Context, base: Base = None, adapter: Adapter = None, target: Target = None, out: Out = None,
    revision: Revision = None, adapter_revision: AdapterRevision = None, original: Original = None,
    original_revision: OriginalRevision = None, trained_on: TrainedOn = None, rounding: Rounding = None,
    merge_onto: MergeOnto = None, block_size: BlockSize = None, double_quant: DoubleQuant = None,
    quant_storage: QuantStorage = None, min_kept: MinKept = None, seed: Seed = None, device: Device = None,
    workers: Workers = None, max_memory: MaxMemory = None, max_shard_size: MaxShardSize = None, resume: Resume = False,
    json: Json = False, quiet: Quiet = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", rich_help_panel=SHOW)] = False,
) -> None:  # fmt: skip
    """Merge a QLoRA adapter into a quantized model, and be told how much of the fine-tuning survived.

    [bold]qmerge --base ID|DIR --adapter ID|DIR --target nf4 --out DIR[/bold]

    Exit codes: 0 done; 1 a bug; 2 command line or recipe; 3 input files; 4 numbers the target cannot hold;
    5 done, but below --min-kept; 6 no room; 130 interrupted (go on with --resume).
    """
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"qmerge {installed('qmerge')}")
        return
    settings = given(context, exclude=("resume", "json", "quiet", "version"))
    if context.invoked_subcommand is not None:
        if settings:
            raise RecipeError(
                f"--{next(iter(settings)).replace('_', '-')} must come after `{context.invoked_subcommand}`"
            )
        return
    if not settings:
        typer.echo(context.get_help())
        return
    run_merge(settings, resume, json, quiet)


@app.command("run")
def run_command(
    context: typer.Context, recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")], base: Base = None,
    adapter: Adapter = None, target: Target = None, out: Out = None, revision: Revision = None,
    adapter_revision: AdapterRevision = None, original: Original = None, original_revision: OriginalRevision = None,
    trained_on: TrainedOn = None, rounding: Rounding = None, merge_onto: MergeOnto = None, block_size: BlockSize = None,
    double_quant: DoubleQuant = None, quant_storage: QuantStorage = None, min_kept: MinKept = None, seed: Seed = None,
    device: Device = None, workers: Workers = None, max_memory: MaxMemory = None, max_shard_size: MaxShardSize = None,
    resume: Resume = False, json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Merge by a recipe file; options given here override the file."""
    from qmerge.recipe import read_recipe

    settings = {**read_recipe(recipe), **given(context, exclude=("recipe", "resume", "json", "quiet"))}
    run_merge(settings, resume, json, quiet)


@app.command("plan")
def plan_command(
    context: typer.Context, base: Base = None, adapter: Adapter = None, target: Target = None, out: Out = None,
    revision: Revision = None, adapter_revision: AdapterRevision = None, original: Original = None,
    original_revision: OriginalRevision = None, trained_on: TrainedOn = None, rounding: Rounding = None,
    merge_onto: MergeOnto = None, block_size: BlockSize = None, double_quant: DoubleQuant = None,
    quant_storage: QuantStorage = None, device: Device = None, workers: Workers = None, max_memory: MaxMemory = None,
    max_shard_size: MaxShardSize = None, json: Json = False,
    all_weights: Annotated[bool, typer.Option("--all", help="List every weight.", rich_help_panel=SHOW)] = False,
) -> None:  # fmt: skip
    """Headers only: every weight and its action, bytes, memory, disk, and predicted survival for every target."""
    from qmerge.report import plan as face

    settings = given(context, exclude=("json", "all_weights"))
    described = face.describe(recipe_of({"target": "nf4", **settings}), target_given="target" in settings)
    typer.echo(jsonlib.dumps(described, indent=1)) if json else face.show(described, all_weights)


@app.command("measure")
def measure_command(
    context: typer.Context, base: Base = None, adapter: Adapter = None, target: Targets = None, revision: Revision = None,
    adapter_revision: AdapterRevision = None, original: Original = None, original_revision: OriginalRevision = None,
    trained_on: TrainedOn = None, rounding: Rounding = None, merge_onto: MergeOnto = None, block_size: BlockSize = None,
    double_quant: DoubleQuant = None, quant_storage: QuantStorage = None, min_kept: MinKept = None, seed: Seed = None,
    device: Device = None, workers: Workers = None, max_memory: MaxMemory = None, json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """The full run with a writer that throws away: what would survive, for one or several targets."""
    from qmerge import run
    from qmerge.report import terminal

    settings = given(context, exclude=("json", "quiet", "target"))
    targets = target or ["nf4"]
    reports = run.measure(recipe_of({**settings, "target": targets[0]}), targets, terminal.TerminalWatcher(quiet))
    if json:
        typer.echo(jsonlib.dumps([report.model_dump() for report in reports], indent=1))
    else:
        terminal.out().print(
            terminal.survival_table(reports[0]) if len(reports) == 1 else terminal.measured_table(reports)
        )
        for report in reports:
            show_warnings(report.warnings, report.recipe["target"] if len(reports) > 1 else "")
    raise typer.Exit(exit_code(reports, min_kept))


@app.command("inspect")
def inspect_command(
    adapter: Annotated[str, typer.Argument(help="A PEFT adapter: folder or Hub id.")],
    revision: Revision = None,
    json: Json = False,
) -> None:
    """What an adapter is: kind, ranks, scales, sizes, what it needs, what is suspicious."""
    from qmerge.report import adapter as face

    described = face.describe(adapter, revision)
    typer.echo(jsonlib.dumps(described, indent=1)) if json else face.show(described)


@app.command("verify")
def verify_command(
    out: Annotated[Path, typer.Argument(help="A folder that qmerge wrote.")],
    reload: Annotated[bool, typer.Option("--reload/--no-reload", help="Also load it with transformers.")] = True,
    json: Json = False,
) -> None:  # fmt: skip
    """Check a folder: hashes, headers, index, and that the stock loader loads it with nothing missing or left over."""
    from qmerge import verify

    checks = verify.verify(out, reload)
    if json:
        typer.echo(jsonlib.dumps([{"check": c.name, "ok": c.ok, "found": c.found} for c in checks], indent=1))
    else:
        for check in checks:
            typer.echo(f"{'ok    ' if check.ok else 'FAILED'} {check.name}: {check.found}")
    raise typer.Exit(OK if all(check.ok for check in checks) else 3)


@app.command("report")
def report_command(
    out: Annotated[Path, typer.Argument(help="A folder that qmerge wrote.")],
    html: Annotated[Path | None, typer.Option(help="Write the HTML report here. [default: OUT/qmerge.html]")] = None,
) -> None:  # fmt: skip
    """The HTML report again, from qmerge.json."""
    from qmerge.checkpoint.writer import write_file
    from qmerge.report.html import html_report
    from qmerge.report.json import read_report

    path = html or out / "qmerge.html"
    write_file(path, html_report(read_report(out)).encode())
    typer.echo(str(path))


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
            typer.echo(f"  {name:<18} {line}")


@app.command("demo")
def demo_command(
    out: Annotated[Path | None, typer.Option(help="Keep the merged model here. [default: a temporary folder]")] = None,
) -> None:
    """The whole job on a small trained model that ships with qmerge; no network."""
    from qmerge.demo import run_demo

    run_demo(out)


def given(context: typer.Context, exclude: tuple[str, ...]) -> dict[str, Any]:
    """Options that were given, by recipe key; several adapters are not supported yet."""
    settings = {name: value for name, value in context.params.items() if value is not None and name not in exclude}
    if "adapter" in settings:
        if len(settings["adapter"]) > 1:
            raise RecipeError(f"--adapter was given {len(settings['adapter'])} times: this version merges one adapter")
        settings["adapter"] = settings["adapter"][0]
    return settings


def recipe_of(settings: dict[str, Any]) -> Any:
    from qmerge.recipe import make_recipe

    return make_recipe(settings)


def run_merge(settings: dict[str, Any], resume: bool, json: bool, quiet: bool) -> None:
    from qmerge import run
    from qmerge.report import terminal

    recipe = recipe_of(settings)
    report = run.merge(recipe, resume, terminal.TerminalWatcher(quiet))
    if json:
        typer.echo(report.model_dump_json(indent=1))
    else:
        terminal.out().print(terminal.survival_table(report))
        show_warnings(report.warnings, "")
        terminal.out().print(
            f"Written to {recipe.out} in {report.seconds:.0f} s. Check it with: qmerge verify {recipe.out}"
        )
    raise typer.Exit(exit_code([report], recipe.min_kept))


def show_warnings(lines: list[str], target: str) -> None:
    from qmerge.report import terminal

    watcher = terminal.TerminalWatcher()
    for line in lines:
        watcher.warn(f"{target}: {line}" if target else line)


def exit_code(reports: list[Any], min_kept: float | None) -> int:
    kept = [report.total.values["kept"] for report in reports]
    if min_kept is not None and any(value is not None and value < min_kept for value in kept):
        worst = min(value for value in kept if value is not None)
        print(f"qmerge: kept {worst:.4f} of the delta, --min-kept asks for {min_kept}", file=sys.stderr)
        return BELOW_MIN_KEPT
    return OK


def main() -> None:
    """The console command: errors raised on purpose become one line and their exit code."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        app(standalone_mode=True)
    except QmergeError as error:
        print(f"qmerge: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(
            "qmerge: interrupted; nothing carries a final name that is not whole. Run the same command with --resume to go on",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
