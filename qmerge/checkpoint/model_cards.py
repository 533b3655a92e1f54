"""README.md of a model or an adapter: the few fields of its metadata that qmerge uses. A card is a help, never an error."""

from __future__ import annotations

import re
from pathlib import Path

from qmerge.checkpoint.documents import LONGEST_NAME
from qmerge.checkpoint.plain_yaml import plain_mapping

READ_BYTES = 2**20
"""Bytes of a card that are read; its metadata is at the beginning."""

LARGEST_FIELDS = 2**14
"""Characters of the fields that are parsed: a licence and names of data sets."""

MOST_VALUES = 100
"""Values of one field."""

FENCE = "---"
"""The line before and after the metadata."""

FIELD = re.compile(r"([\w-]+)\s*:")
"""The beginning of a field at the outermost level."""


def card_fields(folder: Path, wanted: tuple[str, ...]) -> dict[str, str | list[str]]:
    """Some fields of the metadata of a folder's README.md, as ``fields_of_card``."""
    return fields_of_card(card_text(folder), wanted)


def fields_of_card(card: str, wanted: tuple[str, ...]) -> dict[str, str | list[str]]:
    """Some fields of a card's metadata. Fields that are asked for together are missing together where one is no YAML.

    Args:
        card: from ``card_text``.
        wanted: names of fields, in the order of the result.

    Returns:
        Name → a text, or a list of texts. Fields that are missing or hold anything else are left out: nobody has checked what
        strangers write there.
    """
    content = plain_mapping(_fields_as_text(card, wanted), LARGEST_FIELDS)
    # In the order asked for, not in that of the card: outputs depend on it.
    fields: dict[str, str | list[str]] = {}
    for name in wanted:
        value = content.get(name)
        if value and (_is_line(value) or _is_list_of_lines(value)):
            fields[name] = value
    return fields


def card_text(folder: Path) -> str:
    """The first part of a folder's README.md; "" where there is none."""
    path = folder / "README.md"
    try:
        if not path.is_file():  # a pipe would be waited for
            return ""
        with path.open("rb") as file:
            return file.read(READ_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _fields_as_text(card: str, wanted: tuple[str, ...]) -> str:
    """The lines of the metadata that belong to the wanted fields.

    Only they are parsed: cards of embedding models hold a megabyte of benchmark results, which takes seconds.
    """
    lines = iter(card.lstrip().splitlines())
    if next(lines, "").rstrip() != FENCE:
        return ""
    kept: list[str] = []
    is_wanted = False
    for line in lines:
        # The second fence: all after it is text for people.
        if line.rstrip() == FENCE:
            return "\n".join(kept)
        # Lines of nested values are indented, or begin with a dash: they belong to the field before.
        field = FIELD.match(line)
        if field:
            is_wanted = field[1] in wanted
        if is_wanted:
            kept.append(line)
    return ""  # the metadata has no end


def _is_line(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_NAME and value.isprintable()


def _is_list_of_lines(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MOST_VALUES and all(map(_is_line, value))
