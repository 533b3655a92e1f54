"""The terminal: progress and warnings on stderr, tables on stdout, at most 80 columns wide where they can be."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qmerge.formats import get_format
from qmerge.schema import FidelityRecord, GroupRecord, PairRecord, ReportData, survived
from qmerge.wording import percent, times

SECONDS_BETWEEN_LINES = 10


def out() -> Console:
    return Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())


def err() -> Console:
    return Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())


class TerminalProgress:
    """A bar with rate and time left on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.console = quiet, err()
        self._bar: bars.Progress | None = None
        self._label, self._total, self._done, self._started, self._said = "", 0, 0, 0.0, 0.0

    def stage(self, label: str, total: int) -> None:
        self.end()
        self._label, self._total, self._done = label, total, 0
        self._started = self._said = time.monotonic()
        if self.quiet or total == 0:
            return
        if self.console.is_terminal:
            columns = (
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.DownloadColumn(),
                bars.TransferSpeedColumn(),
                bars.TimeRemainingColumn(),
            )
            self._bar = bars.Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(label, total=total)
            self._bar.start()

    def advance(self, nbytes: int, label: str = "") -> None:
        self._done += nbytes
        part = label if label and not nbytes else ""  # work that is not counted in bytes: which layer, which token
        if self._bar:
            self._bar.update(self._task, advance=nbytes, description=part or None)
        elif part and not self.quiet and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self.console.print(escape(printable(part)))
        elif not self.quiet and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            rate = self._done / (self._said - self._started)
            left = (self._total - self._done) / rate if rate else 0
            self.console.print(
                f"{self._label}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left"
            )

    def say(self, line: str) -> None:
        if not self.quiet:
            self.console.print(escape(printable(line)))

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


WITHOUT_INPUTS, WITH_INPUTS = ("kept", "worst rank", "noise"), ("kept", "output kept", "output noise")


def survival_table(report: ReportData) -> Table:
    """What survived, by kind of module."""
    rounding = report.rounding
    table = Table(
        title=f"What survived in {report.recipe['target']} ({rounding})", title_justify="left", title_style="bold"
    )
    table.add_column("modules")
    seen = report.total.values["output_kept"] is not None
    for name in ("n", "delta", predicted_name(rounding), *(WITH_INPUTS if seen else WITHOUT_INPUTS), "codes"):
        table.add_column(name, justify="right")
    for group in report.groups:
        table.add_row(escape(printable(group.name)), *_cells(group, seen))
    table.add_section()
    table.add_row("all", *_cells(report.total, seen), style="bold")
    table.caption = (
        "delta: of the weight; output: of the layers, on the calibration text;\nnoise: in deltas; codes: changed"
        if seen
        else "delta: of the weight; noise: in deltas; codes: changed"
    )
    table.caption_justify = "left"
    return table


def predicted_name(rounding: str) -> str:
    """The closed form is about nearest rounding, whatever was used."""
    return "predicted" if rounding == "nearest" else "if nearest"


def _cells(group: GroupRecord, seen: bool) -> list[str]:
    v = group.values
    survived = (
        [share(v["kept"]), share(v["output_kept"]), decimal(v["output_noise"])]
        if seen
        else [share(v["kept"]), share(v["rank_kept_min"]), decimal(v["noise"])]
    )
    first = [str(group.weights), share(v["relative_size"]), share(v["predicted_kept"])]
    return [*first, *survived, share(v["codes_changed"])]


def measured_table(reports: Sequence[ReportData]) -> Table:
    """Targets side by side, measured; with whole models, where a text was given."""
    judged = any(report.fidelity for report in reports)
    names = ("bits", "size", "kept", "noise", *(("gain kept", "KL ratio") if judged else ()))
    table = Table(title="What survives", title_justify="left", title_style="bold")
    table.add_column("target")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("rounding")
    for report in reports:
        v, seen = report.total.values, report.total.values["output_kept"] is not None
        cells = [f"{report.bits_per_weight:.3g}", size_text(report.bytes_out)]
        cells += [share(survived(v)), decimal(v["output_noise" if seen else "noise"])]
        if judged:
            f = report.fidelity
            cells += [decimal(f.gain_kept), f"{f.kl_ratio:.4f}" if f.kl_ratio is not None else "–"] if f else ["–", "–"]
        table.add_row(report.recipe["target"], *cells, report.rounding)
    table.caption = (
        "bits: per weight, with scales; kept, noise (in deltas): of the layers'\n"
        "output where calibration saw their inputs (preserve), else of the weights\n"
        + readers([report.recipe["target"] for report in reports])
    )
    table.caption_justify = "left"
    return table


def readers(targets: Sequence[str]) -> str:
    """Who reads which of these targets, one line for each set of loaders."""
    by_loaders: dict[str, list[str]] = {}
    for target in targets:
        by_loaders.setdefault(get_format(target).info.loaders, []).append(target)
    return "\n".join(f"{', '.join(names)}: read by {loaders}" for loaders, names in by_loaders.items())


def extras(report: ReportData) -> list[str]:
    """What was done beside the merge, and how several adapters got along, a line each."""
    lines = [printable(pair_line(pair)) for pair in report.interference]
    if report.promoted:
        lines.append(
            f"Kept dense, because they survived worst: {', '.join(printable(name) for name in report.promoted)}."
        )
    if report.residual:
        r = report.residual
        lines.append(
            f"residual/: a LoRA of rank {r.rank} ({size_text(r.bytes)}) with what did not fit, to be loaded with the model. "
            f"With it, output noise is {r.noise_with:.3f} deltas instead of {r.noise_without:.3f}."
        )
    return lines


def pair_line(pair: PairRecord) -> str:
    """``math and chat: cosine 0.01, opposite signs in 49 % of what both change; lowest cosine -0.08, in …q_proj``."""

    def said(cosine: float | None, conflict: float | None) -> str:
        signs = "" if conflict is None else f", opposite signs in {percent(conflict)} of what both change"
        return f"cosine {'–' if cosine is None else f'{cosine:.2f}'}{signs}"

    worst = pair.worst
    where = f"; lowest cosine {worst.cosine:.2f}, in {worst.module}" if worst else ""
    return f"{pair.one} and {pair.other}: {said(pair.cosine, pair.sign_conflict)}{where}"


def fidelity_table(record: FidelityRecord) -> Table:
    """The whole model on held-out text."""
    table = Table(
        title=f"The whole model, on {record.tokens} tokens of {escape(printable(record.text))}", title_justify="left"
    )
    table.title_style = "bold"
    for name in ("", "loss", "gain kept", "KL ratio", "same top token", "KL, 99th %"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("base", f"{record.loss_base:.4f}", "0", "1", "", "")
    table.add_row("unmerged", f"{record.loss_unmerged:.4f}", "1", "0", "", "")
    gain = "–" if record.gain_kept is None else f"{record.gain_kept:.3f}"
    ratio = "–" if record.kl_ratio is None else f"{record.kl_ratio:.4f}"
    table.add_row(
        "merged", f"{record.loss_merged:.4f}", gain, ratio, share(record.top1_agreement), f"{record.kl_p99:.2g}"
    )
    if record.gain_kept is None:
        table.caption = "The adapter does not lower the loss of this text, so there is no gain to keep."
    return table


def share(value: float | None) -> str:
    return "–" if value is None else percent(value)


def decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value >= 0.01 or value == 0 else "< 0.01"


def size_text(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"


__all__ = [
    "TerminalProgress",
    "decimal",
    "err",
    "extras",
    "fidelity_table",
    "measured_table",
    "out",
    "pair_line",
    "printable",
    "readers",
    "share",
    "size_text",
    "survival_table",
    "times",
]
