"""Plug-ins: a module in a folder of ``KINDS`` is one, and its file name is its name.

Adding a plug-in adds one file. The first line of its docstring is its help text. Folders, ``base.py`` and modules whose names
start with ``_`` are not plug-ins: they hold what a plug-in must define, and helpers.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from types import ModuleType

from qmerge.errors import RecipeError

# Folders of plug-ins.
KINDS = ("formats", "adapters", "rounding", "metrics", "combine")


@cache
def names(kind: str) -> tuple[str, ...]:
    """Sorted names of the plug-ins of one kind. No plug-in is imported, only its folder's ``__init__``."""
    package = importlib.import_module(f"qmerge.{kind}")
    found = []
    for module in pkgutil.iter_modules(package.__path__):
        is_helper = module.ispkg or module.name == "base" or module.name.startswith("_")
        if not is_helper:
            found.append(module.name)
    return tuple(sorted(found))


@cache
def load(kind: str, name: str) -> ModuleType:
    """The module ``qmerge.<kind>.<name>``.

    Raises:
        RecipeError: no plug-in has that name; the message lists those that exist and suggests the closest one.
    """
    if name not in names(kind):
        raise RecipeError(f"no {kind.rstrip('s')} is called {name!r}. {suggestion(name, names(kind))}")
    return importlib.import_module(f"qmerge.{kind}.{name}")


def every(kind: str) -> dict[str, ModuleType]:
    """All plug-ins of one kind, by name."""
    return {name: load(kind, name) for name in names(kind)}


def help_line(kind: str, name: str) -> str:
    """The first line of a plug-in's docstring."""
    docstring = load(kind, name).__doc__ or ""
    return docstring.strip().splitlines()[0]


def closest(word: str, known: Sequence[str]) -> str | None:
    """The known name that an unknown one was probably meant to be; None where none is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return close[0] if close else None


def suggestion(word: str, known: Sequence[str]) -> str:
    """``Did you mean 'nf4'? There are: …`` for an unknown name."""
    close = closest(word, known)
    guess = "" if close is None else f"Did you mean {close!r}? "
    return f"{guess}There are: {', '.join(known)}."
