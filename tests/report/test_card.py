"""The model card: metadata that huggingface_hub accepts, what it takes from the cards of base and adapter, how to load it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from qmerge import merge
from qmerge.checkpoint.model_cards import card_text
from qmerge.formats import MIXES, all_targets
from qmerge.formats.serving import programs_for
from qmerge.report import card_metadata
from qmerge.report.card import whole_model_lines
from qmerge.report.loading import FOLDER, loading_lines
from qmerge.schema import Judged

from ..hub_server import HubServer
from .reports import fidelity, report

BASE_CARD = {
    "license": "other", "license_name": "llama3", "license_link": "https://example.org/licence", "language": "en",
    "datasets": ["c4"], "pipeline_tag": "text-generation", "inference": False, "tags": ["bitsandbytes", "4-bit", "llama", "nf4"],
}  # fmt: skip
ADAPTER_CARD = {
    "license": "mit", "language": ["de", "en"], "datasets": ["mine", "c4"],
    "tags": ["lora", "peft", "trl", "sft", "base_model:adapter:someone/base"],
}  # fmt: skip
QMERGE = {"rounding": "nearest", "quiet": True, "device": "cpu"}


def with_card(folder: Path, copy: Path, fields: dict[str, Any]) -> Path:
    """A copy of a folder, with a card that has these fields."""
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text(f"---\n{yaml.safe_dump(fields)}---\n\n# Card\n")
    return copy


def test_what_is_carried_over(hub: HubServer, nf4: Path, lora: Path, tmp_path: Path) -> None:
    hub.add("someone/base", with_card(nf4, tmp_path / "base", BASE_CARD))
    hub.add("someone/lora", with_card(lora, tmp_path / "lora", ADAPTER_CARD))
    merge(base="someone/base", adapter="someone/lora", target="nf4", out=tmp_path / "out", **QMERGE)
    card = ModelCard.load(tmp_path / "out/README.md")
    card.validate()  # by the Hub's rules, as far as the stand-in has them
    data = card.data.to_dict()
    assert data["base_model"] == ["someone/base", "someone/lora"] and data["base_model_relation"] == "quantized"
    # The base's licence holds for what is made of it.
    assert [data[name] for name in ("license", "license_name", "license_link")] == [
        "other", "llama3", "https://example.org/licence"
    ]  # fmt: skip
    assert data["language"] == ["en", "de"] and data["datasets"] == ["c4", "mine"]
    assert data["tags"] == ["qmerge", "qlora", "nf4", "bitsandbytes", "llama", "trl", "sft"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert "inference" not in data


def test_cards_are_read_once_for_the_metadata(
    nf4: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And damaged tags of the base hide neither its licence nor the adapter's tags."""
    base = with_card(nf4, tmp_path / "base", BASE_CARD)
    card = base / "README.md"
    card.write_text(card.read_text().replace("tags:", "tags: ]"))
    adapter = with_card(lora, tmp_path / "lora", ADAPTER_CARD)
    read: list[Path] = []

    def counted(folder: Path) -> str:
        read.append(folder)
        return card_text(folder)

    monkeypatch.setattr(card_metadata, "card_text", counted)
    merge(base=base, adapter=adapter, target="nf4", out=tmp_path / "out", **QMERGE)
    assert read == [base, adapter]
    data = ModelCard.load(tmp_path / "out/README.md").data
    assert data.license == "other" and data.tags[-2:] == ["trl", "sft"] and "llama" not in data.tags


@pytest.mark.parametrize(
    ("target", "adapter", "relation"),
    [
        ("nf4", "someone/lora", "quantized"),
        ("gptq", "someone/lora", "quantized"),
        ("bf16", "someone/lora", "merge"),
        ("bf16", "local", "finetune"),
        ("nf4", "local", "finetune"),
    ],
)
def test_relation_to_the_base_model(
    hub: HubServer, nf4: Path, lora: Path, tmp_path: Path, target: str, adapter: str, relation: str
) -> None:
    """Without the adapter on the Hub, the model is no quantized version of anything that is there."""
    hub.add("someone/base", nf4)
    hub.add("someone/lora", lora)
    merge(
        base="someone/base", adapter=lora if adapter == "local" else adapter, target=target, out=tmp_path / "out", **QMERGE
    )  # fmt: skip
    data = ModelCard.load(tmp_path / "out/README.md").data
    assert data.base_model_relation == relation
    assert data.base_model == ["someone/base"] + ([] if adapter == "local" else [adapter])


def test_an_adapters_licence_where_the_base_has_none(nf4: Path, lora: Path, tmp_path: Path) -> None:
    adapter = with_card(lora, tmp_path / "lora", ADAPTER_CARD)
    merge(base=nf4, adapter=adapter, target="nf4", out=tmp_path / "out", **QMERGE)
    assert ModelCard.load(tmp_path / "out/README.md").data.license == "mit"


@pytest.mark.parametrize("target", [*all_targets(), *MIXES])
def test_every_program_that_loads_a_target_has_its_command(target: str) -> None:
    config = {"architectures": ["LlamaForCausalLM"]}
    for hub_id, model in ((None, FOLDER), ("someone/model", "someone/model")):
        text = "\n".join(loading_lines(target, config, hub_id))
        assert text.count("```") == 2 * len(programs_for(target)) > 0
        assert all(f"**{program.title}**" in text for program in programs_for(target)) and model in text
        assert ("drop" in text) == (target in ("nf4", "fp4", "int8"))


def test_models_that_write_no_text() -> None:
    text = "\n".join(loading_lines("nf4", {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}))
    assert 'pipeline("text-classification"' in text and "vllm serve" not in text
    text = "\n".join(loading_lines("bf16", {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}))
    assert "AutoModelForSeq2SeqLM" in text


@pytest.mark.parametrize(("judged", "name"), [("next tokens", "KL"), ("embeddings", "distance")])
def test_every_number_of_the_whole_model_is_explained(judged: Judged, name: str) -> None:
    shown = report(fidelity=fidelity(0.975, 0.0058).model_copy(update={"judged": judged, "top1_agreement": None}))
    lines = whole_model_lines(shown)
    (table_head,) = [line for line in lines if line.startswith("| verdict ")]
    assert f"{name}, 99th percentile" in table_head
    assert f"- {name}, 99th percentile: at 99 % of all positions, the {name} to the unmerged model is less" in lines
