"""Ways to choose codes on a grid, one file each.

A plug-in defines ``ROUNDING``, a ``Rounding`` (see ``base.py``), and its docstring's first line is its help text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmerge import plugins

if TYPE_CHECKING:  # this package itself: its import would bring torch before a weight is rounded
    from qmerge.rounding.base import Rounding


def get_rounding(name: str) -> Rounding:
    """The rounding of that name.

    Raises:
        RecipeError: there is none; the message lists those that exist.
    """
    rounding: Rounding = plugins.load("rounding", name).ROUNDING
    return rounding
