"""Regular expressions that an adapter brings: ``target_modules`` may be one."""

from __future__ import annotations

import re

from qmerge.errors import AdapterError


def matches(pattern: str, module: str) -> bool:
    """Whether the pattern matches the whole name of a module.

    Raises:
        AdapterError: it is not a regular expression.
    """
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error as cause:
        raise AdapterError(f"adapter_config.json has the pattern {pattern!r}, which is not valid: {cause}") from cause
