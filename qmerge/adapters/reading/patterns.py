"""Regular expressions that an adapter brings: in ``target_modules``, ``rank_pattern`` and ``alpha_pattern``.

They are matched with a time limit: an expression of a few characters can take for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import regex

from qmerge.errors import AdapterError

SECONDS = 0.2
"""Longest time for one expression and one name; an ordinary one takes microseconds."""

TRIES = 2
"""An ordinary expression may also take long, on a machine that is busy with something else: but not twice."""


def matches(pattern: str, module: str) -> bool:
    """Whether the pattern matches the whole name of a module.

    Raises:
        AdapterError: it is not a regular expression, or takes too long.
    """
    try:
        for _ in range(TRIES):
            with suppress(TimeoutError):
                return regex.fullmatch(pattern, module, timeout=SECONDS) is not None
    except (regex.error, RecursionError) as cause:
        raise AdapterError(
            f"adapter_config.json has the pattern {pattern[:80]!r}, which is not valid: {cause}"
        ) from cause
    raise AdapterError(
        f"adapter_config.json has the pattern {pattern[:80]!r}, which takes more than {SECONDS:g} s for {module}: simplify it"
    )


def first_matching(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern that matches the end of a module's name, after a dot or from its beginning: peft's rule for
    ``rank_pattern`` (peft/utils/other.py, get_pattern_key).

    Raises:
        AdapterError: as ``matches``.
    """
    for pattern in patterns:
        if matches(rf"(.*\.)?({pattern})", module):
            return pattern
    return None
