"""The report of one merge as a page, and its first screen for a notebook cell."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from markupsafe import Markup

from qmerge.report.headline import (
    TOP_NAMES,
    expert_lines,
    fidelity_remarks,
    kept_of_what,
    ratio_name,
    unmeasured_lines,
    verdict_sentence,
    way_to_measure,
)
from qmerge.report.html.document import asset, document, render
from qmerge.report.html.pictures import heat_maps, rank_data, scatter_data
from qmerge.report.html.tables import METRICS, SHARES, metric_help, metric_text, weights_table, worst_first
from qmerge.report.next_steps import merge_command, next_steps
from qmerge.schema import (
    ContinuationRecord,
    ModulePairRecord,
    ReportData,
    WeightRecord,
    adapter_names,
    kept_name,
    overall_kept,
)
from qmerge.wording import counted, exceeds_all, percent

NAME = "qmerge.html"
WORST = 3
"""Modules that the first screen names."""

ALMOST_ALL = 0.99
"""Where every module kept this share, none is named as one that kept least."""

SUMMARY_METRICS = METRICS[:6]  # a notebook cell is narrow

MARKS = {"kept": "✓", "mostly kept": "✓", "damaged": "!", "lost": "✗"}
"""Verdict → a sign, for those who do not see its colour."""


def html_report(report: ReportData) -> str:
    """The whole page."""
    drawings = {"scatter": scatter_data(report.weights), "ranks": rank_data(report)}
    return document(
        "report.html",
        **_first_words(report),
        data=drawings,
        drawings=drawings,
        expert_lines=expert_lines(report),
        has_more_than_all=any(_more_than_all(weight) for weight in report.weights),
        heat_maps=heat_maps(report.weights),
        continuations=[_compared(record) for record in report.fidelity.continuations] if report.fidelity else [],
        table=weights_table(report),
        metrics={name: metric_help(name) for name in METRICS},
        most_opposed_first=_most_opposed_first,
    )


def summary(report: ReportData) -> str:
    """The first screen, and the kinds of modules in a table, for a notebook cell."""
    return render(
        "summary.html",
        **_first_words(report),
        style=Markup(asset("first_screen.css")),
        columns=SUMMARY_METRICS,
        metric_text=metric_text,
    )


def _first_words(report: ReportData) -> dict[str, Any]:
    """What the first screen says."""
    fidelity = report.fidelity
    known = [weight for weight in worst_first(report.weights) if overall_kept(weight.values) is not None]
    return {
        "report": report,
        "adapters": adapter_names(report.inputs),
        "fidelity": fidelity,
        "mark": MARKS.get(fidelity.verdict or "", "?") if fidelity else "?",
        "sentence": verdict_sentence(fidelity) if fidelity else unmeasured_lines(report)[0],
        "remarks": fidelity_remarks(fidelity, way_to_measure(report)) if fidelity else unmeasured_lines(report)[1:2],
        "ratio_name": ratio_name,
        "top_names": TOP_NAMES,
        "overall_kept": overall_kept,
        "kept_name": kept_name,
        "kept_of_what": kept_of_what(report),
        "worst": known[:WORST],
        "all_kept": _all_kept(report.total.values, known),
        "steps": next_steps(report),
        "command": merge_command(report.recipe),
    }


def _all_kept(total: Mapping[str, float | None], worst_first: Sequence[WeightRecord]) -> str:
    """That every module kept almost all, in a sentence; empty where one did not."""
    shares = [overall_kept(weight.values) for weight in worst_first]
    if not shares or any(share is not None and share < ALMOST_ALL for share in shares):
        return ""
    return f"Every module: at least {percent(ALMOST_ALL)} {kept_name(total)}."


def _more_than_all(weight: WeightRecord) -> bool:
    """Whether the page shows a share above 100 % of this weight, which it then explains."""
    return any(exceeds_all(weight.values[name]) for name in SHARES)


def _most_opposed_first(modules: Sequence[ModulePairRecord]) -> list[ModulePairRecord]:
    """Sorted by cosine; weights without one are last."""
    return sorted(modules, key=lambda module: math.inf if module.cosine is None else module.cosine)


# --- continuations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What a model wrote.

    same       as the unmerged adapter model
    different  the first word that differs; what comes after it follows from it
    rest       what comes after it
    agreement  for how long it is the same, in words; empty for the unmerged model itself
    """

    model: str
    same: str
    different: str = ""
    rest: str = ""
    agreement: str = ""


@dataclass(frozen=True)
class Compared:
    """A prompt, and what the three models wrote after it."""

    prompt: str
    written: Sequence[Written]


def _compared(record: ContinuationRecord) -> Compared:
    return Compared(
        record.prompt,
        [
            _written("base", record.base, record.unmerged),
            Written("adapter, unmerged", record.unmerged),
            _written("merged", record.merged, record.unmerged),
        ],
    )


def _written(model: str, text: str, unmerged: str) -> Written:
    if text == unmerged:
        return Written(model, text, agreement="the same, word for word")
    own, other = (re.findall(r"\s+|\S+", words) for words in (text, unmerged))
    alike = [word for word, _ in takewhile(lambda pair: pair[0] == pair[1], zip(own, other, strict=False))]
    same = len(alike)
    # A space that differs is seen only with the word after it.
    end = same + 2 if own[same : same + 1] and own[same].isspace() else same + 1
    words = sum(not word.isspace() for word in alike)
    agreement = f"the same for {counted(words, 'word')}" if words else "differs from the first word on"
    return Written(model, "".join(alike), "".join(own[same:end]), "".join(own[end:]), agreement)
