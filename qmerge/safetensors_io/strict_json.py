"""JSON objects without duplicate keys. (Importing this does not import torch, unlike the rest of the folder.)"""

from __future__ import annotations

import json
import re
from typing import Any

from qmerge.errors import InputError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character: valid in JSON, but it cannot be encoded, so that such a name or text could not be written again."""


def strict_json(text: bytes, name: str, error: type[InputError]) -> dict[str, Any]:
    """A JSON object without duplicate keys.

    Args:
        name: of the file or part, for messages.

    Raises:
        error: it is not JSON, not an object, or has a duplicate key.
    """

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise error(f"{name}: duplicate key {key!r}; expected every key once")
            result[key] = value
        return result

    try:
        value = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as cause:
        raise error(f"{name}: not valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise error(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value
