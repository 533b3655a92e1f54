"""What is said about several merges, on the terminal and on the page: which were measured, and on what."""

from __future__ import annotations

from collections.abc import Sequence

from qmerge.report.headline import ALMOST_BASE, is_almost_base
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


def kept_line(reports: Sequence[ReportData], names: Sequence[str]) -> str:
    """What "kept" is measured in: shares of different things must not be compared."""
    in_outputs: list[str] = []
    in_weights: list[str] = []
    for report, name in zip(reports, names, strict=True):
        (in_outputs if report.outputs_measured else in_weights).append(name)
    if not in_outputs:
        return "Kept: share of the delta that is in the stored weights."
    outputs = "in the layers' outputs on the calibration text, which rounding was fitted to"
    if not in_weights:
        return f"Kept: share of the delta {outputs}."
    return (
        f"Kept is measured {outputs} ({', '.join(in_outputs)}), or in the stored weights ({', '.join(in_weights)}): do not "
        f"compare one with the other."
    )


def almost_base_lines(reports: Sequence[ReportData], names: Sequence[str]) -> list[str]:
    """The merges without a verdict whose weights alone say that the adapter is lost."""
    found = [name for report, name in zip(reports, names, strict=True) if is_almost_base(report)]
    return [f"{name}: not measured, but {ALMOST_BASE}." for name in found]
