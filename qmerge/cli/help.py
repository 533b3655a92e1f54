"""``--help`` with the options that most people use, ``--help-all`` with all of them.

All options stay known to the parser and to shell completion; the others are hidden only while the help is printed.
"""

from __future__ import annotations

import inspect
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from qmerge.cli.output import nothing_to_resume
from qmerge.report.environment import check_environment

HELP_PANEL = "Help and output"
# Panel of --help-all → its options. Every other option of a recipe is in the first panel of --help.
MORE_PANELS = {
    "Inputs": ("revision", "adapter_revision", "allow_pickle", "original", "original_revision", "trained_on"),
    "Several adapters": ("combine", "density"),
    "Output": ("patch", "max_size", "max_shard_size", "residual", "promote"),
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

    def invoke(self, ctx: Any) -> Any:
        """Run the command. One that can go on after Ctrl-C raises an error of its own, which says how."""
        with nothing_to_resume():  # typer would end the process without a word
            check_environment()
            return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help; the rarely used options only with --help-all."""
        hidden = _hide(self.get_params(ctx), ctx)
        try:
            super().format_help(ctx, formatter)
        finally:
            _show(hidden)
        _name_help_all(hidden, ctx)


class Group(TyperGroup):
    """The program itself, whose help is short, too."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help; the rarely used options only with --help-all."""
        hidden = _hide(self.get_params(ctx), ctx)
        try:
            super().format_help(ctx, formatter)
        finally:
            _show(hidden)
        _name_help_all(hidden, ctx)


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


def _show(params: list[Any]) -> None:
    for param in params:
        param.hidden = False


def _name_help_all(hidden: list[Any], ctx: Any) -> None:
    if hidden:
        typer.echo(f" {len(hidden)} more options: {ctx.command_path} --help-all\n")
