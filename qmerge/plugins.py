"""Plug-ins: a module in a folder of ``KINDS`` is one, and its file name is its name.

Adding one adds one file; its first docstring line is its help text. What is no plug-in: ``base.py`` (what a plug-in
must define), folders, and helpers whose name starts with ``_``.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from types import ModuleType

from qmerge.errors import RecipeError

KINDS = ("formats", "adapters", "rounding", "metrics", "combine")


@cache
def names(kind: str) -> tuple[str, ...]:
    """The plug-ins of one kind (``formats``, ``rounding``, …), sorted; nothing is imported but the empty package."""
    package = importlib.import_module(f"qmerge.{kind}")
    modules = [module for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
    return tuple(sorted(m.name for m in modules if m.name != "base" and not m.name.startswith("_")))


@cache
def load(kind: str, name: str) -> ModuleType:
    """The module ``qmerge.<kind>.<name>``.

    Raises:
        RecipeError: there is none; the message says which there are and what was probably meant.
    """
    if name not in names(kind):
        raise RecipeError(f"no {kind.rstrip('s')} is called {name!r}. {suggestion(name, names(kind))}")
    return importlib.import_module(f"qmerge.{kind}.{name}")


def every(kind: str) -> dict[str, ModuleType]:
    """All plug-ins of one kind, by name."""
    return {name: load(kind, name) for name in names(kind)}


def help_line(kind: str, name: str) -> str:
    return (load(kind, name).__doc__ or "").strip().splitlines()[0]


def suggestion(word: str, known: tuple[str, ...] | list[str]) -> str:
    """``Did you mean 'nf4'? There are: …`` for an unknown name."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return f"{guess}There are: {', '.join(known)}."
