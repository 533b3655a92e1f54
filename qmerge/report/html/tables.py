"""Tables of a page: numbers in words, and as numbers for sorting and for the CSV file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qmerge import plugins
from qmerge.report.terminal.console import printable
from qmerge.schema import ReportData, WeightRecord, kept_name, overall_kept
from qmerge.wording import DASH, decimal_or_dash, percent_or_dash, share_or_dash

METRICS = (
    "kept", "output_kept", "output_noise", "predicted_kept", "noise", "cosine", "rank_kept_min", "rank_kept_median",
    "codes_changed", "relative_size",
)  # fmt: skip
# How metrics are shown: shares of the delta (``wording.share``), percentages, and all others as ratios.
SHARES = {"kept", "output_kept", "predicted_kept", "rank_kept_min", "rank_kept_median"}
PERCENTAGES = {"codes_changed", "relative_size", "under_half_gap"}

MOST_ROWS = 2000
"""Rows of a table, the worst weights: with more, the page would be slow and large. qmerge.json has all."""


@dataclass(frozen=True)
class Column:
    """``help`` is shown where somebody points at the title."""

    title: str
    help: str = ""


@dataclass(frozen=True)
class Value:
    """What a cell shows; ``number`` is what it is sorted by and what goes into the CSV file, "" where it does not exist.

    Of a text, it is None.
    """

    text: str
    number: str | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that can be sorted, filtered and downloaded.

    left_out: rows that are not shown
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    left_out: int = 0


def number(value: float | None, text: str) -> Value:
    """A number as a cell."""
    known = value is not None and math.isfinite(value)
    return Value(text, f"{value:.6g}" if known else "")


def text(value: str) -> Value:
    """A name as a cell."""
    return Value(printable(value))


def metric_text(value: float | None, metric: str) -> str:
    """A metric in words."""
    if metric in SHARES:
        return share_or_dash(value)
    return percent_or_dash(value) if metric in PERCENTAGES else decimal_or_dash(value)


def metric_help(metric: str) -> str:
    """What a metric is, without its name."""
    return plugins.help_line("metrics", metric).removeprefix(f"{metric}: ")


def weights_table(report: ReportData) -> Table:
    """Every weight, worst first."""
    weights = worst_first(report.weights)
    metrics = [name for name in METRICS if any(weight.values[name] is not None for weight in weights)]
    columns = [Column("module"), Column("rank", "rank of the update"), Column("scale", "factor of B·A")]
    for name in metrics:
        columns.append(Column(name.replace("_", " "), metric_help(name)))
    rows = []
    for weight in weights[:MOST_ROWS]:
        cells = [
            text(weight.module),
            number(weight.rank, str(weight.rank)),
            number(weight.scale, f"{weight.scale:.3g}"),
        ]
        cells += [number(weight.values[name], metric_text(weight.values[name], name)) for name in metrics]
        rows.append(cells)
    return Table(
        name="weights",
        caption=f"Every weight, least {kept_name(report.total.values)} first",
        columns=columns,
        rows=rows,
        left_out=len(weights) - len(rows),
    )


def worst_first(weights: Sequence[WeightRecord]) -> list[WeightRecord]:
    """The weights that kept least first, and those without a delta last."""

    def kept_or_last(weight: WeightRecord) -> float:
        kept = overall_kept(weight.values)
        return math.inf if kept is None else kept

    return sorted(weights, key=kept_or_last)


def text_or_dash(value: str | None) -> str:
    """A dash for None."""
    return DASH if value is None else value
