"""Heat maps as tables, and the data of the two drawings: what survives against the size of the delta, and rank by rank."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qmerge.schema import ReportData, WeightRecord, kept_name, overall_kept
from qmerge.wording import DASH, decimal, percent, share

LEVELS = 10
"""Colours of a heat map, from dark blue to yellow (cividis, which reads the same to people who confuse red and green)."""

HALF_STEP = 0.5
"""Rounding to nearest undoes every change that is smaller than this many steps of the grid."""

# Shares kept at the edges of a drawing; beyond, they are drawn there. preserve and fresh scales may keep more than 1.
MOST_DRAWN = 1.3
LEAST_DRAWN = -0.1

LAYER_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Cell:
    """A value in words, and its colour, 0 to LEVELS − 1."""

    text: str
    level: int


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A table of colours. ``rows``: label, and a cell or None for each column."""

    name: str
    title: str
    note: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]
    legend: Sequence[Cell]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a heat map shows of a weight.

    level_of: from 0, dark, to 1, bright
    shown_in_legend: values, the darkest first
    """

    name: str
    title: str
    note: str
    value_of: Callable[[Mapping[str, float | None]], float | None]
    text_of: Callable[[float], str]
    level_of: Callable[[float], float]
    shown_in_legend: Sequence[float]

    def cell(self, value: float | None) -> Cell | None:
        """The cell of a value."""
        if value is None or not math.isfinite(value):
            return None
        return Cell(self.text_of(value), min(int(self.level_of(value) * LEVELS), LEVELS - 1))

    def legend(self) -> list[Cell]:
        """The cells of the values in the legend."""
        return [cell for cell in map(self.cell, self.shown_in_legend) if cell]


KEPT = Measure(
    name="kept",
    title="kept",
    note="Share of the delta that is in the stored weights: bright is all of it, dark is none, or far too much.",
    value_of=lambda values: values["kept"],
    text_of=share,
    level_of=lambda kept: max(1 - abs(1 - kept), 0.0),
    shown_in_legend=(0.0, 0.25, 0.5, 0.75, 1.0),
)

OUTPUT_KEPT = replace(
    KEPT,
    name="output_kept",
    title="output kept",
    note="Share of the delta's effect that is in the layers' outputs on the calibration text, which rounding was fitted to: bright "
    "is all of it, dark is none, or far too much.",
    value_of=lambda values: values["output_kept"],
)

NOISE = Measure(
    name="noise",
    title="rounding error",
    note="Rounding error of the weights, in sizes of the delta: bright is none; 1 is as large as the delta.",
    value_of=lambda values: values["noise"],
    text_of=decimal,
    level_of=lambda noise: 1 / (1 + noise),
    shown_in_legend=(9.0, 3.0, 1.0, 0.33, 0.0),
)


def heat_maps(weights: Sequence[WeightRecord]) -> list[HeatMap]:
    """One row per layer, one column per kind of module: the share kept (in the layers' outputs, too, where these were measured),
    the size of the delta, the rounding error."""
    measures = [KEPT, _size_measure(weights), NOISE]
    if _outputs_measured(weights):
        measures.insert(0, OUTPUT_KEPT)
    return [layer_map(weights, measure) for measure in measures]


def _outputs_measured(weights: Sequence[WeightRecord]) -> bool:
    return any(weight.values["output_kept"] is not None for weight in weights)


def _size_measure(weights: Sequence[WeightRecord]) -> Measure:
    """Sizes have no scale of their own: the colours go from the smallest to the largest on the page."""
    logs = [math.log(size) for size in (weight.values["relative_size"] for weight in weights) if size and size > 0]
    low = min(logs, default=0.0)
    span = max(logs, default=0.0) - low or 1.0
    return Measure(
        name="size",
        title="size of the delta",
        note="Size of the delta, relative to the weights: bright is the largest here. Small deltas are the first to be lost.",
        value_of=lambda values: values["relative_size"],
        text_of=percent,
        level_of=lambda size: (math.log(size) - low) / span if size > 0 else 0.0,
        shown_in_legend=[math.exp(low + step * span / 4) for step in range(5)] if logs else [],
    )


def layer_map(weights: Sequence[WeightRecord], measure: Measure) -> HeatMap:
    """The heat map of one measure."""
    values: dict[tuple[int, str], list[float]] = defaultdict(list)
    kinds: dict[str, None] = {}  # a set in the order of the checkpoint
    # A weight without a value has its place all the same: its cell is empty.
    for weight in weights:
        value = measure.value_of(weight.values)
        kinds[_kind_of(weight)] = None
        of_cell = values[_layer_of(weight), _kind_of(weight)]
        if value is not None:
            of_cell.append(value)
    rows = []
    for layer in sorted({layer for layer, _ in values}):
        cells = [_middle_cell(values.get((layer, kind)), measure) for kind in kinds]
        rows.append((str(layer) if layer >= 0 else DASH, cells))
    return HeatMap(
        name=measure.name,
        title=measure.title,
        note=measure.note,
        corner="layer",
        columns=list(kinds),
        rows=rows,
        legend=measure.legend(),
    )


def _middle_cell(values: Sequence[float] | None, measure: Measure) -> Cell | None:
    """Experts of a layer share a cell: the middle one is shown, the table lists all."""
    return measure.cell(statistics.median_low(values)) if values else None


def _layer_of(weight: WeightRecord) -> int:
    """The first number in the module's name; -1 where it has none (embeddings, lm_head)."""
    match = LAYER_NUMBER.search(f"{weight.module}.")
    return int(match[1]) if match else -1


def _kind_of(weight: WeightRecord) -> str:
    return weight.module.rpartition(".")[2]


# --- drawings ----------------------------------------------------------------------------------------------------------


def scatter_data(weights: Sequence[WeightRecord]) -> dict[str, Any]:
    """Share kept over the size of the delta in steps of the grid, in the order of the sizes. The share is that in the layers'
    outputs where these were measured.

    Empty where no weight has both.
    """
    points = []
    for weight in weights:
        kept = overall_kept(weight.values)
        gap_to_delta = weight.values["gap_to_delta"]
        if kept is None or not gap_to_delta:
            continue
        predicted = weight.values["predicted_kept"]
        drawn = None if predicted is None else _drawn(predicted)
        points.append(
            (
                _short(1 / gap_to_delta),
                _drawn(kept),
                drawn,
                f"{weight.module}: {share(kept)} {kept_name(weight.values)}",
            )
        )
    if not points:
        return {}
    # uPlot needs its x values in order; equal ones are ordered by name, so that the same report gives the same bytes.
    points.sort(key=lambda point: (point[0], point[3]))
    steps, kept_shares, predicted_shares, labels = zip(*points, strict=True)
    return {
        "steps": steps,
        "name": (OUTPUT_KEPT if _outputs_measured(weights) else KEPT).title,
        "kept": kept_shares,
        "predicted": predicted_shares,
        "labels": labels,
        "half": HALF_STEP,
        "least": LEAST_DRAWN,
        "most": MOST_DRAWN,
    }


def rank_data(report: ReportData) -> dict[str, Any]:
    """Share kept of every rank, the largest first, by kind of module. Empty where the report has no ranks, or one only."""
    if len(report.total.ranks) < 2:
        return {}
    lines = []
    for group in [*report.groups, report.total]:
        # A kind with fewer ranks than others ends early.
        kept: list[float | None] = [_drawn(rank.kept) for rank in group.ranks]
        kept += [None] * (len(report.total.ranks) - len(kept))
        lines.append({"name": group.name, "kept": kept})
    return {
        "sizes": [rank.size for rank in report.total.ranks],
        "lines": lines,
        "least": LEAST_DRAWN,
        "most": MOST_DRAWN,
    }


def _drawn(kept: float) -> float:
    return _short(min(max(kept, LEAST_DRAWN), MOST_DRAWN))


def _short(value: float) -> float:
    """Four digits: more cannot be seen."""
    return float(f"{value:.4g}")
