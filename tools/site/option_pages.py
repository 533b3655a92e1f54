"""The page of every option, made of the command line itself."""

from __future__ import annotations

from typing import Any

import typer
from markup import cell, table

from qmerge.cli import app
from qmerge.recipe import Recipe

FIRST_PANEL = "Most used"
HEAD = """# Every option

The same settings are options of the command line, keys of a [recipe](recipes.md) and arguments in [Python](python.md):
`--max-shard-size 5GB`, `max_shard_size: 5GB`, `max_shard_size="5GB"`. A switch has two forms on the command line
(`--sym`, `--no-sym`), and is `true` or `false` in a recipe. `qmerge recipe` prints a recipe with all of them.

This page is made of the program.
"""


def options() -> str:
    """Markdown: the settings of a merge by subject, then every command with its own options."""
    program: Any = typer.main.get_command(app)
    parts = [HEAD]
    for panel, params in panels(program).items():
        parts.append(f"## {panel}\n\n{table(('option', 'what it does'), [row(param) for param in params])}")
    parts.append(
        "## Commands\n\nOptions of a merge are those above; `COMMAND --help-all` lists which of them a command takes."
    )
    for name, command in sorted(program.commands.items()):
        parts.append(command_section(name, command))
    return "\n\n".join(parts) + "\n"


def panels(program: Any) -> dict[str, list[Any]]:
    """Panel of the help → its options, in the order of the help."""
    found: dict[str, list[Any]] = {}
    for param in program.params:
        if param.name not in ("install_completion", "show_completion"):
            found.setdefault(param.rich_help_panel or FIRST_PANEL, []).append(param)
    return found


def row(param: Any) -> tuple[str, str]:
    """An option and what it does."""
    names = ", ".join([*param.opts, *param.secondary_opts])
    value = param.metavar or ""
    return f"`{f'{names} {value}'.strip()}`", cell(param.help or "")


def command_section(name: str, command: Any) -> str:
    """A command: what it does, and the options and arguments that are its own."""
    own = [param for param in command.params if param.name not in {*Recipe.model_fields, "help_all"}]
    rows = []
    for param in own:
        if param.param_type_name == "argument":
            rows.append((f"`{param.metavar or param.name.upper()}`", cell(param.help or "")))
        else:
            rows.append(row(param))
    lines = [f"### qmerge {name}", cell(command.help or "")]
    if len(own) < len(command.params) - 1:
        lines.append(f"Takes {len(command.params) - 1 - len(own)} options of a merge, too.")
    if rows:
        lines.append(table(("own options", "what it does"), rows))
    return "\n\n".join(lines)
