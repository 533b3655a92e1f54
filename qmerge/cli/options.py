"""Recipe fields → options of the command line: their names, types, defaults and help texts come from ``Recipe``."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from qmerge import plugins
from qmerge.cli.help import HELP_PANEL, MORE_PANELS, help_all
from qmerge.errors import StoppedError
from qmerge.recipe import CHAIN, Recipe

# Field → what the help calls the option's value.
METAVARS = {
    **dict.fromkeys(("base", "adapter", "original"), "ID|DIR"),
    **dict.fromkeys(("revision", "adapter_revision", "original_revision"), "REV"),
    **dict.fromkeys(("max_memory", "max_shard_size", "max_size", "promote"), "SIZE"),
    **dict.fromkeys(("density", "min_kept"), "SHARE"),
    "max_kl_ratio": "RATIO",
    **dict.fromkeys(("patch", "verify"), "FILE"),
    "target": "FORMAT",
    "out": "DIR",
    "calibration": "SOURCE",
    "push_to_hub": "ID",
    "residual": "RANK",
    "workers": "N|ray",
}

# The same for the other options, by type: a flag has no value. All further ones are called NAME.
METAVARS_BY_TYPE = {bool: "", int: "N"}

# The first panel of the help, in this order; --resume follows.
MOST_USED = (
    "base",
    "adapter",
    "target",
    "out",
    "calibration",
    "rounding",
    "verify",
    "min_kept",
    "max_kl_ratio",
    "device",
)

PANEL_OF_FIELD: dict[str, str] = {}
for _panel, _names in MORE_PANELS.items():
    PANEL_OF_FIELD |= dict.fromkeys(_names, _panel)

INTERRUPTED = (
    "interrupted. No unfinished file has its final name; the same command with --resume goes on where it stopped."
)


def flag(*names: str, help: str, **more: Any) -> Any:
    """An option without a value; the help shows no placeholder for one."""
    return typer.Option(*names, help=help, metavar="", **more)


Resume = Annotated[bool, flag("--resume", help="go on with an interrupted run in the same --out")]
Shard = Annotated[
    str | None,
    typer.Option(
        help="write only part i of n of the model, for n processes; then run qmerge finalize OUT",
        metavar="i/n",
        rich_help_panel="Resources",
    ),
]
Json = Annotated[bool, flag("--json", help="print results as JSON on stdout", rich_help_panel=HELP_PANEL)]
Quiet = Annotated[
    bool, flag("--quiet", "-q", help="show no progress; warnings are still shown", rich_help_panel=HELP_PANEL)
]
HelpAll = Annotated[
    bool, flag("--help-all", help="show all options", callback=help_all, is_eager=True, rich_help_panel=HELP_PANEL)
]
Device = Annotated[str, typer.Option(help="compute on this device: auto, cpu or cuda", metavar="NAME")]
MergedFolder = Annotated[Path, typer.Argument(help="a folder that qmerge wrote", metavar="DIR")]


def with_recipe_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command one option per recipe field. Those that are given arrive as ``**settings``.

    The command gets a signature of its own, because typer reads the options from there.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        required, optional = _parameters_of(command)
        parameters = [*required, *(_option(name) for name in _in_panel_order(names)), *optional]

        def call(**arguments: Any) -> None:
            # Options that were not given leave the choice to the recipe file, or to the recipe's defaults.
            for name in names:
                if arguments[name] is None or arguments[name] == []:
                    del arguments[name]
            arguments.pop("help_all", None)  # its callback has ended the program
            try:
                command(**arguments)
            except KeyboardInterrupt as cause:
                if "resume" not in arguments:  # see nothing_to_resume
                    raise
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
    words = name.replace("_", "-")
    flags = f"--{words}/--no-{words}" if value_type is bool else f"--{words}"
    info = typer.Option(
        flags,
        help=f"{field.description}{_default_text(field)}",
        rich_help_panel=PANEL_OF_FIELD.get(name),
        metavar=METAVARS.get(name) or METAVARS_BY_TYPE.get(value_type, "NAME"),
        show_default=False,  # the help text names it; None would say nothing
        autocompletion=_completer(name),
    )
    annotation: Any = Annotated[value_type | None, info]
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


def _default_text(field: FieldInfo) -> str:
    """`` (default: 512)``; empty where there is none: descriptions of such fields say what happens."""
    if field.is_required() or field.default is None:
        return ""
    if isinstance(field.default, bool):
        return f" (default: {'yes' if field.default else 'no'})"
    return f" (default: {field.default})"


def _value_type(annotation: Any) -> Any:
    """``Literal[…] | None`` → str, ``str | list[str]`` → list[str]: the type that typer parses; pydantic checks the rest."""
    if get_origin(annotation) in (Union, types.UnionType):
        alternatives = [part for part in get_args(annotation) if part is not type(None)]
        return _value_type(alternatives[-1])  # the last one is the most general: str | list[str]
    return str if get_origin(annotation) is Literal else annotation


def _completer(field: str) -> Callable[[str], list[str]]:
    """What the shell offers for the value of an option; nothing for values without fixed names."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in known_values(field) if word.startswith(incomplete)]

    return complete


def known_values(field: str) -> list[str]:
    """Names that the value of a recipe field can have; empty where it has no fixed names."""
    if field == "target":
        # Slow, because it imports torch; but names that cannot be written would mislead.
        from qmerge.formats import MIXES, all_targets

        return [*all_targets(), *MIXES, "auto"]
    if field == "rounding":
        return [*plugins.names("rounding"), "auto"]
    if field == "combine":
        return [*plugins.names("combine"), CHAIN]
    annotation = Recipe.model_fields[field].annotation
    for part in (annotation, *get_args(annotation)):  # Literal[…], or Literal[…] | None
        if get_origin(part) is Literal:
            return list(get_args(part))
    return []
