"""Methods to combine the deltas of several adapters into one delta, one file each.

A plug-in defines ``METHOD``, a ``CombineMethod`` (see ``base.py``), and its docstring's first line is its help text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmerge import plugins

if TYPE_CHECKING:  # this package itself: its import would bring torch before adapters are combined
    from qmerge.combine.base import CombineMethod


def get_method(name: str) -> CombineMethod:
    """The method of that name.

    Raises:
        RecipeError: there is none; the message lists those that exist.
    """
    method: CombineMethod = plugins.load("combine", name).METHOD
    return method
