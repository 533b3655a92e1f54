"""The model card: README.md with the metadata that the Hub reads, and a page about what survived."""

from __future__ import annotations

import re

from qmerge import plugins
from qmerge.planning.plan import Plan
from qmerge.recipe import CHAIN
from qmerge.report.card_metadata import card_metadata
from qmerge.report.headline import (
    TOP_NAMES,
    expert_lines,
    fidelity_remarks,
    losses,
    measured_instead,
    ratio_name,
    unmeasured_lines,
    verdict_sentence,
)
from qmerge.report.loading import loading_lines
from qmerge.schema import (
    GroupRecord,
    InputRecord,
    PairRecord,
    ReportData,
    adapter_names,
    adapter_records,
)
from qmerge.wording import DASH, fixed_or_dash

COLUMNS = (
    "kept", "output_kept", "output_noise", "predicted_kept", "noise", "cosine", "codes_changed", "relative_size",
    "rank_kept_min",
)  # fmt: skip


def model_card(report: ReportData, plan: Plan) -> str:
    """YAML metadata, and a page for people, as Markdown."""
    lines = ["---", card_metadata(report, plan).strip(), "---", "", *_page(report, plan)]
    return "\n".join(lines) + "\n"


# --- the page ----------------------------------------------------------------------------------------------------------


def _page(report: ReportData, plan: Plan) -> list[str]:
    # Names of models and modules come from files: each is escaped where it is put into the page.
    return [
        f"# {escape_markdown(adapter_names(report.inputs))} merged into {escape_markdown(report.inputs[0].name)}",
        "",
        _how_stored(report),
        "",
        "## How much of the fine-tuning survived",
        "",
        *whole_model_lines(report),
        *_warnings_section(report.warnings),
        "",
        *loading_lines(plan.target, {} if plan.is_gguf else plan.config),
        "## Layer by layer",
        "",
        f"A diagnosis: it shows where the delta was lost. {measured_instead(report)}",
        "",
        *_survival_table(report),
        "",
        *(f"- {escape_markdown(line)}" for line in expert_lines(report)),
        *(f"- {escape_markdown(plugins.help_line('metrics', name))}" for name in COLUMNS),
        *_pairs_section(report.interference),
        "",
        "## How it was made",
        "",
        f"From {_sources(report.inputs)}. The recipe is in `qmerge_recipe.yaml`. Hashes of inputs and outputs, versions and all",
        "measurements are in `qmerge.json`; `qmerge.html` shows them.",
    ]


def _how_stored(report: ReportData) -> str:
    recipe = report.recipe
    return (
        f"Merged in float32{_how_combined(report)} and stored as **{recipe['target']}** by qmerge {report.versions['qmerge']} "
        f"({report.rounding} rounding, onto the {recipe.get('merge_onto', 'dequantized')} base)."
    )


def _how_combined(report: ReportData) -> str:
    """How several adapters became one; empty for a single adapter."""
    if len(adapter_records(report.inputs)) < 2:
        return ""
    combine = report.recipe.get("combine", "linear")
    if combine == CHAIN:
        return ", one adapter after the other,"
    return f", adapters combined by {combine},"


def _survival_table(report: ReportData) -> list[str]:
    names = [name.replace("_", " ") for name in COLUMNS]
    return [
        f"| modules | weights | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
        *(_survival_row(group) for group in [*report.groups, report.total]),
    ]


def _survival_row(group: GroupRecord) -> str:
    name = "**all**" if group.name == "all" else escape_markdown(group.name)
    values = [_number(group.values[column]) for column in COLUMNS]
    return f"| {name} | {group.weights} | {' | '.join(values)} |"


def _pairs_section(pairs: list[PairRecord]) -> list[str]:
    if not pairs:
        return []
    return [
        "",
        "## How alike the adapters are",
        "",
        "Cosine of their deltas, and the share of what both change that has opposite signs (unrelated adapters: 0 and 0.5).",
        "",
        "| adapters | weights of both | cosine | sign conflict | lowest cosine |",
        "|---|---|---|---|---|",
        *(_pair_row(pair) for pair in pairs),
    ]


def _pair_row(pair: PairRecord) -> str:
    lowest = DASH
    if pair.worst:
        lowest = f"{escape_markdown(pair.worst.module)} ({_number(pair.worst.cosine)})"
    return (
        f"| {escape_markdown(pair.one)}, {escape_markdown(pair.other)} | {len(pair.modules)} | {_number(pair.cosine)} | "
        f"{_number(pair.sign_conflict)} | {lowest} |"
    )


def whole_model_lines(report: ReportData) -> list[str]:
    """The verdict and its numbers, or that the whole model was not measured."""
    fidelity = report.fidelity
    if fidelity is None:
        first, *others = unmeasured_lines(report)
        return [f"**{first}** {escape_markdown(' '.join(others))}"]
    columns = {"verdict": f"**{fidelity.verdict or DASH}**"}
    if not fidelity.has_distances:
        columns["gain kept"] = fixed_or_dash(fidelity.gain_kept, 3)
    ratio = ratio_name(fidelity)
    columns[ratio] = fixed_or_dash(fidelity.kl_ratio, 4)
    if fidelity.top1_agreement is not None:
        columns[TOP_NAMES[fidelity.judged]] = f"{fidelity.top1_agreement:.3g}"
    distance = "distance" if fidelity.has_distances else "KL"
    columns[f"{distance}, 99th percentile"] = f"{fidelity.kl_p99:.3g}"
    known = losses(fidelity)
    if known:
        for name, loss in zip(("loss of base", "unmerged", "merged"), known, strict=True):
            columns[name] = f"{loss:.4f}"
    explained = [f"- {ratio}: 0 is like the unmerged adapter model, 1 is as far off as the base"]
    explained.append(
        f"- {distance}, 99th percentile: at 99 % of all positions, the {distance} to the unmerged model is less"
    )
    if "gain kept" in columns:
        explained.insert(0, "- gain kept: share of the adapter's improvement of the loss; 1 is all")
    return [
        f"**{verdict_sentence(fidelity)}** Measured on the whole model, on {escape_markdown(fidelity.measured_on)}.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        f"| {' | '.join(columns.values())} |",
        "",
        *explained,
        *(f"- {escape_markdown(line)}" for line in fidelity_remarks(fidelity)),
    ]


def _warnings_section(warnings: list[str]) -> list[str]:
    if not warnings:
        return []
    return ["", "## Warnings", "", *(f"- {escape_markdown(line)}" for line in warnings)]


def _sources(inputs: list[InputRecord]) -> str:
    """``base owner/name at 0123…, adapter lora``."""
    sources = []
    for record in inputs:
        commit = f" at {record.commit}" if record.commit else ""
        sources.append(f"{record.role} {escape_markdown(record.name)}{commit}")
    return ", ".join(sources)


def _number(value: float | None) -> str:
    # Numbers, not percentages: the table is also read by programs.
    return DASH if value is None else f"{value:.3g}"


def escape_markdown(value: str) -> str:
    """A name from a file as Markdown text: no control characters, no markup."""
    clean = "".join(character for character in value if character.isprintable())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", clean)
