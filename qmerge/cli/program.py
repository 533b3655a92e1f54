"""The console program: its commands, and what becomes of errors."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from qmerge import hub
from qmerge.cli import checking, folders, merging, overview, recipe_file
from qmerge.cli.help import HELP_PANEL, Command, Group, reflowed
from qmerge.cli.options import HelpAll, Json, Quiet, Resume, Shard, flag, with_recipe_options
from qmerge.cli.output import nothing_to_resume
from qmerge.errors import CLOSED_PIPE, QmergeError, RecipeError
from qmerge.recipe import Recipe
from qmerge.report.environment import check_environment, version_lines
from qmerge.safetensors_io.disk import failure_of_machine

EXIT_CODES = (
    "Exit codes: 0 done; 1 a bug; 2 command line or recipe; 3 input files; 4 numbers that the target cannot hold; "
    "5 done, but past --min-kept or --max-kl-ratio; 6 no room on the disk or in memory; 7 the disk failed; 8 the Hub cannot be "
    "reached, or refused; 130 interrupted (--resume goes on)."
)

SECONDS_TO_RETRY = 0.01
"""When an interruption is tried again that came while a thread was being started."""

app = typer.Typer(
    cls=Group,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Merge": {
        "merge": merging.merge_command,
        "run": merging.run_command,
        "recipe": recipe_file.recipe_command,
        "finalize": merging.finalize_command,
        "plan": merging.plan_command,
        "measure": merging.measure_command,
    },
    "Look and check": {
        "inspect": checking.inspect_command,
        "verify": checking.verify_command,
        "report": checking.report_command,
        "compare": checking.compare_command,
        "formats": overview.formats_command,
        "demo": overview.demo_command,
    },
    "Convert": {
        "patch": folders.patch_command,
        "apply": folders.apply_command,
        "unmerge": folders.unmerge_command,
        "extract": folders.extract_command,
        "gguf": folders.gguf_command,
        "push": folders.push_command,
    },
}


@app.callback(invoke_without_command=True)
@with_recipe_options(*Recipe.model_fields)
def root(
    context: typer.Context,
    resume: Resume = False,
    shard: Shard = None,
    json: Json = False,
    quiet: Quiet = False,
    version: Annotated[
        bool,
        flag(
            "--version",
            help="show the versions of libraries, and the device",
            rich_help_panel=HELP_PANEL,
        ),
    ] = False,
    help_all: HelpAll = False,
    **settings: Any,
) -> None:
    """Merge QLoRA adapters into quantized models and measure how much of the fine-tuning survives.

    [bold]qmerge --adapter ID|DIR --target nf4 --out DIR[/bold]
    """
    flags = {"resume": resume, "json": json, "quiet": quiet}
    if shard is not None:
        flags["shard"] = True
    options = [*settings, *(name for name, given in flags.items() if given)]
    if version:
        for line in version_lines():
            typer.echo(line)
    elif context.invoked_subcommand is not None:
        if options:  # they would be ignored without a word
            flag = f"--{options[0].replace('_', '-')}"
            raise RecipeError(f"{flag} belongs after the command: qmerge {context.invoked_subcommand} {flag} …")
    elif not settings:
        if options:
            raise RecipeError(
                f"--{options[0]} alone does nothing: a merge needs --adapter, --target and --out; to go on with an "
                f"interrupted one, repeat its whole command with --resume"
            )
        typer.echo(context.get_help())
    else:
        check_environment()
        merging.run_merge(settings, resume=resume, shard=shard, json=json, quiet=quiet)


for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, cls=Command, rich_help_panel=panel, help=reflowed(command.__doc__))(command)


def main() -> None:
    """The console program. An error that is raised on purpose becomes one line and its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    _replace_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in the background of a shell
        signal.signal(signal.SIGINT, _interrupt)
    # torch reads this with its first tensor: large tensors get large pages (Linux): a calibration takes 5 % less CPU time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # they report optional kernels that are missing
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        # Ctrl-C before a command begins. Commands handle it themselves.
        with hub.one_commit_each(), nothing_to_resume():
            app(prog_name="qmerge")  # also for python -m qmerge
    except SystemExit as ended:
        # typer and rich end with 1 then, which is the code of a bug.
        if isinstance(ended.__context__, BrokenPipeError):
            sys.exit(CLOSED_PIPE)
        raise
    except QmergeError as error:
        _end_with(error)
    except (OSError, MemoryError, RuntimeError) as cause:
        failure = failure_of_machine(cause)
        if failure is None:
            raise
        _end_with(failure)


def _replace_closed_streams() -> None:
    """Where stdout or stderr is closed (``>&-``), Python has None, and everything that prints would fail."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # until the end of the process
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def _end_with(error: QmergeError) -> NoReturn:
    print(f"qmerge: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _interrupt(_: int, frame: FrameType | None) -> None:
    """SIGTERM and Ctrl-C end a run; a moment later, where a thread is being started."""
    # A pool does not know of a thread whose start is interrupted, never ends it, and so the process would never end.
    while frame is not None:
        if frame.f_code is ThreadPoolExecutor.submit.__code__:
            signal.signal(signal.SIGALRM, _interrupt)
            signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_RETRY)
            return
        frame = frame.f_back
    raise KeyboardInterrupt
