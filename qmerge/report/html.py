"""The HTML report: one self-contained file, without scripts and without requests. jinja2 escapes the names from files."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2

from qmerge import plugins
from qmerge.report.headline import (
    TOP_NAMES,
    expert_lines,
    fidelity_remarks,
    kept_of_what,
    ratio_name,
    share_of,
    unmeasured_lines,
    verdict_sentence,
)
from qmerge.report.terminal.console import printable
from qmerge.schema import ModulePairRecord, ReportData, WeightRecord, adapter_names, overall_kept
from qmerge.wording import (
    decimal_or_dash,
    exceeds_all,
    fixed_or_dash,
    percent,
    percent_or_dash,
    percent_with_tenths,
    share_or_dash,
)

NAME = "qmerge.html"
COLUMNS = (
    "kept", "output_kept", "output_noise", "predicted_kept", "noise", "cosine", "rank_kept_min", "rank_kept_median",
    "codes_changed", "relative_size",
)  # fmt: skip
SUMMARY_COLUMNS = COLUMNS[:6]  # a notebook cell is narrow
# How metrics are shown: shares of the delta (``wording.share``), percentages, and all others as ratios.
SHARES = {"kept", "output_kept", "predicted_kept", "rank_kept_min", "rank_kept_median"}
PERCENTAGES = {"codes_changed", "relative_size", "under_half_gap"}

LAYER_NUMBER = re.compile(r"\.(\d+)\.")
PLOT_WIDTH = 560
PLOT_HEIGHT = 240
# Shares kept at the edges of the plot; weights beyond are drawn there. preserve and fresh scales may keep more than 1.
PLOT_TOP = 1.3
PLOT_BOTTOM = -0.1


def html_report(report: ReportData) -> str:
    """The whole page."""
    return _template("report.html").render(
        **_first_words(report),
        adapters=adapter_names(report.inputs),
        has_more_than_all=any(_more_than_all(weight) for weight in report.weights),
        heat=heat_map(report.weights),
        plot=scatter_plot(report.weights),
        columns=COLUMNS,
        metrics={name: plugins.help_line("metrics", name) for name in COLUMNS},
        weights=sorted(report.weights, key=_kept_or_last),
        most_opposed_first=_most_opposed_first,
    )


def summary(report: ReportData) -> str:
    """A table for a notebook cell."""
    return _template("summary.html").render(**_first_words(report), columns=SUMMARY_COLUMNS)


def _first_words(report: ReportData) -> dict[str, Any]:
    """What both templates say first, and the functions that they say it with."""
    return {
        "report": report,
        "overall_kept": overall_kept,
        "kept_of_what": kept_of_what(report),
        "share_of": share_of,
        "verdict_sentence": verdict_sentence,
        "fidelity_remarks": fidelity_remarks,
        "ratio_name": ratio_name,
        "top_names": TOP_NAMES,
        "unmeasured_lines": unmeasured_lines(report),
        "expert_lines": expert_lines(report),
    }


def _more_than_all(weight: WeightRecord) -> bool:
    """Whether the page shows a share above 100 % of this weight, which it then explains."""
    return any(exceeds_all(weight.values[name]) for name in SHARES)


def _kept_or_last(weight: WeightRecord) -> float:
    """Sorts the weights that kept least first, and those without a delta last."""
    kept = overall_kept(weight.values)
    return math.inf if kept is None else kept


def _most_opposed_first(modules: Sequence[ModulePairRecord]) -> list[ModulePairRecord]:
    """Sorted by cosine; weights without one are last."""
    return sorted(modules, key=lambda module: math.inf if module.cosine is None else module.cosine)


# --- the drawings ------------------------------------------------------------------------------------------------------


def heat_map(weights: Sequence[WeightRecord]) -> dict[str, Any]:
    """One row per layer, one column per kind of module; a cell is the weight that is in both, or None."""
    cells: dict[tuple[int, str], WeightRecord] = {}
    for weight in weights:
        # Experts of a layer share a cell: the first one is shown, the table below lists all.
        cells.setdefault((_layer_of(weight), _kind_of(weight)), weight)
    kinds: dict[str, None] = {}  # a set in the order of the checkpoint
    layers = set()
    for layer, kind in cells:
        kinds[kind] = None
        layers.add(layer)
    rows = []
    for layer in sorted(layers):
        label = layer if layer >= 0 else "–"
        rows.append({"layer": label, "cells": [cells.get((layer, kind)) for kind in kinds]})
    return {"kinds": list(kinds), "rows": rows}


def _layer_of(weight: WeightRecord) -> int:
    """The first number in the module's name; -1 where it has none (embeddings, lm_head)."""
    match = LAYER_NUMBER.search(f"{weight.module}.")
    return int(match[1]) if match else -1


def _kind_of(weight: WeightRecord) -> str:
    return weight.module.rpartition(".")[2]


def scatter_plot(weights: Sequence[WeightRecord]) -> dict[str, Any]:
    """Share kept over the delta's relative size (logarithmic): what hurts is a large delta that was lost."""
    points = []
    for weight in weights:
        kept = overall_kept(weight.values)
        relative_size = weight.values["relative_size"]
        if kept is not None and relative_size is not None and relative_size > 0:
            points.append((math.log10(relative_size), kept, weight))
    if not points:
        return {"points": [], "ticks": []}
    exponents = [exponent for exponent, _, _ in points]
    low = math.floor(min(exponents))
    high = math.ceil(max(exponents) + 1e-9)  # at least one decade, also for a single point

    def x_of(exponent: float) -> float:
        return (exponent - low) / max(1, high - low) * PLOT_WIDTH

    def y_of(kept: float) -> float:
        return PLOT_HEIGHT * (1 - kept / PLOT_TOP)

    dots = []
    for exponent, kept, weight in points:
        shown = min(max(kept, PLOT_BOTTOM), PLOT_TOP)
        dots.append((x_of(exponent), y_of(shown), weight))
    return {
        "points": dots,
        "ticks": [(x_of(exponent), percent(10.0**exponent)) for exponent in range(low, high + 1)],
        "lines": [(y_of(level), percent(level)) for level in (0.0, 0.5, 1.0)],
        "width": PLOT_WIDTH,
        "height": PLOT_HEIGHT,
    }


# --- filters of the templates ------------------------------------------------------------------------------------------


def _colour(kept: float | None) -> str:
    """From red (nothing kept) over yellow to green (all kept), and back again for more than all. The lightness rises with the
    green, for those who see no colours."""
    if kept is None:
        return "#eeeeee"
    level = max(1 - abs(1 - kept), 0.0)
    return f"hsl({level * 120:.0f} 65% {45 + 25 * level:.0f}%)"


def _metric_value(value: float | None, metric: str) -> str:
    if metric in SHARES:
        return share_or_dash(value)
    return percent_or_dash(value) if metric in PERCENTAGES else decimal_or_dash(value)


def _three_decimals(value: float | None) -> str:
    return fixed_or_dash(value, 3)


def _four_decimals(value: float | None) -> str:
    return fixed_or_dash(value, 4)


def _signed(value: float | None) -> str:
    return fixed_or_dash(value, 2)


@cache
def _template(name: str) -> jinja2.Template:
    # StrictUndefined: a name that a template misspells is an error, not an empty place on the page.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "metric": _metric_value,
        "colour": _colour,
        "printable": printable,
        "percent": percent_or_dash,
        "decimal": decimal_or_dash,
        "signed": _signed,
        "share": share_or_dash,
        "percent_with_tenths": percent_with_tenths,
        "three_decimals": _three_decimals,
        "four_decimals": _four_decimals,
    }
    return environment.from_string((files("qmerge.report") / "templates" / name).read_text(encoding="utf-8"))
