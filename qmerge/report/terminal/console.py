"""The two streams of the terminal, and text from files made safe for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.jupyter import JupyterMixin
from rich.markup import escape
from rich.table import Table
from rich.text import Text


def stdout() -> Console:
    """For results. Lines are not wrapped when the output goes to a file or a pipe."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())


def stderr() -> Console:
    """For progress, warnings and errors. Lines are not wrapped when they go to a file or a pipe."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())


def printable(text: str) -> str:
    """The text without control and direction characters: names come from files, and none of them may steer a terminal."""
    return "".join(character for character in text if character.isprintable() or character == "\n")


def safe(text: str) -> str:
    """A text from a file, for rich: printable, and with its square brackets as they are."""
    return escape(printable(text))


def print_warning(text: str, console: Console | None = None) -> None:
    """One warning on stderr. ``console``: the one that shows a progress bar, so that the bar stays below the warning."""
    (console or stderr()).print(f"[yellow]warning:[/yellow] {safe(text)}")


def make_table(title: str, columns: Sequence[str]) -> Table:
    """An empty table. Its first column holds names, the others hold numbers, aligned to the right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right")
    return table


@dataclass(frozen=True)
class NotedTable(JupyterMixin):
    """A table with lines below it that explain its columns; a notebook shows it, too.

    A caption of rich's would be wrapped to the width of the table, which may be narrow.
    """

    table: Table
    lines: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table
        for line in self.lines:
            yield Text(line, style="dim italic")


def with_notes(table: Table, notes: Sequence[tuple[str, str]], lines: Sequence[str] = ()) -> NotedTable:
    """A table with an explanation of its columns (name, meaning), and further lines."""
    width = max(len(name) for name, _ in notes)
    explained = [f"  {name:<{width}}  {meaning}" for name, meaning in notes]
    return NotedTable(table, (*explained, *lines))
