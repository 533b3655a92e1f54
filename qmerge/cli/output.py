"""What the commands print after a run, and their exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from qmerge.errors import OK, PAST_LIMIT, StoppedError
from qmerge.report.headline import MEASURING, calibration_lines
from qmerge.report.limits import past_limits
from qmerge.schema import ReportData


def print_json(data: Any) -> None:
    """Data as JSON on stdout; paths become text."""
    typer.echo(json.dumps(data, indent=1, default=str))


def print_report(report: ReportData, measuring: str = MEASURING) -> None:
    """What became of the whole model, then what survived layer by layer, how alike the adapters are, and what was written in
    addition.

    Args:
        measuring: the command that measures the whole model.
    """
    from qmerge.report.terminal.console import stdout
    from qmerge.report.terminal.tables import extra_lines, report_tables

    for table in report_tables(report, measuring):
        stdout().print(table)
    for line in [*calibration_lines(report), *extra_lines(report)]:
        typer.echo(line)


def exit_code(reports: Sequence[ReportData], *, min_kept: float | None, max_kl_ratio: float | None) -> int:
    """5, with a line on stderr for each limit that a model is past; else 0 (see ``past_limits``)."""
    failed = past_limits(reports, min_kept=min_kept, max_kl_ratio=max_kl_ratio)
    for line in failed:
        print(f"qmerge: {line}", file=sys.stderr)
    return PAST_LIMIT if failed else OK


@contextmanager
def nothing_to_resume() -> Iterator[None]:
    """Ctrl-C becomes one line, that of commands that leave nothing to go on with."""
    try:
        yield
    except KeyboardInterrupt as cause:
        raise StoppedError("interrupted. Nothing was left behind: run the same command again.") from cause
