"""What the commands print after a run, and their exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from qmerge.errors import BELOW_MIN_KEPT, OK, StoppedError
from qmerge.schema import ReportData, overall_kept


def print_json(data: Any) -> None:
    """Data as JSON on stdout; paths become text."""
    typer.echo(json.dumps(data, indent=1, default=str))


def print_report(report: ReportData) -> None:
    """What survived, how alike the adapters are, what was written in addition, and the whole model's fidelity."""
    from qmerge.report.terminal.console import stdout
    from qmerge.report.terminal.tables import extra_lines, fidelity_table, survival_table

    stdout().print(survival_table(report))
    for line in extra_lines(report):
        typer.echo(line)
    if report.fidelity:
        stdout().print(fidelity_table(report.fidelity))


def exit_code(reports: Sequence[ReportData], min_kept: float | None) -> int:
    """5, with a line on stderr, where the worst of the models kept less than ``min_kept``; else 0."""
    if min_kept is None:
        return OK
    for kept in sorted(_shares_kept(reports)):
        if kept < min_kept:
            print(f"qmerge: {kept:.4f} of the delta was kept, less than --min-kept {min_kept}", file=sys.stderr)
            return BELOW_MIN_KEPT
    return OK


def _shares_kept(reports: Sequence[ReportData]) -> Iterator[float]:
    """The share kept of each model. A delta of zero has none: there was nothing to keep."""
    for report in reports:
        kept = overall_kept(report.total.values)
        if kept is not None:
            yield kept


@contextmanager
def nothing_to_resume() -> Iterator[None]:
    """Ctrl-C becomes one line, for commands that leave nothing to go on with."""
    try:
        yield
    except KeyboardInterrupt as cause:
        raise StoppedError("interrupted. Nothing was left behind; the same command starts again.") from cause
