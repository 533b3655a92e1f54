"""Recipe fields → options of the command line: their names, types, defaults and help texts come from ``Recipe``."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from qmerge import plugins
from qmerge.cli.help import HELP_PANEL, MORE_PANELS, help_all
from qmerge.errors import StoppedError
from qmerge.recipe import CHAIN, Recipe

METAVARS = {
    **dict.fromkeys(("base", "adapter", "original"), "ID|DIR"),
    **dict.fromkeys(("revision", "adapter_revision", "original_revision"), "REV"),
    **dict.fromkeys(("max_memory", "max_shard_size", "max_size", "promote"), "SIZE"),
    **dict.fromkeys(("density", "min_kept"), "SHARE"),
    **dict.fromkeys(("patch", "verify"), "FILE"),
    "target": "FORMAT",
    "out": "DIR",
    "calibration": "SOURCE",
    "residual": "RANK",
}
"""What an option's value is called in the help."""

METAVARS_BY_TYPE = {bool: "", int: "N"}
"""The same for other options; a flag has no value. All others are called NAME."""

MOST_USED = ("base", "adapter", "target", "out", "calibration", "rounding", "verify", "min_kept", "device")
"""The first panel of the help, in this order (--resume follows)."""

PANEL_OF_FIELD = {name: panel for panel, names in MORE_PANELS.items() for name in names}

INTERRUPTED = (
    "interrupted. No unfinished file has its final name; the same command with --resume goes on where it stopped."
)


def flag(*names: str, help: str, **more: Any) -> Any:
    """An option without a value; in the help, nothing stands for one."""
    return typer.Option(*names, help=help, metavar="", **more)


Resume = Annotated[bool, flag("--resume", help="go on with an interrupted run in the same --out")]
Json = Annotated[bool, flag("--json", help="print results as JSON on stdout", rich_help_panel=HELP_PANEL)]
Quiet = Annotated[
    bool, flag("--quiet", "-q", help="show no progress; warnings are still shown", rich_help_panel=HELP_PANEL)
]
HelpAll = Annotated[
    bool, flag("--help-all", help="show all options", callback=help_all, is_eager=True, rich_help_panel=HELP_PANEL)
]
MergedFolder = Annotated[Path, typer.Argument(help="a folder that qmerge wrote", metavar="DIR")]


def with_recipe_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command one option per recipe field. Those that are given arrive as ``**settings``.

    The command gets a signature of its own, because typer reads the options from there.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        required, optional = _parameters_of(command)
        parameters = [*required, *(_option(name) for name in _in_panel_order(names)), *optional]

        def call(**arguments: Any) -> None:
            for name in names:
                if arguments[name] is None or arguments[name] == []:
                    del arguments[name]
            arguments.pop("help_all", None)  # its callback has ended the program
            try:
                command(**arguments)
            except KeyboardInterrupt as cause:  # typer would end the process without a word
                raise StoppedError(INTERRUPTED) from cause

        call.__doc__ = command.__doc__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


def _parameters_of(command: Callable[..., None]) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
    """The command's own parameters, without ``**settings``: required and optional ones."""
    required, optional = [], []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        if parameter.default is inspect.Parameter.empty:
            required.append(parameter)
        else:
            optional.append(parameter)
    return required, optional


def _in_panel_order(names: tuple[str, ...]) -> list[str]:
    """The most used ones first, then panel by panel: the help has this order."""
    return [name for name in (*MOST_USED, *PANEL_OF_FIELD) if name in names]


def _option(name: str) -> inspect.Parameter:
    """A recipe field as an option, None where it is not given: then the recipe's default counts."""
    field = Recipe.model_fields[name]
    value_type = _value_type(field.annotation)
    flag = f"--{name.replace('_', '-')}"
    flags = [f"{flag}/--no-{flag[2:]}"] if value_type is bool else [flag]
    description = field.description or ""
    if field.default is not None and not field.is_required():
        default = {True: "yes", False: "no"}.get(field.default, field.default) if value_type is bool else field.default
        description += f" (default: {default})"
    info = typer.Option(
        *flags,
        help=description,
        rich_help_panel=PANEL_OF_FIELD.get(name),
        metavar=METAVARS.get(name) or METAVARS_BY_TYPE.get(value_type, "NAME"),
        autocompletion=_completer(name),
    )
    annotation: Any = Annotated[value_type | None, info]
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


def _value_type(annotation: Any) -> Any:
    """``Literal[…] | None`` → str, ``str | list[str]`` → list[str]: the type that typer parses; pydantic checks the rest."""
    if get_origin(annotation) in (Union, types.UnionType):
        alternatives = [part for part in get_args(annotation) if part is not type(None)]
        return _value_type(alternatives[-1])
    return str if get_origin(annotation) is Literal else annotation


def _completer(field: str) -> Callable[[str], list[str]]:
    """What the shell offers for the value of an option; nothing for values without fixed names."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in _known_values(field) if word.startswith(incomplete)]

    return complete


def _known_values(field: str) -> list[str]:
    if field == "target":
        from qmerge.formats import all_targets  # slow, because it imports torch

        return [*all_targets(), "auto"]
    if field == "rounding":
        return [*plugins.names("rounding"), "auto"]
    if field == "combine":
        return [*plugins.names("combine"), CHAIN]
    annotation = Recipe.model_fields[field].annotation
    alternatives = [annotation, *get_args(annotation)]
    return [word for part in alternatives if get_origin(part) is Literal for word in get_args(part)]
