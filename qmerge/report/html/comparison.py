"""Several merges, or several targets of one, side by side on a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qmerge.report.html.document import document
from qmerge.report.html.pictures import KEPT, OUTPUT_KEPT, HeatMap, Measure
from qmerge.report.html.tables import MOST_ROWS, Column, Table, number, text, text_or_dash
from qmerge.report.side_by_side import almost_base_lines, kept_lines, measured_on_lines, without_verdict_lines
from qmerge.schema import ReportData, distinct_names
from qmerge.wording import decimal_or_dash, fixed_or_dash, share_or_dash, size_text


def comparison_page(reports: Sequence[ReportData], names: Sequence[str]) -> str:
    """The whole page.

    Args:
        names: what the merges are called, one for each report.
    """
    names = distinct_names(names)
    return document(
        "comparison.html",
        data={},
        sentence=nearest_sentence(reports, names),
        measured_on=measured_on_lines(reports, names),
        without_verdict=without_verdict_lines(reports, names),
        kept_lines=kept_lines(reports),
        almost_base=almost_base_lines(reports, names),
        count=len(reports),
        merges=_merges_table(reports, names),
        kinds=[_kinds_map(reports, names, measure) for measure in _measures(reports)],
        modules=_modules_table(reports, names),
    )


def nearest_sentence(reports: Sequence[ReportData], names: Sequence[str]) -> str:
    """Which merge is nearest to the adapter model: by the KL ratio where all have one. Else the verdicts that
    are known; where there are none, by the rounding error."""
    # Ratios of some merges only cannot be compared with the rounding errors of the others.
    ratios = [report.fidelity.kl_ratio if report.fidelity else None for report in reports]
    if None not in ratios:
        first, least = _first(ratios, names)
        return f"Nearest to the adapter model: {first}, with KL ratio {least:.4f}."
    verdicts = [report.fidelity.verdict if report.fidelity else None for report in reports]
    measured = [f"{name}: {verdict}" for name, verdict in zip(names, verdicts, strict=True) if verdict]
    if measured:
        others = [name for name, verdict in zip(names, verdicts, strict=True) if verdict is None]
        without = f" No verdict for {' and '.join(others)}." if others else ""
        return f"{', '.join(measured)}.{without}"
    noises = [report.total.values["noise"] for report in reports]
    if None not in noises:
        first, least = _first(noises, names)
        return f"No whole model was measured. Rounding error in the weights is least in {first}: {least:.2f} times the delta."
    return "No order: not every merge has numbers."


def _first(values: Sequence[float | None], names: Sequence[str]) -> tuple[str, float]:
    """Names of the merges with the least value, and that value. None of the values is None."""
    least = min(value for value in values if value is not None)
    # Differences that the page does not show decide nothing.
    first = [name for name, value in zip(names, values, strict=True) if f"{value:.4f}" == f"{least:.4f}"]
    return " and ".join(first), least


def _merges_table(reports: Sequence[ReportData], names: Sequence[str]) -> Table:
    columns = [
        Column("merge"),
        # What decides comes first: a telephone shows four columns.
        Column("verdict"),
        Column("gain kept", "share of what the adapter improves the loss by; 1 is all"),
        Column("KL ratio", "0: predicts like the unmerged adapter model; 1: like the base"),
        Column("target"),
        Column("rounding"),
        Column("kept", "share of the delta that is in the stored weights"),
        Column("output kept", "share of the delta's effect that is in the layers' outputs on the calibration text"),
        Column("noise", "rounding error of the weights; 1 is as large as the delta"),
        Column("bits", "per weight, scales included"),
        Column("size"),
    ]
    rows = []
    for report, name in zip(reports, names, strict=True):
        fidelity = report.fidelity
        gain = fidelity.gain_kept if fidelity else None
        ratio = fidelity.kl_ratio if fidelity else None
        values = report.total.values
        kept, output_kept, noise = values["kept"], values["output_kept"], values["noise"]
        rows.append(
            [
                text(name),
                text(text_or_dash(fidelity.verdict if fidelity else None)),
                number(gain, fixed_or_dash(gain, 3)),
                number(ratio, fixed_or_dash(ratio, 4)),
                text(report.recipe["target"]),
                text(report.rounding),
                number(kept, share_or_dash(kept)),
                number(output_kept, share_or_dash(output_kept)),
                number(noise, decimal_or_dash(noise)),
                number(report.bits_per_weight, f"{report.bits_per_weight:.3g}"),
                number(report.bytes_out, size_text(report.bytes_out)),
            ]
        )
    return Table(name="merges", caption="Side by side", columns=columns, rows=rows)


def _measures(reports: Sequence[ReportData]) -> list[Measure]:
    """Which shares are compared, each with its like: those in the layers' outputs only where these were measured."""
    return [KEPT, OUTPUT_KEPT] if any(report.outputs_measured for report in reports) else [KEPT]


def _kinds_map(reports: Sequence[ReportData], names: Sequence[str], measure: Measure) -> HeatMap:
    """One row per kind of module, one column per merge."""
    kinds: dict[str, None] = {}  # a set in the order of the checkpoint
    of_merges: list[Mapping[str, Mapping[str, float | None]]] = []
    for report in reports:
        groups = {group.name: group.values for group in [*report.groups, report.total]}
        kinds |= dict.fromkeys(group.name for group in report.groups)
        of_merges.append(groups)
    rows = []
    for kind in [*kinds, "all"]:
        values = [measure.value_of(groups[kind]) if kind in groups else None for groups in of_merges]
        rows.append((kind, [measure.cell(value) for value in values]))
    return HeatMap(
        name=f"kinds-{measure.name}",
        title=measure.title,
        note=f"{measure.title.capitalize()}: {measure.note[0].lower()}{measure.note[1:]}",
        corner="modules",
        columns=names,
        rows=rows,
        legend=measure.legend(),
    )


def _modules_table(reports: Sequence[ReportData], names: Sequence[str]) -> Table:
    """One row per weight, the one that kept least in any merge first; the share in the layers' outputs where all merges have
    it."""
    measure = OUTPUT_KEPT if all(report.outputs_measured for report in reports) else KEPT
    of_modules: dict[str, list[float | None]] = {}
    for position, report in enumerate(reports):
        for weight in report.weights:
            shares = of_modules.setdefault(weight.module, [None] * len(reports))
            shares[position] = measure.value_of(weight.values)
    modules = sorted(of_modules, key=lambda module: _least_or_last(of_modules[module]))
    rows = []
    for module in modules[:MOST_ROWS]:
        shares = [_least(of_modules[module]), *of_modules[module]]
        rows.append([text(module), *(number(kept, share_or_dash(kept)) for kept in shares)])
    return Table(
        name="modules",
        caption=f"{measure.title.capitalize()} in every weight",
        columns=[
            Column("module"),
            Column("least", "of the merges; the rows are in this order"),
            *(Column(name, measure.note) for name in names),
        ],
        rows=rows,
        left_out=len(modules) - len(rows),
    )


def _least(shares: Sequence[float | None]) -> float | None:
    return min((share for share in shares if share is not None), default=None)


def _least_or_last(shares: Sequence[float | None]) -> float:
    least = _least(shares)
    return math.inf if least is None else least
