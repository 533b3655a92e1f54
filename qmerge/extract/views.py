"""An extraction on the terminal: a table by kind of module, and the other stored weights."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from qmerge.errors import listed
from qmerge.extract.result import Extraction, FitStatistics
from qmerge.report.terminal.console import printable, stdout
from qmerge.wording import percent_or_dash, size_text

MOST_NAMES = 5


def show(result: Extraction) -> None:
    """Print the result on stdout, without its warnings."""
    console = stdout()
    console.print(table(result))
    lines = []
    saved = [other.name for other in result.others if other.saved]
    if saved:
        lines.append(f"Stored with the LoRAs: {listed(saved, MOST_NAMES)}.")
    if result.identical:
        lines.append(f"{result.identical} linear layers are the same in both and get no LoRA.")
    lines.append(f"Written to {result.out}: {size_text(result.nbytes)}.")
    for line in lines:
        console.print(escape(printable(line)))


def table(result: Extraction) -> Table:
    """One row for each kind of module, at most 80 columns."""
    view = Table(title="Contents of the adapter", title_justify="left", title_style="bold")
    view.add_column("modules")
    for name in ("n", "rank", "delta", "kept", "error", "rank for 90 %"):
        view.add_column(name, justify="right")
    for name, fits in result.groups.items():
        view.add_row(escape(printable(name)), *cells(FitStatistics.of(fits)))
    view.add_section()
    view.add_row("all", *cells(FitStatistics.of(result.fits)), style="bold")
    view.caption = "delta: share of the weights; kept: share of ‖delta‖²; error: share of ‖delta‖"
    view.caption_justify = "left"
    return view


def cells(statistics: FitStatistics) -> list[str]:
    """The cells of a row after its name."""
    lowest, highest = statistics.ranks
    rank = str(highest) if lowest == highest else f"{lowest}–{highest}"
    bound = "" if statistics.rank_90_known else "≥ "
    return [
        str(statistics.count),
        rank,
        percent_or_dash(statistics.relative_size),
        percent_or_dash(statistics.kept),
        # A fraction, not percent: the kept share counts squares, the error does not.
        f"{statistics.error:.2g}",
        f"{bound}{statistics.rank_90}",
    ]
