"""The HTML report: one self-contained file, no script, nothing fetched. Names from files are escaped by jinja2."""

from __future__ import annotations

import math
import re
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2

from qmerge import plugins
from qmerge.report.terminal import decimal, printable, share
from qmerge.schema import ModulePairRecord, ReportData, WeightRecord, adapters_named, survived
from qmerge.wording import percent

NAME = "qmerge.html"
COLUMNS = (
    "kept",
    "output_kept",
    "output_noise",
    "predicted_kept",
    "noise",
    "cosine",
    "rank_kept_min",
    "rank_kept_median",
    "codes_changed",
    "relative_size",
)
SHARES = {
    "kept",
    "output_kept",
    "predicted_kept",
    "rank_kept_min",
    "rank_kept_median",
    "codes_changed",
    "relative_size",
    "under_half_gap",
}
NUMBER = re.compile(r"\.(\d+)\.")
PLOT_WIDTH, PLOT_HEIGHT = 560, 240


def html_report(report: ReportData) -> str:
    """The whole page."""
    return template("report.html").render(
        report=report, survived=survived, adapters=adapters_named(report.inputs), heat=heat_map(report), plot=scatter(report),
        columns=COLUMNS, metrics=metric_help(), weights=sorted(report.weights, key=worst_first),
        opposed=most_opposed,
    )  # fmt: skip


def worst_first(weight: WeightRecord) -> float:
    kept = survived(weight.values)
    return math.inf if kept is None else kept


def most_opposed(modules: list[ModulePairRecord]) -> list[ModulePairRecord]:
    """Lowest cosine first."""
    return sorted(modules, key=lambda met: math.inf if met.cosine is None else met.cosine)


def summary(report: ReportData) -> str:
    """A table for a notebook cell."""
    return template("summary.html").render(report=report, columns=COLUMNS[:6], survived=survived)


def heat_map(report: ReportData) -> dict[str, Any]:
    """Rows: layers (the first number in a module's name). Columns: kinds of module. Cells: what was kept."""
    kinds = list(dict.fromkeys(kind_of(w) for w in report.weights))
    cells: dict[tuple[int, str], WeightRecord] = {}
    for weight in report.weights:
        cells.setdefault((layer_of(weight), kind_of(weight)), weight)
    layers = sorted({layer for layer, _ in cells})
    return {
        "kinds": kinds,
        "rows": [
            {"layer": layer if layer >= 0 else "–", "cells": [cells.get((layer, kind)) for kind in kinds]}
            for layer in layers
        ],
    }


def scatter(report: ReportData) -> dict[str, Any]:
    """Kept against the delta's relative size (logarithmic): large deltas that were lost are what hurts."""
    points = [
        (math.log10(size), kept, w)
        for w in report.weights
        if (kept := survived(w.values)) is not None and (size := w.values["relative_size"])
    ]
    if not points:
        return {"points": [], "ticks": []}
    low, high = math.floor(min(x for x, _, _ in points)), math.ceil(max(x for x, _, _ in points) + 1e-9)

    def place(x: float) -> float:
        return (x - low) / max(1, high - low) * PLOT_WIDTH

    dots = [(place(x), PLOT_HEIGHT * (1 - min(max(kept, -0.1), 1.3) / 1.3), w) for x, kept, w in points]
    ticks = [(place(x), percent(10.0**x)) for x in range(low, high + 1)]
    lines = [(PLOT_HEIGHT * (1 - level / 1.3), percent(level)) for level in (0.0, 0.5, 1.0)]
    return {"points": dots, "ticks": ticks, "lines": lines, "width": PLOT_WIDTH, "height": PLOT_HEIGHT}


def layer_of(weight: WeightRecord) -> int:
    match = NUMBER.search(f"{weight.module}.")
    return int(match[1]) if match else -1


def kind_of(weight: WeightRecord) -> str:
    return weight.module.rpartition(".")[2]


def colour(kept: float | None) -> str:
    """Red where nothing survived, over yellow, to green where all did (also readable in grey: dark to light)."""
    if kept is None:
        return "#eeeeee"
    level = min(max(kept, 0.0), 1.0)
    return f"hsl({level * 120:.0f} 65% {45 + 25 * level:.0f}%)"


def number(value: float | None, name: str) -> str:
    return share(value) if name in SHARES else decimal(value)


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def metric_help() -> dict[str, str]:
    return {name: plugins.help_line("metrics", name) for name in COLUMNS}


@cache
def template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "colour": colour, "clean": printable, "percent": share, "signed": signed}
    return environment.from_string((files("qmerge.report") / "templates" / name).read_text(encoding="utf-8"))
