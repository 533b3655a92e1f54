"""Limits of a run, ``min_kept`` and ``max_kl_ratio``: is a model past one of them?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmerge.schema import ReportData, overall_kept


def past_limits(reports: Sequence[ReportData], *, min_kept: float | None, max_kl_ratio: float | None) -> list[str]:
    """A sentence for each limit that a model is past, about the worst model; empty where all keep to them.

    Args:
        min_kept: smallest gain kept; of a model that was not measured as a whole, smallest share of the delta.
        max_kl_ratio: largest KL ratio; a model without one is past it.
    """
    lines = [_below_min_kept(reports, min_kept), _past_max_kl_ratio(reports, max_kl_ratio)]
    return [line for line in lines if line]


@dataclass(frozen=True, kw_only=True)
class _ShareKept:
    """The number that ``--min-kept`` is about, what it is called, and where it is from.

    is_of_delta: it is the share of the delta, of which more than 1 is an error as less is.
    """

    value: float
    name: str
    source: str
    is_of_delta: bool = False


def _below_min_kept(reports: Sequence[ReportData], least: float | None) -> str | None:
    """What is wrong with the model that kept least, in words; None where it kept enough."""
    if least is None:
        return None
    known = [share for share in map(_share_kept, reports) if share is not None]
    worst = min(known, key=lambda share: share.value, default=None)
    if worst is None:
        return None
    most = max(known, key=lambda share: share.value)
    if least > 0 and most.is_of_delta and most.value > 2 - least:  # as far past 1 as the limit is below it
        return f"{most.name} {most.value:.4f} is farther past 1 than --min-kept {least:g} allows ({most.source})"
    if worst.value >= least:
        return None
    return f"{worst.name} {worst.value:.4f} is less than --min-kept {least:g} ({worst.source})"


def _share_kept(report: ReportData) -> _ShareKept | None:
    """Gain kept where the whole model was measured, else the share of the delta. A delta of zero has none: there was nothing
    to keep."""
    target = report.recipe["target"]
    fidelity = report.fidelity
    if fidelity and fidelity.gain_that_counts is not None:
        return _ShareKept(
            value=fidelity.gain_that_counts, name="gain kept", source=f"{target}: whole model, {fidelity.measured_on}"
        )
    kept = overall_kept(report.total.values)
    if kept is None:
        return None
    where = "the layers' outputs" if report.outputs_measured else "the weights"
    source = f"{target}: no gain was measured on the whole model; --verify TEXT does"
    return _ShareKept(value=kept, name=f"share of the delta kept in {where}", source=source, is_of_delta=True)


def _past_max_kl_ratio(reports: Sequence[ReportData], most: float | None) -> str | None:
    """What is wrong with the model that is farthest off, in words; None where all are near enough."""
    if most is None:
        return None
    worst = 0.0
    line = None
    for report in reports:
        target = report.recipe["target"]
        fidelity = report.fidelity
        if fidelity is None:
            return f"--max-kl-ratio {most:g}: no KL ratio was measured ({target}); add --verify TEXT"
        # An adapter without effect has no ratio, and nothing that could be far off.
        if fidelity.kl_ratio is not None and fidelity.kl_ratio > max(most, worst):
            worst = fidelity.kl_ratio
            line = f"KL ratio {worst:.4f} is more than --max-kl-ratio {most:g} ({target}: {fidelity.measured_on})"
    return line
