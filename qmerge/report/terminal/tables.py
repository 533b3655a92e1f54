"""What survived a merge, as tables and lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.bar import Bar
from rich.console import RenderableType
from rich.text import Text

from qmerge.formats import get_format
from qmerge.report.headline import (
    MEASURING,
    TOP_NAMES,
    expert_lines,
    fidelity_remarks,
    unmeasured_lines,
    verdict_sentence,
    way_to_measure,
)
from qmerge.report.side_by_side import almost_base_lines, measured_on_lines, without_verdict_lines
from qmerge.report.terminal.console import NotedTable, make_table, printable, safe, with_notes
from qmerge.schema import FidelityRecord, GroupRecord, Judged, PairRecord, ReportData, overall_kept
from qmerge.wording import (
    DASH,
    decimal_or_dash,
    exceeds_all,
    fixed_or_dash,
    kept_beside,
    percent,
    percent_or_dash,
    percent_with_tenths,
    share,
    share_or_dash,
    size_text,
)

BITS_NOTE = ("bits", "per weight, scales included")
DELTA_NOTE = ("delta", "size of the change, relative to the weights")
KEPT_NOTE = ("kept", "share of the delta that is in the stored weights")
NOISE_NOTE = ("noise", "rounding error of the weights; 1 is as large as the delta")
OUTPUT_NOISE_NOTE = ("output noise", "error of these outputs; 1 is as large as the delta's effect")
GAIN_NOTE = ("gain kept", "share of what the adapter improves the loss by; 1 is all")
KL_TAIL_NOTE = ("KL, 99th %", "at 99 % of all positions, KL to the unmerged model is less")
MOST_KINDS = 9
"""Kinds of modules in a table; one more row is about all of them."""

BAR_WIDTH = 8
"""Characters."""

SHARES = ("kept", "output_kept", "predicted_kept", "rank_kept_min")
KL_NOTE = ("KL ratio", "0: predicts like the unmerged adapter model; 1: like the base")


def report_tables(report: ReportData, measuring: str = MEASURING) -> list[RenderableType]:
    """What became of the whole model, or that this was not measured; then the diagnosis, by kind of module.

    Args:
        measuring: the command that measures the whole model.
    """
    if report.fidelity is None:
        head: RenderableType = Text("\n".join(map(printable, unmeasured_lines(report, measuring))))
    else:
        head = fidelity_table(report.fidelity, way_to_measure(report, measuring))
    return [head, survival_table(report)]


def survival_table(report: ReportData) -> NotedTable:
    """What survived, by kind of module: at most ``MOST_KINDS``, those that keep least. With calibration, what survived in the
    layers' outputs is shown as well."""
    outputs_seen = report.outputs_measured
    predicted = _predicted_name(report.rounding)
    title = f"Layer by layer: what survived in {report.recipe['target']} ({report.rounding})"
    # The bar is that of the share before it, which matters most.
    measured = ("kept", "output kept", "", "output noise") if outputs_seen else ("kept", "", "worst rank", "noise")
    table = make_table(title, ("modules", "n", "delta", predicted, *measured))
    groups = _worst_kinds(report)
    for group in groups:
        table.add_row(safe(group.name), *_survival_cells(group, outputs_seen))
    table.add_section()
    table.add_row("all", *_survival_cells(report.total, outputs_seen), style="bold")
    shown = [group.values[name] for group in [*groups, report.total] for name in SHARES]
    lines = [*above_all_lines(shown), *(f"  {safe(line)}" for line in expert_lines(report))]
    # Said in words, so that nobody takes the shown kinds for all of them.
    left_out = len(report.groups) - len(groups)
    if left_out:
        page = "qmerge.html" if report.is_written else "the page of --html FILE"
        lines.insert(0, f"  {left_out} more kinds of modules keep more; {page} has all")
    return with_notes(table, _survival_notes(report, predicted, outputs_seen), lines)


def _worst_kinds(report: ReportData) -> list[GroupRecord]:
    """The kinds of modules in the order of the model; where there are too many, the worst ones, worst first."""
    if len(report.groups) <= MOST_KINDS:
        return report.groups
    return sorted(report.groups, key=_agreement)[:MOST_KINDS]


def _agreement(group: GroupRecord) -> float:
    """1 for a delta that is just as it was; as much less for a share above 1 as for one below."""
    kept = overall_kept(group.values)
    return 1.0 if kept is None else min(kept, 2 - kept)


def _predicted_name(rounding: str) -> str:
    """The prediction is a closed form for nearest rounding, whichever rounding was used."""
    return "predicted" if rounding == "nearest" else "if nearest"


def _survival_cells(group: GroupRecord, outputs_seen: bool) -> list[RenderableType]:
    values = group.values
    cells: list[RenderableType] = [
        str(group.weights),
        percent_or_dash(values["relative_size"]),
        share_or_dash(values["predicted_kept"]),
        share_or_dash(values["kept"]),
    ]
    if outputs_seen:
        share_kept = values["output_kept"]
        return [*cells, share_or_dash(share_kept), _bar(share_kept), decimal_or_dash(values["output_noise"])]
    bar = _bar(values["kept"])
    return [*cells, bar, share_or_dash(values["rank_kept_min"]), decimal_or_dash(values["noise"])]


def _bar(share_kept: float | None) -> Bar:
    """A share from 0 to 1 as a bar; more than all is a full one."""
    return Bar(size=1.0, begin=0.0, end=min(max(share_kept or 0.0, 0.0), 1.0), width=BAR_WIDTH)


def _survival_notes(report: ReportData, predicted: str, outputs_seen: bool) -> list[tuple[str, str]]:
    notes = [
        DELTA_NOTE,
        (predicted, "share of the delta that nearest rounding keeps, by a formula"),
        KEPT_NOTE,
    ]
    if outputs_seen:
        notes += [
            ("output kept", f"the same in the layers' outputs, on {report.calibration_text}"),
            OUTPUT_NOISE_NOTE,
        ]
    else:
        notes += [
            ("worst rank", "share kept of that rank of the delta which lost most"),
            NOISE_NOTE,
        ]
    return notes


def above_all_lines(shares: Iterable[float | None]) -> list[str]:
    """Explains shares above 100 %, where there are any, by the largest one."""
    largest = max((value for value in shares if value is not None), default=0.0)
    if not exceeds_all(largest):
        return []
    return [f"  {share(largest)}: moved {largest:.2f} times as far as the adapter moves it; not better than 100 %"]


def measured_table(reports: Sequence[ReportData], names: Sequence[str] = ()) -> NotedTable:
    """Targets side by side, measured; whole models first, where they were measured.

    Args:
        names: of merges, one for each report; without, the targets are the names.
    """
    judged = any(report.fidelity for report in reports)
    outputs_seen = any(report.outputs_measured for report in reports)
    first = ["verdict", "gain\nkept", "KL\nratio"] if judged else []
    last = ["kept"] if judged else ["noise", "kept"]
    if outputs_seen:
        last += [f"output\n{name}" for name in last]
    has_bits = not (judged and outputs_seen)  # at most nine columns fit into 80 characters
    heading = "merge" if names else "target"
    table = make_table("What survives", (heading, *first, *(["bits"] if has_bits else []), "size", *last))
    table.add_column("rounding")
    table.columns[0].overflow = "fold"
    if judged:
        table.columns[1].no_wrap = True  # two words
    called = names or [report.recipe["target"] for report in reports]
    for report, name in zip(reports, called, strict=True):
        cells = [safe(name)]
        if judged:
            cells += _fidelity_cells(report.fidelity)
        if has_bits:
            cells.append(f"{report.bits_per_weight:.3g}")
        cells.append(size_text(report.bytes_out))
        cells += _shares_cells(report, judged=judged, prefix="")
        if outputs_seen:
            cells += _shares_cells(report, judged=judged, prefix="output_")
        table.add_row(*cells, report.rounding)
    lines = [
        *above_all_lines(report.total.values[name] for report in reports for name in ("kept", "output_kept")),
        *map(printable, almost_base_lines(reports, called)),
        *_measured_on_lines(reports, called),
        *loader_lines(list(dict.fromkeys(report.recipe["target"] for report in reports))),
    ]
    return with_notes(table, _measured_notes(judged, outputs_seen), lines)


def _measured_notes(judged: bool, outputs_seen: bool) -> list[tuple[str, str]]:
    outputs = [("output kept", "the same in the layers' outputs, on the calibration text")] if outputs_seen else []
    if judged:
        bits = [] if outputs_seen else [BITS_NOTE]
        return [GAIN_NOTE, KL_NOTE, *bits, KEPT_NOTE, *outputs]
    noise = [OUTPUT_NOISE_NOTE] if outputs_seen else []
    return [BITS_NOTE, NOISE_NOTE, KEPT_NOTE, *outputs, *noise, ("", "(75 %): the noise is larger")]


def _shares_cells(report: ReportData, *, judged: bool, prefix: str) -> list[str]:
    """The share kept; of models that were not judged, also the noise, which it does not show.

    Args:
        prefix: empty for the stored weights, ``output_`` for the layers' outputs.
    """
    kept, noise = report.total.values[f"{prefix}kept"], report.total.values[f"{prefix}noise"]
    return [share_or_dash(kept)] if judged else [decimal_or_dash(noise), kept_beside(noise, kept)]


def _measured_on_lines(reports: Sequence[ReportData], names: Sequence[str]) -> list[str]:
    """What the whole models were measured on, and which were not measured."""
    return [printable(line) for line in [*measured_on_lines(reports, names), *without_verdict_lines(reports, names)]]


def _fidelity_cells(fidelity: FidelityRecord | None) -> list[str]:
    if fidelity is None:
        return [DASH, DASH, DASH]
    return [fidelity.verdict or DASH, fixed_or_dash(fidelity.gain_kept, 3), fixed_or_dash(fidelity.kl_ratio, 4)]


def fidelity_table(record: FidelityRecord, measuring: str = MEASURING) -> NotedTable:
    """What became of the fine-tuning: the whole model, next to the base and the unmerged adapter model."""
    title = f"{verdict_sentence(record)}\nMeasured on {safe(record.measured_on)}"
    if record.has_distances:
        return _distance_table(record, title, measuring)
    top = TOP_NAMES[record.judged]
    table = make_table(title, ("", "gain kept", "KL ratio", top, "KL, 99th %", "loss"))
    merged = [
        "merged",
        fixed_or_dash(record.gain_kept, 3),
        fixed_or_dash(record.kl_ratio, 4),
        percent_with_tenths(record.top1_agreement or 0.0),
        f"{record.kl_p99:.2g}",
        fixed_or_dash(record.loss_merged, 4),
    ]
    # By definition, the base has kept nothing and the unmerged model everything.
    no_gain, all_gain = ("0", "1") if record.gain_kept is not None else (DASH, DASH)
    base = ["base", no_gain, "1", "", "", fixed_or_dash(record.loss_base, 4)]
    unmerged = ["unmerged", all_gain, "0", "", "", fixed_or_dash(record.loss_unmerged, 4)]
    table.add_row(*merged, style="bold")
    for cells in (base, unmerged):
        table.add_row(*cells)
    notes = [GAIN_NOTE, KL_NOTE, (top, "as the unmerged model, share of all positions"), KL_TAIL_NOTE]
    return with_notes(table, notes, list(map(printable, fidelity_remarks(record, measuring))))


def _distance_table(record: FidelityRecord, title: str, measuring: str) -> NotedTable:
    """The same for outputs that are no probabilities: how far they are from those of the unmerged model."""
    table = make_table(title, ("", "distance ratio", "distance", "largest 1 %"))
    table.add_row(
        "merged", fixed_or_dash(record.kl_ratio, 4), f"{record.kl_merged:.3g}", f"{record.kl_p99:.2g}", style="bold"
    )
    table.add_row("base", "1", f"{record.kl_base:.3g}", "")
    table.add_row("unmerged", "0", "0", "")
    notes = [
        ("distance ratio", "0: computes like the unmerged adapter model; 1: as far off as the base"),
        ("distance", DISTANCES[record.judged]),
    ]
    return with_notes(table, notes, list(map(printable, fidelity_remarks(record, measuring))))


DISTANCES: dict[Judged, str] = {
    "embeddings": "1 - cosine, to the unmerged model's embedding of the same text",
    "hidden states": "half the square of the relative distance to the unmerged model's",
    "scores": "half the square of the relative distance to the unmerged model's",
}
"""What was judged → the distance, in words."""


def loader_lines(targets: Sequence[str]) -> list[str]:
    """Which programs load these targets, one line for each set of loaders."""
    targets_of_loaders: dict[str, list[str]] = {}
    for target in targets:
        targets_of_loaders.setdefault(get_format(target).info.loaders, []).append(target)
    return [f"{', '.join(names)}: loaded by {loaders}" for loaders, names in targets_of_loaders.items()]


def extra_lines(report: ReportData) -> list[str]:
    """How alike several adapters are, which weights were left dense, and the residual LoRA: one line each."""
    lines = [pair_line(pair) for pair in report.interference]
    if report.promoted:
        lines.append(f"Left unquantized, because they kept least: {', '.join(report.promoted)}.")
    if report.residual:
        residual = report.residual
        lines.append(
            f"residual/: a LoRA of rank {residual.rank} ({size_text(residual.bytes)}) that compensates for the rounding error, "
            f"to be loaded with the model. With it, output noise is {residual.noise_with:.3f} deltas instead of "
            f"{residual.noise_without:.3f}."
        )
    return [printable(line) for line in lines]


def pair_line(pair: PairRecord) -> str:
    """``math and chat: cosine 0.01, opposite signs in 49 % of what both change; lowest cosine -0.08, in …q_proj``."""
    line = f"{pair.one} and {pair.other}: cosine {fixed_or_dash(pair.cosine, 2)}"
    if pair.sign_conflict is not None:
        line += f", opposite signs in {percent(pair.sign_conflict)} of what both change"
    worst = pair.worst
    if worst:
        line += f"; lowest cosine {worst.cosine:.2f}, in {worst.module}"
    return line
