"""Ways to store a weight, one file each. A format serves as base and as target: what was written is read back.

A plug-in defines ``FORMAT``, a ``Format`` (see ``base.py``), and its docstring's first line is its help text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmerge import plugins

if TYPE_CHECKING:  # this package itself: its import would bring torch before a format is asked for
    from qmerge.formats.base import Format


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        RecipeError: there is none; the message lists those that exist.
    """
    found: Format = plugins.load("formats", name).FORMAT
    return found


def all_formats() -> dict[str, Format]:
    """Every format, by name."""
    return {name: get_format(name) for name in plugins.names("formats")}
