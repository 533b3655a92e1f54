"""Texts of the command line and of recipes that mean more than themselves: sizes, weights and revisions in names."""

from __future__ import annotations

import re
from typing import Any

from qmerge import hub
from qmerge.errors import RecipeError
from qmerge.recipe.choices import INPUTS, REVISIONS

LARGEST_SIZE = 2**63 - 1
"""Bytes; no file system has more."""

SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", re.IGNORECASE)
# Decimal units are those of huggingface_hub (max_shard_size="5GB"); binary ones have an i.
BYTES_OF_UNIT = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_size(text: str) -> int:
    """A size in words → bytes: ``5GB``, ``512MiB``, ``5G`` (decimal), or a plain number of bytes.

    Raises:
        RecipeError: the text is not a size, or zero, or larger than any disk.
    """
    match = SIZE.fullmatch(text)
    if match:
        unit = match[2].lower()
        if not unit.endswith("b"):
            unit += "b"  # 5G is 5GB, and a number alone is bytes
        # Infinity, where the number has hundreds of digits.
        nbytes = float(match[1]) * BYTES_OF_UNIT.get(unit, 0)
        if 1 <= nbytes <= LARGEST_SIZE:
            return int(nbytes)
    raise RecipeError(f"size {text[:80]!r}: expected a number with kB, MB, GB or TB, such as 5GB")


def split_weight(adapter: str) -> tuple[str, float]:
    """``folder=0.7`` → (folder, 0.7). Without a number after the last ``=``, the weight is 1."""
    name, equals, number = adapter.rpartition("=")
    if not equals:
        return adapter, 1.0
    try:
        return name, float(number)
    except ValueError:  # the = belongs to the name
        return adapter, 1.0


def with_revisions(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which the revisions of ids have fields of their own.

    Several adapters have one such field. Where they have different revisions, these stay in their names.

    Raises:
        RecipeError: a name has another revision than the field.
    """
    settings = dict(settings)
    for name, revision_name in zip(INPUTS, REVISIONS, strict=True):
        value = settings.get(name)
        several = value if isinstance(value, (list, tuple)) else [value]
        references = [reference for reference in several if isinstance(reference, str)]
        if len(references) != len(several):  # a path, or something that pydantic refuses
            continue
        pairs = [hub.split_revision(reference) for reference in references]
        found = {revision for _, revision in pairs}
        if len(found) != 1:
            continue
        (revision,) = found
        ids = [reference for reference, _ in pairs]
        settings[name] = ids[0] if isinstance(value, str) else ids
        given = settings.get(revision_name)
        if revision is None:
            continue
        if given not in (None, revision):
            raise RecipeError(f"{name}: two revisions are given, {revision} in its name and {given}; expected one")
        settings[revision_name] = revision
    return settings
