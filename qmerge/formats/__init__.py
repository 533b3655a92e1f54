"""Ways to store a weight, one file each. All are read, most are written too: written weights are read back to measure them.

A plug-in defines ``FORMAT``, a ``Format`` or a ``TargetFormat`` (see ``base``). The first line of its docstring is its help
text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmerge import plugins
from qmerge.errors import RecipeError

if TYPE_CHECKING:  # at run time this would import torch before a format is asked for
    from qmerge.formats.base import Format, TargetFormat


def get_format(name: str) -> Format[Any]:
    """The format of that name.

    Raises:
        RecipeError: no format has that name; the message lists those that exist.
    """
    plugin: Format[Any] = plugins.load("formats", name).FORMAT
    return plugin


def get_target(name: str) -> TargetFormat[Any]:
    """The format of that name, which qmerge can write.

    Raises:
        RecipeError: no target has that name; the message lists those that exist.
    """
    from qmerge.formats.base import TargetFormat

    fmt = get_format(name) if name in plugins.names("formats") else None
    if isinstance(fmt, TargetFormat):
        return fmt
    raise RecipeError(f"no target is called {name!r}. {plugins.suggestion(name, list(all_targets()))}")


def all_formats() -> dict[str, Format[Any]]:
    """Every format, by name."""
    return {name: get_format(name) for name in plugins.names("formats")}


def all_targets() -> dict[str, TargetFormat[Any]]:
    """Every format that qmerge can write, by name."""
    from qmerge.formats.base import TargetFormat

    return {name: fmt for name, fmt in all_formats().items() if isinstance(fmt, TargetFormat)}
