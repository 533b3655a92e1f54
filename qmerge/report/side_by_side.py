"""What is said about several merges, on the terminal and on the page: which were measured, and on what."""

from __future__ import annotations

from collections.abc import Sequence

from qmerge.report.headline import ALMOST_BASE, MEASURING, is_almost_base
from qmerge.schema import ReportData


def measured_on_lines(reports: Sequence[ReportData], names: Sequence[str]) -> list[str]:
    """What the whole models were measured on, each text once, with the merges that were; empty where none was."""
    names_of_text: dict[str, list[str]] = {}
    for report, name in zip(reports, names, strict=True):
        if report.fidelity:
            names_of_text.setdefault(report.fidelity.measured_on, []).append(name)
    lines = []
    for text, measured in names_of_text.items():
        # Names are needed only where not all merges were measured on the same text.
        whose = "Whole models" if len(measured) == len(reports) else f"Whole model of {', '.join(measured)}"
        lines.append(f"{whose}: measured on {text}.")
    return lines


def kept_lines(reports: Sequence[ReportData]) -> list[str]:
    """What the shares kept are shares of."""
    lines = ["Kept: share of the delta that is in the stored weights."]
    if any(report.outputs_measured for report in reports):
        lines.append(
            "Output kept: share of the delta's effect that is in the layers' outputs on the calibration text, which rounding was "
            "fitted to; only of merges with a calibration."
        )
    return lines


def without_verdict_lines(reports: Sequence[ReportData], names: Sequence[str]) -> list[str]:
    """That whole models were not measured, and how to do that; empty where all were."""
    missing = [name for name, report in zip(names, reports, strict=True) if report.fidelity is None]
    if not missing:
        return []
    # What was only measured can be measured again, with one more option.
    if not any(report.is_written for report in reports):
        return ["The whole models were not measured: --verify FILE does."]
    whose = "The whole models were" if len(missing) == len(reports) else f"The whole model of {', '.join(missing)} was"
    return [
        f"{whose} not measured: a merge with --verify FILE does that.",
        f"A finished merge: {MEASURING} prints these numbers.",
    ]


def almost_base_lines(reports: Sequence[ReportData], names: Sequence[str]) -> list[str]:
    """The merges without a verdict whose weights alone say that the adapter is lost."""
    found = [name for report, name in zip(reports, names, strict=True) if is_almost_base(report)]
    return [f"{name}: not measured, but {ALMOST_BASE}." for name in found]
