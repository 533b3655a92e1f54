"""What survived a merge, as tables and lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from qmerge.formats import get_format
from qmerge.report.terminal.console import NotedTable, make_table, printable, safe, with_notes
from qmerge.schema import FidelityRecord, GroupRecord, PairRecord, ReportData, overall_kept
from qmerge.wording import DASH, decimal_or_dash, fixed_or_dash, percent, percent_or_dash, size_text

BITS_NOTE = ("bits", "per weight, scales included")
DELTA_NOTE = ("delta", "size of the change, relative to the weights")
KEPT_NOTE = ("kept", "share of the delta that is in the stored weights")
NOISE_NOTE = ("noise", "rounding error of the weights; 1 is as large as the delta")
CODES_NOTE = ("codes", "share of the stored numbers that changed")
GAIN_NOTE = ("gain kept", "share of what the adapter improves the loss by; 1 is all")
KL_NOTE = ("KL ratio", "0: predicts like the unmerged adapter model; 1: like the base")


def survival_table(report: ReportData) -> NotedTable:
    """What survived, by kind of module. With calibration, what survived in the layers' outputs is shown as well."""
    outputs_seen = report.outputs_measured
    predicted = _predicted_name(report.rounding)
    measured = ("kept", "output kept", "output noise") if outputs_seen else ("kept", "worst rank", "noise")
    title = f"What survived in {report.recipe['target']} ({report.rounding})"
    table = make_table(title, ("modules", "n", "delta", predicted, *measured, "codes"))
    for group in report.groups:
        table.add_row(safe(group.name), *_survival_cells(group, outputs_seen))
    table.add_section()
    table.add_row("all", *_survival_cells(report.total, outputs_seen), style="bold")
    return with_notes(table, _survival_notes(report, predicted, outputs_seen))


def _predicted_name(rounding: str) -> str:
    """The prediction is a closed form for nearest rounding, whichever rounding was used."""
    return "predicted" if rounding == "nearest" else "if nearest"


def _survival_cells(group: GroupRecord, outputs_seen: bool) -> list[str]:
    values = group.values
    cells = [
        str(group.weights),
        percent_or_dash(values["relative_size"]),
        percent_or_dash(values["predicted_kept"]),
        percent_or_dash(values["kept"]),
    ]
    if outputs_seen:
        cells += [percent_or_dash(values["output_kept"]), decimal_or_dash(values["output_noise"])]
    else:
        cells += [percent_or_dash(values["rank_kept_min"]), decimal_or_dash(values["noise"])]
    return [*cells, percent_or_dash(values["codes_changed"])]


def _survival_notes(report: ReportData, predicted: str, outputs_seen: bool) -> list[tuple[str, str]]:
    notes = [
        DELTA_NOTE,
        (predicted, "share of the delta that nearest rounding keeps, by a formula"),
        KEPT_NOTE,
    ]
    if outputs_seen:
        notes += [
            ("output kept", f"the same in the layers' outputs, on {report.calibration_text}"),
            ("output noise", "error of these outputs; 1 is as large as the delta's effect"),
        ]
    else:
        notes += [
            ("worst rank", "share kept of that rank of the delta which lost most"),
            NOISE_NOTE,
        ]
    return [*notes, CODES_NOTE]


def measured_table(reports: Sequence[ReportData]) -> NotedTable:
    """Targets side by side, measured; with the fidelity of whole models where a held-out text was given."""
    judged = any(report.fidelity for report in reports)
    fidelity_columns = ("gain kept", "KL ratio") if judged else ()
    table = make_table("What survives", ("target", "bits", "size", "kept", "noise", *fidelity_columns))
    table.add_column("rounding")
    for report in reports:
        cells = _measured_cells(report)
        if judged:
            cells += _fidelity_cells(report.fidelity)
        table.add_row(report.recipe["target"], *cells, report.rounding)
    notes = [BITS_NOTE]
    if any(report.outputs_measured for report in reports):
        notes += [
            ("kept", "share of the delta: in layers' outputs, on the calibration text,"),
            ("", "where rounding was calibrated (preserve); else in the weights"),
            ("noise", "rounding error, measured as 'kept' is; 1 is as large as the delta"),
        ]
    else:
        notes += [KEPT_NOTE, NOISE_NOTE]
    if judged:
        notes += [GAIN_NOTE, KL_NOTE]
    return with_notes(table, notes, loader_lines([report.recipe["target"] for report in reports]))


def _measured_cells(report: ReportData) -> list[str]:
    values = report.total.values
    noise = values["noise"] if values["output_kept"] is None else values["output_noise"]
    return [
        f"{report.bits_per_weight:.3g}",
        size_text(report.bytes_out),
        percent_or_dash(overall_kept(values)),
        decimal_or_dash(noise),
    ]


def _fidelity_cells(fidelity: FidelityRecord | None) -> list[str]:
    if fidelity is None:
        return [DASH, DASH]
    return [decimal_or_dash(fidelity.gain_kept), fixed_or_dash(fidelity.kl_ratio, 4)]


def fidelity_table(record: FidelityRecord) -> NotedTable:
    """The whole model on held-out text, next to the base and the unmerged adapter model."""
    title = f"The whole model, on {record.tokens} tokens of {safe(record.text)}"
    table = make_table(title, ("", "loss", "gain kept", "KL ratio", "same top token", "KL, 99th %"))
    # By definition, the base has kept nothing and the unmerged model everything.
    base = ["base", f"{record.loss_base:.4f}", "0", "1"]
    unmerged = ["unmerged", f"{record.loss_unmerged:.4f}", "1", "0"]
    merged = [
        "merged",
        f"{record.loss_merged:.4f}",
        fixed_or_dash(record.gain_kept, 3),
        fixed_or_dash(record.kl_ratio, 4),
        percent_or_dash(record.top1_agreement),
        f"{record.kl_p99:.2g}",
    ]
    for cells in (base, unmerged, merged):
        table.add_row(*cells)
    notes = [GAIN_NOTE, KL_NOTE, ("same top token", "as the unmerged model, share of all positions")]
    if record.gain_kept is None:
        return with_notes(table, notes, ["The adapter does not lower the loss of this text: there is no gain to keep."])
    return with_notes(table, notes)


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


def check_line(name: str, ok: bool, result: str) -> str:
    """``ok     hashes: 1 file``: one check of ``qmerge verify``."""
    return printable(f"{'ok    ' if ok else 'FAILED'} {name}: {result}")
