"""Adapters: their kinds (one file each), how they are read, how they change a weight, and how several become one.

A plug-in defines ``KIND``, an ``AdapterKind`` (see ``base.py``), and its docstring's first line is its help text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmerge import plugins

if TYPE_CHECKING:  # this package itself: its import would bring torch before an adapter is read
    from qmerge.adapters.base import AdapterKind


def get_kind(name: str) -> AdapterKind:
    """The adapter kind of that name.

    Raises:
        RecipeError: there is none; the message lists those that exist.
    """
    kind: AdapterKind = plugins.load("adapters", name).KIND
    return kind


def all_kinds() -> dict[str, AdapterKind]:
    """Every adapter kind, by name."""
    return {name: get_kind(name) for name in plugins.names("adapters")}
