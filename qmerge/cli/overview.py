"""The commands that show what qmerge can do: formats, demo."""

from __future__ import annotations

import json as jsonlib
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from qmerge import plugins
from qmerge.cli.options import Json
from qmerge.recipe import CHAIN, CHAIN_HELP

NAME_WIDTH = 18


def formats_command(json: Json = False) -> None:
    """List formats, adapter kinds, ways to combine, roundings, metrics."""
    help_lines = {kind: _help_lines(kind) for kind in plugins.KINDS}
    if json:
        typer.echo(jsonlib.dumps(help_lines, indent=1, ensure_ascii=False))
        return
    for kind, lines in help_lines.items():
        typer.echo(kind)
        for name, line in lines.items():
            typer.echo(_entry(name, line))


def _help_lines(kind: str) -> dict[str, str]:
    """Name → help line of every plug-in of one kind; for ``combine`` also of chain, which is no plug-in."""
    lines = {name: plugins.help_line(kind, name) for name in plugins.names(kind)}
    if kind == "combine":
        lines[CHAIN] = CHAIN_HELP
    return lines


def _entry(name: str, line: str) -> str:
    """One name with its help, wrapped on a terminal; the help may repeat the name, which is shown once."""
    from qmerge.report.terminal.console import stdout

    text = f"  {name:<{NAME_WIDTH}} {line.removeprefix(f'{name}: ').removeprefix(f'{name} = ')}"
    console = stdout()
    if not console.is_terminal:
        return text
    return textwrap.fill(text, console.width, subsequent_indent=" " * (NAME_WIDTH + 3))


def demo_command(
    out: Annotated[
        Path | None, typer.Option(help="keep the merged models in this folder (default: deleted)", metavar="DIR")
    ] = None,
) -> None:
    """Run the whole job on a small model that ships with qmerge."""
    from qmerge.demo import run_demo

    run_demo(out)
