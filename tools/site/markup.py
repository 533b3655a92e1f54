"""Text → Markdown that shows exactly this text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

SPECIAL = {ord(char): f"&#{ord(char)};" for char in r"\`*_{}[]()#+-.!|~<>&"}
"""Characters that Markdown or HTML may read as something else."""


def literal(text: str) -> str:
    """Text that no Markdown rule touches, for use inside HTML tags."""
    return text.translate(SPECIAL)


def cell(text: str) -> str:
    """Text for one line of Markdown, such as a cell of a table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;").replace("*", "&#42;")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)
