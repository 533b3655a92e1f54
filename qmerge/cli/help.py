"""``--help`` with the options that most people use, ``--help-all`` with all of them.

All options stay known to the parser and to shell completion; the others are hidden only while the help is printed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from qmerge import hub, plugins
from qmerge.cli.habits import hint, names_a_folder
from qmerge.cli.output import nothing_to_resume
from qmerge.errors import RecipeError
from qmerge.report.environment import check_environment
from qmerge.schema import NAME as REPORT_NAME

HELP_PANEL = "Help and output"
# Panel of --help-all → its options. Every other option of a recipe is in the first panel of --help.
MORE_PANELS = {
    "Inputs": ("revision", "adapter_revision", "allow_pickle", "original", "original_revision", "trained_on"),
    "Several adapters": ("combine", "density"),
    "Output": ("patch", "max_size", "max_shard_size", "residual", "promote", "continuations"),
    "Hub": ("push_to_hub", "private"),
    "Merging and rounding": ("merge_onto", "scales", "seed"),
    "Calibration": ("effort", "calibration_tokens", "sequence_length", "sequential"),
    "How a format is stored": (
        "block_size", "double_quant", "quant_storage", "bits", "group_size", "sym", "act_order", "static_groups",
        "checkpoint_format",
    ),
    "Resources": ("workers", "max_memory"),
}  # fmt: skip

COMPLETION_OPTIONS = ("install_completion", "show_completion")

# Key in click's meta, where --help-all tells format_help what to show.
_SHOW_ALL = "qmerge.help_all"


class Command(TyperCommand):
    """A command whose help is short, and that Ctrl-C ends with one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options. Options of other tools lead to ours."""
        with _unknown_options(self, ctx, tuple(args)):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. One that can go on after Ctrl-C raises an error of its own, which says how."""
        with nothing_to_resume():  # typer would end the process without a word
            check_environment()
            return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help; the rarely used options only with --help-all."""
        with _rare_options_hidden(self, ctx):
            super().format_help(ctx, formatter)


class Group(TyperGroup):
    """The program itself, whose help is short, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options. Options of other tools lead to ours."""
        with _unknown_options(self, ctx, tuple(args)):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that is named first.

        Raises:
            RecipeError: there is none of that name.
        """
        name = args[0]
        if self.get_command(ctx, name) is None:
            raise RecipeError(_no_command(name, self.list_commands(ctx)))
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help; the rarely used options only with --help-all."""
        with _rare_options_hidden(self, ctx):
            super().format_help(ctx, formatter)


@contextmanager
def _unknown_options(command: Any, ctx: Any, args: tuple[str, ...]) -> Iterator[None]:
    """Inside, an option that the command does not have is an error of one line, with a hint.

    Args:
        args: as typed: the parser takes them away from its list.

    Raises:
        RecipeError: there is such an option.
    """
    try:
        yield
    except Exception as cause:
        # Of click, or of the copy of it in newer versions of typer: their classes have only the name in common.
        if type(cause).__name__ != "NoSuchOption":
            raise
        known = {name for param in command.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
        name = str(getattr(cause, "option_name", ""))
        lists_all = f"{ctx.command_path} {'--help-all' if '--help-all' in known else '--help'} lists all of them"
        advice = _without_option(command, ctx, name, args)
        advice = advice or hint(name, {option for option in known if option.startswith("--")})
        raise RecipeError(f"no such option {name}: {advice or lists_all}") from cause


def _without_option(command: Any, ctx: Any, name: str, args: tuple[str, ...]) -> str:
    """How to give a folder to a command that takes it without an option; empty for other commands and options."""
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    if not arguments or not names_a_folder(name):
        return ""
    values = [" ".join((param.metavar or param.name).upper() for param in arguments)]
    after = args[args.index(name) + 1 :] if name in args else ()
    # One folder was typed, and one is expected: it is shown in its place.
    if len(arguments) == 1 and after and not after[0].startswith("-"):
        values = [after[0]]
    return f"give it without an option: {ctx.command_path} {' '.join(values)}"


@contextmanager
def _rare_options_hidden(command: Any, ctx: Any) -> Iterator[None]:
    """Inside, a help text leaves out the rarely used options, unless all are wanted; a line below it says how many they are."""
    hidden = _hide(command.get_params(ctx), ctx)
    try:
        yield
    finally:
        for param in hidden:
            param.hidden = False
    if hidden:
        typer.echo(f" {len(hidden)} more options: {ctx.command_path} --help-all\n")


def _no_command(name: str, commands: list[str]) -> str:
    """What is wrong with the first word of a command line, and what to do."""
    # First: a recipe's path may exist, or look like an id on the Hub (recipes/my.yaml).
    if Path(name).suffix in (".yaml", ".yml"):
        return f"{name} is not a command: a recipe is run with qmerge run FILE"
    folder = Path(name)
    if (folder / REPORT_NAME).is_file():
        return f"{name} is not a command: to check this merged model, qmerge verify {name}"
    if (folder / "config.json").is_file() and not (folder / hub.ADAPTER_CONFIG).is_file():
        return (
            f"{name} is not a command: to merge an adapter into this model, "
            f"qmerge --base {name} --adapter DIR --target nf4 --out DIR"
        )
    if folder.exists() or hub.HUB_ID.fullmatch(name):
        return f"{name} is not a command: to merge this adapter, qmerge --adapter {name} --target nf4 --out DIR"
    return f"no command is called {name!r}. {plugins.suggestion(name, commands)}"


def reflowed(docstring: str | None) -> str:
    """A docstring with one line per paragraph: typer keeps line breaks, and would wrap in the wrong places."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def help_all(context: typer.Context, wanted: bool) -> None:
    """The callback of ``--help-all``."""
    if wanted:
        context.meta[_SHOW_ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


def _hide(params: list[Any], ctx: Any) -> list[Any]:
    """Hide the rarely used options, unless all are wanted; returns those that were hidden."""
    for param in params:
        if param.name in ("help", *COMPLETION_OPTIONS):  # made by typer, without a panel
            param.rich_help_panel = HELP_PANEL
            param.metavar = ""
        if param.name == "help":
            param.help = "show this help"
    if ctx.meta.get(_SHOW_ALL):
        return []
    hidden = [param for param in params if _is_rare(param)]
    for param in hidden:
        param.hidden = True
    return hidden


def _is_rare(param: Any) -> bool:
    if getattr(param, "hidden", False):
        return False
    return param.name in COMPLETION_OPTIONS or getattr(param, "rich_help_panel", None) in MORE_PANELS
