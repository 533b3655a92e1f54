"""The metadata of the model card, which the Hub reads: where the model comes from, its licence, what it is found by.

huggingface_hub's ModelCardData writes and checks the same, but its import takes as long as a small merge.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from qmerge import hub, plugins
from qmerge.checkpoint.model_cards import card_text, fields_of_card
from qmerge.formats import MIXES, get_format
from qmerge.planning.plan import Plan
from qmerge.report.loading import pipeline_tag
from qmerge.schema import InputRecord, ReportData, adapter_records

LICENCE_FIELDS = ("license", "license_name", "license_link")
"""Fields of the base's own card that the output's card repeats."""

MERGED_FIELDS = ("language", "datasets", "tags")
"""Fields that are lists: the output's card has the values of base and adapters together."""

STORAGE_TAGS = frozenset(
    {
        "2-bit", "3-bit", "4-bit", "8-bit", "4bit", "8bit", "16bit", "bitsandbytes", "bnb", "compressed-tensors", "gptqmodel",
        "autoawq", "autogptq", "quantized", "safetensors", "llama-cpp", "llama.cpp", "lora", "qlora", "adapter", "peft",
        "transformers",
    }
)  # fmt: skip
"""Tags that say how an input is stored, besides names of formats: they need not hold for the output."""

MOST_TAGS = 100

ORDER = (
    "base_model", "datasets", "language", "library_name", *LICENCE_FIELDS, "pipeline_tag", "tags", "base_model_relation",
)  # fmt: skip
"""Fields of the card, in the order in which huggingface_hub writes them: so it changes nothing else when it edits the card."""


def card_metadata(report: ReportData, plan: Plan) -> str:
    """The metadata as YAML."""
    folders = [plan.inputs.base.folder, *(adapter.folder for adapter in plan.inputs.adapters)]
    cards = [card_text(folder) for folder in folders]
    quant_method = get_format(plan.target).info.quant_method
    # The Hub's button "Use this model" offers the programs that belong to this name.
    own_name = quant_method in ("mlx", "gguf")
    lists = {name: _united(cards, name) for name in MERGED_FIELDS}
    fields: dict[str, Any] = {
        "library_name": quant_method if own_name else "transformers",
        **_licence(cards),
        **_pipeline_tag(cards[0], plan),
        **lists,
        "tags": _tags(lists["tags"], plan.target, quant_method),
    }
    origins = _origin_ids(report, plan)
    if origins:
        fields |= {"base_model": origins, "base_model_relation": _relation(report, plan)}
    ordered = {name: fields[name] for name in ORDER if fields.get(name)}
    return yaml.dump(ordered, allow_unicode=True, sort_keys=False)


def _origin_ids(report: ReportData, plan: Plan) -> list[str]:
    """Hub ids for ``base_model``: those of base and adapters. A local base counts as what the adapter says it was trained on."""
    ids = []
    base = report.inputs[0]
    declared = str(plan.inputs.adapter.config.get("base_model_name_or_path") or "")
    if base.id:
        ids.append(base.id)
    # A local path must not be published, and may look like an id (``models/llama``).
    elif hub.HUB_ID.fullmatch(declared) and not Path(declared).exists():
        ids.append(declared)
    return [*ids, *_adapter_ids(report)]


def _adapter_ids(report: ReportData) -> list[str]:
    records: list[InputRecord] = adapter_records(report.inputs)
    return list(dict.fromkeys(record.id for record in records if record.id))


def _relation(report: ReportData, plan: Plan) -> str:
    """What the model is to those that ``base_model`` names: ``finetune``, ``merge`` or ``quantized``."""
    if not _adapter_ids(report):
        # Only the base is named. The model is trained further than that, however it is stored.
        return "finetune"
    return "quantized" if get_format(plan.target).info.is_quantized and not _is_16_bit(plan.target) else "merge"


def _is_16_bit(target: str) -> bool:
    return target in ("gguf_f16", "gguf_bf16")


def _licence(cards: Iterable[str]) -> dict[str, Any]:
    """The base's licence, which holds for everything that is made of it; without one, that of an adapter."""
    return next(filter(None, (fields_of_card(card, LICENCE_FIELDS) for card in cards)), {})


def _pipeline_tag(base_card: str, plan: Plan) -> dict[str, str]:
    # The base's authors know better than its config, which is silent about translation or reasoning.
    declared = fields_of_card(base_card, ("pipeline_tag",)).get("pipeline_tag")
    tag = declared if isinstance(declared, str) else pipeline_tag(plan.config)
    return {"pipeline_tag": tag} if tag else {}


def _united(cards: Iterable[str], name: str) -> list[str]:
    """The values of a field in several cards, each once."""
    values: dict[str, None] = {}
    for card in cards:
        value = fields_of_card(card, (name,)).get(name, [])
        values |= dict.fromkeys([value] if isinstance(value, str) else value)
    return list(values)


def _tags(carried: Iterable[str], target: str, quant_method: str | None) -> list[str]:
    """What people filter the Hub by: of this model, then the tags of its inputs that still hold."""
    own = ["qmerge", "qlora", target, *([quant_method] if quant_method else [])]
    stored = {*STORAGE_TAGS, *plugins.names("formats"), *MIXES}
    # The Hub makes those with a colon itself (base_model:…, region:…).
    kept = [tag for tag in carried if tag.lower() not in stored and ":" not in tag]
    return list(dict.fromkeys([*own, *kept]))[:MOST_TAGS]
