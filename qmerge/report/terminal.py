"""The terminal: progress and warnings on stderr, tables on stdout, at most 80 columns wide where they can be."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from qmerge.advice import percent, times
from qmerge.predict import Survival, total_kept
from qmerge.report.json import GroupRecord, ReportData

SECONDS_BETWEEN_LINES = 10


def out() -> Console:
    return Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())


def err() -> Console:
    return Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())


class TerminalWatcher:
    """A bar with rate and time left on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.console = quiet, err()
        self._bar: Progress | None = None
        self._label, self._total, self._done, self._started, self._said = "", 0, 0, 0.0, 0.0

    def stage(self, label: str, total: int) -> None:
        self.end()
        self._label, self._total, self._done = label, total, 0
        self._started = self._said = time.monotonic()
        if self.quiet or total == 0:
            return
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(label, total=total)
            self._bar.start()

    def advance(self, nbytes: int, label: str = "") -> None:
        self._done += nbytes
        if self._bar:
            self._bar.advance(self._task, nbytes)
        elif not self.quiet and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            rate = self._done / (self._said - self._started)
            left = (self._total - self._done) / rate if rate else 0
            self.console.print(
                f"{self._label}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left"
            )

    def warn(self, line: str) -> None:
        self.console.print(f"[yellow]warning:[/yellow] {escape(printable(line))}")

    def end(self) -> None:
        if self._bar:
            with suppress(Exception):
                self._bar.stop()
            self._bar = None


def printable(text: str) -> str:
    """Names come from files: no control or direction characters reach the terminal."""
    return "".join(c for c in text if c.isprintable() or c == "\n")


def survival_table(report: ReportData) -> Table:
    """What survived, by kind of module."""
    table = Table(title=f"What survived in {report.recipe['target']}", title_justify="left", title_style="bold")
    table.add_column("modules")
    for name in ("weights", "delta", "predicted", "kept", "noise", "worst rank", "codes changed"):
        table.add_column(name, justify="right")
    for group in report.groups:
        table.add_row(escape(printable(group.name)), *_cells(group))
    table.add_section()
    table.add_row("all", *_cells(report.total), style="bold")
    return table


def _cells(group: GroupRecord) -> list[str]:
    v = group.values
    return [
        str(group.weights), _share(v["relative_size"]), _share(v["predicted_kept"]), _share(v["kept"]),
        "–" if v["noise"] is None else f"{v['noise']:.2f}", _share(v["rank_kept_min"]), _share(v["codes_changed"]),
    ]  # fmt: skip


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)


def targets_table(rows: Sequence[tuple[str, int, list[Survival], str]]) -> Table:
    """Targets side by side before the run: (name, bytes, predictions, who reads it)."""
    table = Table(title="What nearest rounding would keep", title_justify="left", title_style="bold")
    table.add_column("target")
    for name in ("file size", "kept", "step / delta"):
        table.add_column(name, justify="right")
    table.add_column("read by")
    for target, size, survivals, loaders in rows:
        gaps = sorted(s.gap_to_delta for s in survivals if s.gap_to_delta is not None)
        gap = times(gaps[len(gaps) // 2]) if gaps else "–"
        table.add_row(target, size_text(size), _share(total_kept(survivals)), gap, loaders)
    return table


def measured_table(reports: Sequence[ReportData]) -> Table:
    """Targets side by side, measured."""
    table = Table(title="What survived", title_justify="left", title_style="bold")
    table.add_column("target")
    for name in ("rounding", "predicted", "kept", "noise", "cosine", "worst rank", "codes changed"):
        table.add_column(name, justify="right")
    for report in reports:
        v = report.total.values
        table.add_row(
            report.recipe["target"], report.recipe.get("rounding", "nearest"), _share(v["predicted_kept"]), _share(v["kept"]),
            "–" if v["noise"] is None else f"{v['noise']:.2f}", "–" if v["cosine"] is None else f"{v['cosine']:.2f}",
            _share(v["rank_kept_min"]), _share(v["codes_changed"]),
        )  # fmt: skip
    return table


def size_text(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"
