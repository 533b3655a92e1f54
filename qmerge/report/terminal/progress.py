"""Progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing with --quiet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from rich import progress as rich_progress

from qmerge.forecast.warnings import is_same_warning
from qmerge.progress import Progress
from qmerge.report.terminal.console import print_warning, safe, stderr
from qmerge.wording import counted, size_text

SECONDS_BETWEEN_LINES = 10

# Stages of at most so many bytes are not counted in bytes: how much work they are is not known.
UNKNOWN_TOTAL = 1


class TerminalProgress(Progress):
    """Shows the progress of a run, its notes and its warnings."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = stderr()
        self.warned: list[str] = []
        self._bar: rich_progress.Progress | None = None
        self._task = rich_progress.TaskID(0)
        self._label = ""
        self._total = 0
        self._done = 0
        self._started = 0.0
        self._last_line = 0.0

    def stage(self, label: str, total: int) -> None:
        """Begin a stage of ``total`` bytes."""
        self.end()
        self._label = label
        self._total = total
        self._done = 0
        self._started = self._last_line = time.monotonic()
        if self.quiet or total == 0:
            return
        if self.console.is_terminal:
            self._bar = rich_progress.Progress(*self._columns(), console=self.console, transient=True)
            self._task = self._bar.add_task(label, total=total if self._is_counted else None)
            self._bar.start()

    def advance(self, nbytes: int, label: str = "") -> None:
        """So many bytes more are done. Without bytes, ``label`` says which part of the work is being done."""
        self._done += nbytes
        part = label if not nbytes else ""
        # A bar is updated at once; where there is none, a line every few seconds is enough for a log.
        if self._bar:
            self._bar.update(self._task, advance=nbytes, description=part or None)
        elif not self.quiet and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            line = self._line(part)
            if line:
                self.console.print(safe(line))

    def note(self, line: str) -> None:
        """Show a note; not with --quiet."""
        if not self.quiet:
            self.console.print(safe(line))

    def warn(self, line: str) -> None:
        """Show a warning; with --quiet, too."""
        self.warned.append(line)
        print_warning(line, self.console)

    def end(self) -> None:
        """The last stage is over: remove the bar."""
        if self._bar:
            with suppress(Exception):  # a broken terminal must not hide the error that ended the work
                self._bar.stop()
            self._bar = None

    def warn_again(self, lines: Sequence[str]) -> None:
        """After the run: warnings that are new are shown in full. Those that were shown before it, predicted, are counted."""
        shown = list(self.warned)
        repeated = 0
        for line in lines:
            if any(is_same_warning(line, other) for other in shown):
                repeated += 1
            else:
                self.warn(line)
        if repeated and not self.quiet:
            self.console.print(f"[yellow]{counted(repeated, 'warning')} above.[/yellow]")

    @property
    def _is_counted(self) -> bool:
        return self._total > UNKNOWN_TOTAL

    def _columns(self) -> list[rich_progress.ProgressColumn]:
        """Bytes, rate and time left are shown where the number of bytes is known."""
        columns: list[rich_progress.ProgressColumn] = [
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
        ]
        if self._is_counted:
            columns += [
                rich_progress.DownloadColumn(),
                rich_progress.TransferSpeedColumn(),
                rich_progress.TimeRemainingColumn(),
            ]
        return columns

    def _line(self, part: str) -> str:
        """``merging: 1.21 MB of 2.08 MB, 120.10 kB/s, 7 s left``, with the name of the part that is being done in place of the
        amount; without the time, where the amount of work is not known."""
        if not self._is_counted or not self._done:
            return part
        rate = self._done / (self._last_line - self._started)
        amount = f"{self._label}: {size_text(self._done)} of {size_text(self._total)}, {size_text(rate)}/s"
        return f"{part or amount}, {(self._total - self._done) / rate:.0f} s left"
