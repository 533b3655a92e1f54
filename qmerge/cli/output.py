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
    shares = [overall_kept(report.total.values) for report in reports]
    known = [share for share in shares if share is not None]
    if min_kept is None or not known or min(known) >= min_kept:
        return OK
    print(f"qmerge: {min(known):.4f} of the delta was kept, less than --min-kept {min_kept}", file=sys.stderr)
    return BELOW_MIN_KEPT


@contextmanager
def nothing_to_resume() -> Iterator[None]:
    """Ctrl-C becomes one line, for commands that leave nothing to go on with."""
    try:
        yield
    except KeyboardInterrupt as cause:
        raise StoppedError("interrupted. Nothing was left behind; the same command starts again.") from cause
