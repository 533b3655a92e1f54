"""The model card: README.md with the metadata that the Hub reads, and what survived, as a table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from qmerge import hub, plugins
from qmerge.formats import get_format
from qmerge.planning.plan import Plan
from qmerge.recipe import CHAIN
from qmerge.schema import (
    FidelityRecord,
    GroupRecord,
    InputRecord,
    PairRecord,
    ReportData,
    adapters_named,
    survived,
)

COLUMNS = (
    "kept", "output_kept", "output_noise", "predicted_kept", "noise", "cosine", "codes_changed", "relative_size",
    "rank_kept_min",
)  # fmt: skip


def model_card(report: ReportData, plan: Plan) -> str:
    """YAML metadata (base_model, licence of the base, tags) and a page for people."""
    from huggingface_hub import ModelCardData

    base, adapter = report.inputs[0], report.inputs[1]
    names = base_models(base, adapter, plan.inputs.adapter.config)
    licence = licence_of(plan.inputs.base.folder)
    quantized = get_format(plan.target).info.quant_method
    tags = ["qmerge", "qlora", plan.target, *([quantized] if quantized else [])]
    origin: dict[str, Any] = {"base_model": names, "base_model_relation": "finetune"} if names else {}
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **licence, **origin)
    lines = ["---", data.to_yaml().strip(), "---", "", *_page(report, base, adapter)]
    return "\n".join(lines) + "\n"


def _together(report: ReportData) -> str:
    """How several adapters became one."""
    if sum(record.role == "adapter" for record in report.inputs) < 2:
        return ""
    combine = report.recipe.get("combine", "linear")
    return ", one adapter after the other," if combine == CHAIN else f", adapters combined by {combine},"


def _page(report: ReportData, base: InputRecord, adapter: InputRecord) -> list[str]:
    recipe, kept = report.recipe, _number(survived(report.total.values))
    version = report.versions["qmerge"]
    made = f"{report.rounding} rounding, onto the {recipe.get('merge_onto', 'dequantized')} base"
    sources = ", ".join(f"{r.role} {text(r.name)}{f' at {r.commit}' if r.commit else ''}" for r in report.inputs)
    warnings = ["", "## Warnings", "", *(f"- {text(line)}" for line in report.warnings)] if report.warnings else []
    return [
        f"# {text(adapters_named(report.inputs))} merged into {text(base.name)}",
        "",
        f"Merged in float32{_together(report)} and stored as **{recipe['target']}** by qmerge {version} ({made}).",
        f"**{kept}** of the fine-tuning was kept (1 is all of it, 0 is the base; each weight counted by its delta's size).",
        "",
        "## What survived",
        "",
        f"| modules | weights | {' | '.join(name.replace('_', ' ') for name in COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
        *(_row(group) for group in [*report.groups, report.total]),
        "",
        *(f"- {text(plugins.help_line('metrics', name))}" for name in COLUMNS),
        *_pairs(report.interference),
        *_judged(report.fidelity),
        *warnings,
        "",
        "## How it was made",
        "",
        f"From {sources}. The recipe is in `qmerge_recipe.yaml`; hashes of inputs and outputs, versions and all",
        "measurements are in `qmerge.json`, and to look at in `qmerge.html`.",
    ]


def _pairs(pairs: list[PairRecord]) -> list[str]:
    if not pairs:
        return []
    rows = [
        f"| {text(pair.one)}, {text(pair.other)} | {len(pair.modules)} | {_number(pair.cosine)} | "
        f"{_number(pair.sign_conflict)} | {f'{text(worst.module)} ({_number(worst.cosine)})' if worst else '–'} |"
        for pair in pairs
        for worst in [pair.worst]
    ]
    return [
        "",
        "## Between the adapters",
        "",
        "Cosine of their deltas, and the share of what both change that has opposite signs (unrelated adapters: 0 and 0.5).",
        "",
        "| adapters | weights of both | cosine | sign conflict | lowest cosine |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _judged(fidelity: FidelityRecord | None) -> list[str]:
    if fidelity is None:
        return []
    f = fidelity
    row = (
        f"| {f.loss_base:.4f} | {f.loss_unmerged:.4f} | {f.loss_merged:.4f} | {_number(f.gain_kept)} | {_number(f.kl_ratio)} "
        f"| {f.top1_agreement:.3g} | {f.kl_p99:.3g} |"
    )
    return [
        "",
        "## The whole model, on held-out text",
        "",
        f"{f.tokens} tokens of {text(f.text)}; the unmerged adapter model is the reference.",
        "",
        "| loss of base | unmerged | merged | gain kept | KL ratio | same top token | KL, 99th percentile |",
        "|---|---|---|---|---|---|---|",
        row,
    ]


def _row(group: GroupRecord) -> str:
    name = "**all**" if group.name == "all" else text(group.name)
    return f"| {name} | {group.weights} | {' | '.join(_number(group.values[column]) for column in COLUMNS)} |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def base_models(base: InputRecord, adapter: InputRecord, adapter_config: dict[str, Any]) -> list[str]:
    """Hub ids for ``base_model``: where the base came from, else what the adapter says it was trained on."""
    declared = str(adapter_config.get("base_model_name_or_path") or "")
    trained_on = declared if hub.HUB_ID.fullmatch(declared) and not Path(declared).exists() else None
    names = [base.id or trained_on, adapter.id]
    return [name for name in names if name]


def licence_of(base: Path) -> dict[str, Any]:
    """The licence fields of the base's own card, carried over; nothing when it has none."""
    from huggingface_hub import ModelCard

    path = base / "README.md"
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path).data.to_dict()
    except (ValueError, OSError, AttributeError, yaml.YAMLError):
        return {}
    return {name: data[name] for name in ("license", "license_name", "license_link") if data.get(name)}


def text(value: str) -> str:
    """A name from outside as Markdown text: no control characters, no markup."""
    clean = "".join(c for c in value if c.isprintable())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", clean)
