"""Was the adapter trained on this base, by the names that both declare? And which model is in a folder?"""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig
from safetensors.torch import load_file, save_file

from qmerge.adapters.reading.training_folder import Training, read_training
from qmerge.base_check import declared, deltas, peft_options
from qmerge.base_check.declared import GivenBase, Remark
from qmerge.base_check.model_names import is_same_model, origin_of, storage_marks
from qmerge.checkpoint.fingerprint import Fingerprint, fingerprint
from qmerge.checkpoint.scan import scan
from qmerge.safetensors_io.reader import Reader

from .. import models
from ..conftest import Cli

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
NF4 = frozenset({"nf4"})
COMMIT, OTHER = "a" * 40, "b" * 40

# --- names -----------------------------------------------------------------------------------------------------------

HUB = "/root/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/" + COMMIT


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("meta-llama/Llama-3.1-8B", "unsloth/Meta-Llama-3.1-8B-bnb-4bit"),
        ("meta-llama/Llama-3.1-8B", "unsloth/Meta-Llama-3.1-8B-unsloth-bnb-4bit"),
        ("meta-llama/Llama-3.1-8B", HUB),
        ("meta-llama/Llama-3.1-8B", "C:\\models\\Llama-3.1-8B\\"),
        ("meta-llama/Llama-3.1-8B", "./Llama-3.1-8B"),
        ("meta-llama/Llama-2-7b-hf", "unsloth/llama-2-7b-bnb-4bit"),
        ("mistralai/Mistral-7B-v0.1", "unsloth/mistral-7b-bnb-4bit"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"),
        ("neuralmagic/Llama-3.1-8B-FP8-dynamic", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_copies_and_siblings_are_one_model(one: str, other: str) -> None:
    assert is_same_model(origin_of(one), origin_of(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Llama-3-8B", "meta-llama/Llama-3.1-8B"),
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.3"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B"),
        ("", ""),
    ],
)
def test_other_models_are_not(one: str, other: str) -> None:
    assert not is_same_model(origin_of(one), origin_of(other))


def test_ids_paths_and_marks() -> None:
    assert origin_of(HUB).id == "meta-llama/Llama-3.1-8B" and origin_of(HUB).commit == COMMIT
    assert origin_of("outputs/merged").id is None and origin_of("me/checkpoint-500").id is None
    assert origin_of("me/llama-ft").id == "me/llama-ft" and origin_of("gpt2").id is None
    assert storage_marks(origin_of("unsloth/X-unsloth-bnb-4bit")) == ["bnb-4bit", "unsloth"]
    assert storage_marks(origin_of("Qwen/X-GPTQ-Int4")) == ["int4", "gptq"] and storage_marks(origin_of("Qwen/X")) == []


# --- what both say -----------------------------------------------------------------------------------------------------

HERE = GivenBase(folder=Path("/models/llama"), config=LLAMA)
ON_HUB = replace(HERE, id="meta-llama/Llama-3.1-8B", commit=COMMIT)
SIBLING = replace(HERE, id="unsloth/Meta-Llama-3.1-8B-bnb-4bit", commit=COMMIT, formats=NF4)
GPTQ = replace(HERE, id="me/Llama-3.1-8B-GPTQ", commit=COMMIT, formats=frozenset({"gptq"}))
NAMED = replace(HERE, config={**LLAMA, "_name_or_path": "meta-llama/Llama-3.1-8B-Instruct"})
LLAMA_31 = {"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}
BNB = {"base_model_name_or_path": "unsloth/Meta-Llama-3.1-8B-bnb-4bit"}
QLORA, LORA, CPT = ({"unsloth_training_method": method} for method in ("qlora", "lora", "CPT"))
CLASS = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
MISTRAL = {"base_model_class": "MistralForCausalLM", "parent_library": "transformers.models.mistral.modeling_mistral"}

FINE: dict[str, tuple[dict[str, Any], GivenBase]] = {
    "nothing said": ({}, HERE),
    "not text": ({"base_model_name_or_path": 5, "revision": [], "auto_mapping": "x"}, ON_HUB),
    "the same id": (LLAMA_31, ON_HUB),
    "in other letters": ({"base_model_name_or_path": "meta-llama/llama-3.1-8b"}, ON_HUB),
    "a path that ends in the name": ({"base_model_name_or_path": "/data/Llama-3.1-8B"}, ON_HUB),
    "a path with another name": ({"base_model_name_or_path": "/data/base"}, ON_HUB),
    "a relative path": ({"base_model_name_or_path": "outputs/merged"}, ON_HUB),
    "the cache of the Hub": ({"base_model_name_or_path": HUB}, ON_HUB),
    "an id, and a folder of any name": (LLAMA_31, HERE),
    "an id, and a folder of the cache": (LLAMA_31, replace(HERE, folder=Path(HUB))),
    "an id, and a config that names it": ({"base_model_name_or_path": "unsloth/Llama-3.1-8B-Instruct"}, NAMED),
    "two folders": ({"base_model_name_or_path": "./base"}, HERE),
    "quantized on the fly, or not": (LLAMA_31, SIBLING),
    "4-bit, the checkpoint itself": (BNB, SIBLING),
    "qlora on a 4-bit base": ({**LLAMA_31, **QLORA}, SIBLING),
    "lora on a 16-bit base": ({**LLAMA_31, **LORA}, ON_HUB),
    "CPT says nothing of bits": ({**LLAMA_31, **CPT}, ON_HUB),
    "qlora, --trained-on": ({**LLAMA_31, **QLORA}, replace(ON_HUB, training_format="nf4-dq")),
    "qlora, --trained-on none": ({**LLAMA_31, **QLORA}, replace(ON_HUB, training_format="none")),
    "lora, --trained-on": ({**LLAMA_31, **LORA}, replace(ON_HUB, training_format="nf4")),
    "qlora, --merge-onto original": ({**LLAMA_31, **QLORA}, replace(ON_HUB, merge_onto="original")),
    "lora, the original beside": ({**LLAMA_31, **LORA}, replace(SIBLING, merge_onto="original")),
    "the name and the method disagree": ({**BNB, **LORA}, ON_HUB),
    "the same revision": ({**LLAMA_31, "revision": COMMIT}, ON_HUB),
    "the same, short": ({**LLAMA_31, "revision": COMMIT[:8]}, ON_HUB),
    "the same tag": ({**LLAMA_31, "revision": "v1"}, replace(ON_HUB, revision="v1")),
    "main": ({**LLAMA_31, "revision": "main"}, ON_HUB),
    "a tag against a commit": ({**LLAMA_31, "revision": "v1"}, replace(ON_HUB, revision=COMMIT)),
    "a revision of a sibling": ({**LLAMA_31, "revision": OTHER}, SIBLING),
    "a revision, and a folder": ({**LLAMA_31, "revision": OTHER}, HERE),
    "the same class": ({"auto_mapping": CLASS}, HERE),
    "another head": ({"auto_mapping": {**CLASS, "base_model_class": "LlamaForSequenceClassification"}}, HERE),
    "a part of a multimodal model": (
        {"auto_mapping": CLASS},
        replace(HERE, config={"model_type": "llava", "text_config": {"model_type": "llama"}}),
    ),
    "code of its own": ({"auto_mapping": {"base_model_class": "X", "parent_library": "transformers_modules.x"}}, HERE),
    "a newer PEFT, no new option": ({"peft_version": "99.0"}, HERE),
    "a newer PEFT, a new option that is off": ({"peft_version": "99.0", "use_new": False}, HERE),
    "a note, of this PEFT": ({"peft_version": "0.1.0", "note": "mine"}, HERE),
    "an odd version": ({"peft_version": "main@1234", "note": "x"}, HERE),
}

WARNED: dict[str, tuple[dict[str, Any], GivenBase, str, str]] = {
    "another id": ({"base_model_name_or_path": "Qwen/Qwen3-8B"}, ON_HUB, "base", "--base Qwen/Qwen3-8B"),
    "the instruct one": (LLAMA_31, NAMED, "base", "comes from meta-llama/Llama-3.1-8B-Instruct"),
    "another cached model": ({"base_model_name_or_path": HUB}, replace(ON_HUB, id="Qwen/Qwen3-8B"), "base", "meta-llama"),
    "another commit": ({**LLAMA_31, "revision": OTHER}, ON_HUB, "revision", f"--revision {OTHER}"),
    "another cached commit": (
        {"base_model_name_or_path": HUB}, replace(ON_HUB, commit=OTHER), "revision", f"--revision {COMMIT}",
    ),
    "a tag, none asked for": ({**LLAMA_31, "revision": "v1"}, ON_HUB, "revision", "--revision v1"),
    "qlora on a 16-bit base": ({**LLAMA_31, **QLORA}, ON_HUB, "quantization", "--trained-on nf4-dq"),
    "a 4-bit name, a 16-bit base": (BNB, ON_HUB, "quantization", "--trained-on nf4-dq"),
    "an 8-bit name, a 16-bit base": (
        {"base_model_name_or_path": "me/Llama-3.1-8B-bnb-8bit"}, ON_HUB, "quantization", "--trained-on int8",
    ),
    "lora on a 4-bit base": ({**LLAMA_31, **LORA}, SIBLING, "quantization", "--merge-onto original"),
    "a GPTQ name, a 16-bit base": (
        {"base_model_name_or_path": "me/Llama-3.1-8B-GPTQ"}, ON_HUB, "quantization", "quantized checkpoint as --base",
    ),
    "a 4-bit name, a GPTQ base": (BNB, GPTQ, "quantization", "their quantization errors differ"),
    "qlora, a GPTQ base": ({**LLAMA_31, **QLORA}, GPTQ, "quantization", "their quantization errors differ"),
    "qlora, an FP4 base": (
        {**LLAMA_31, **QLORA}, replace(SIBLING, formats=frozenset({"fp4"})), "quantization", "a base in nf4 (unsloth_",
    ),
    "another architecture": ({"auto_mapping": MISTRAL}, HERE, "architecture", "MistralForCausalLM"),
    "a newer PEFT with a new option": (
        {"peft_type": "LORA", "peft_version": "99.0", "use_new": True}, HERE, "saved by", "use_new=True",
    ),
}  # fmt: skip


def compare(config: dict[str, Any], base: GivenBase) -> list[Remark]:
    """Of an adapter in a folder that holds nothing else that tells how it was trained."""
    return declared.compare(config, base, read_training(Path("/models/adapter"), config))


@pytest.mark.parametrize("case", FINE)
def test_no_false_alarm(case: str) -> None:
    config, base = FINE[case]
    assert [remark.warning for remark in compare(config, base) if remark.warning] == []


@pytest.mark.parametrize("case", WARNED)
def test_differences_are_warned_about(case: str) -> None:
    config, base, topic, part = WARNED[case]
    warned = {r.topic: r for r in compare(config, base) if r.warning}
    assert list(warned) == [topic]
    assert part in warned[topic].warning and warned[topic].verdict == "differs"


STORED = Training(source="Axolotl's config.yml", quantization="none")


@pytest.mark.parametrize(
    ("name", "base", "is_warned"),
    [
        ("meta-llama/Llama-3.1-8B", SIBLING, True),
        ("meta-llama/Llama-3.1-8B", replace(SIBLING, id=None), True),
        ("meta-llama/Llama-3.1-8B", ON_HUB, False),
        ("me/llama-in-my-4-bits", replace(SIBLING, id="me/llama-in-my-4-bits"), False),
        ("me/llama-hqq", SIBLING, False),
        ("/data/llama", SIBLING, False),
        ("openai/gpt-oss-20b", replace(SIBLING, id=None, formats=frozenset({"mxfp4"})), False),
    ],
)
def test_training_without_quantization_and_a_quantized_base(name: str, base: GivenBase, is_warned: bool) -> None:
    """Only where the base's name allows the conclusion that training loaded 16 bits."""
    remarks = {remark.topic: remark for remark in declared.compare({"base_model_name_or_path": name}, base, STORED)}
    warning = remarks["quantization"].warning
    assert bool(warning) == is_warned
    assert not is_warned or "trained on a 16-bit base (Axolotl's config.yml), but this one is nf4" in warning


def test_a_base_that_is_quantized_first() -> None:
    """It fits where it will be what training had, and is the user's own choice where not."""
    config = {**LLAMA_31, **QLORA}
    verdicts = {}
    for name in ("nf4-dq", "int8"):
        remarks = {remark.topic: remark for remark in compare(config, replace(ON_HUB, training_format=name))}
        verdicts[name] = remarks["quantization"].verdict
        assert name in remarks["quantization"].given and not remarks["quantization"].warning
    assert verdicts == {"nf4-dq": "fits", "int8": "unknown"}


def test_way_out_exists() -> None:
    """--trained-on is suggested only for formats that it supports."""
    gptq = {"base_model_name_or_path": "me/Llama-3.1-8B-GPTQ"}
    assert not any("--trained-on" in remark.warning for remark in compare(gptq, ON_HUB))


def test_options_are_those_of_peft() -> None:
    assert {field.name for field in fields(LoraConfig)} == peft_options.LORA_OPTIONS
    assert peft_options.other_options({"peft_type": "LORA", "r": 4, "unsloth_fixed": True}) == {"unsloth_fixed": True}
    oft = OFTConfig(target_modules=["q_proj"]).to_dict()
    assert peft_options.other_options({**oft, "peft_type": "OFT", "r": 4, "note": 1}) == {"note": 1}


# --- chains ------------------------------------------------------------------------------------------------------------


def of_chain(config: dict[str, Any], base: GivenBase) -> Remark:
    return compare(config, base)[0]


def test_chain(lora: Path, dense: Path, tmp_path: Path) -> None:
    config = {"base_model_name_or_path": str(lora)}
    found = of_chain(config, GivenBase(folder=dense, config=LLAMA))
    assert found.verdict == "differs" and "--combine chain" in found.warning
    both = GivenBase(folder=dense, config=LLAMA, adapters=(lora.resolve(),), in_order=True)
    assert not of_chain(config, both).warning
    assert of_chain(config, replace(both, in_order=False)).warning  # combined with ties, for example
    assert not of_chain(
        {"base_model_name_or_path": str(dense)}, GivenBase(folder=dense, config=LLAMA)
    ).warning  # a model, no adapter


def test_chain_merged_step_by_step_is_no_warning(cli: Cli, lora: Path, dense: Path, tmp_path: Path) -> None:
    first = shutil.copytree(lora, tmp_path / "first")
    second = models.adapter(models.llama(), tmp_path / "second", size=1e-3, seed=5)
    models.edit_json(second / "adapter_config.json", base_model_name_or_path=str(first))
    asked = ("--base", dense, "--adapter", first, "--target", "fp32", "--out", tmp_path / "out", "--device", "cpu")
    assert cli(*asked).code == 0
    refused = cli("plan", "--base", dense, "--adapter", second)
    assert refused.code == 3 and "--combine chain" in refused.err
    found = json.loads(cli("plan", "--base", tmp_path / "out", "--adapter", second, "--json").out)
    assert not any("on top of another one" in line for line in found["warnings"])


# --- where warnings are shown --------------------------------------------------------------------------------------------


@pytest.fixture
def unsloths(lora: Path, tmp_path: Path) -> Path:
    """An adapter that Unsloth Studio trained on a 4-bit base."""
    folder = shutil.copytree(lora, tmp_path / "unsloths")
    name = "unsloth/tiny-unsloth-bnb-4bit"
    models.edit_json(folder / "adapter_config.json", unsloth_training_method="qlora", base_model_name_or_path=name)
    return folder


def test_every_command_warns(cli: Cli, unsloths: Path, dense: Path, tmp_path: Path) -> None:
    common, part = ("--base", dense, "--adapter", unsloths), "a base in nf4 or fp4 (unsloth/tiny-unsloth-bnb-4bit)"
    asked = {
        "plan": ("plan", *common, "--target", "bf16"),
        "measure": ("measure", *common, "--target", "bf16"),
        "merge": (*common, "--target", "bf16", "--out", tmp_path / "out"),
    }  # fmt: skip
    for arguments in asked.values():
        ran = cli(*arguments)
        assert ran.code == 0 and "warning: " in ran.err and part in ran.err
    assert any(part in line for line in json.loads((tmp_path / "out/qmerge.json").read_text())["warnings"])
    assert (
        part not in cli("measure", *common, "--target", "bf16", "--trained-on", "nf4").err
    )  # the user has answered counts


def test_several_adapters_are_told_apart(cli: Cli, unsloths: Path, lora: Path, dense: Path) -> None:
    ran = cli("plan", "--base", dense, "--adapter", f"{lora}=0.5", "--adapter", f"{unsloths}=0.5", "--json")
    about = [line for line in json.loads(ran.out)["warnings"] if "unsloth-bnb-4bit" in line]
    assert len(about) == 1 and about[0].startswith("unsloths: ")


# --- inspect ---------------------------------------------------------------------------------------------------------------


def test_inspect_shows_the_base_of_training(cli: Cli, unsloths: Path, dense: Path) -> None:
    models.edit_json(unsloths / "adapter_config.json", note={"run": 7})
    found = json.loads(cli("inspect", unsloths, "--json").out)
    assert found["changes"] == {"LoRA": 14} and found["config"]["unsloth_training_method"] == "qlora"
    assert found["other_options"] == {"note": {"run": 7}} and "base" not in found
    shown = cli("inspect", unsloths, "--base", dense)
    assert shown.code == 0 and "other keys of adapter_config.json" in shown.out and "cos(D, W)" in shown.out
    assert "unsloth/tiny-unsloth-bnb-4bit" in shown.err
    assert max(map(len, shown.out.splitlines())) <= 80
    compared = json.loads(cli("inspect", unsloths, "--base", dense, "--json").out)
    topics = {remark["topic"]: remark["verdict"] for remark in compared["comparison"]}
    assert topics["quantization"] == "differs" and topics["base"] == "unknown"
    models.edit_json(unsloths / "adapter_config.json", base_model_name_or_path="me/llama")
    assert cli("inspect", unsloths, "--base", dense).err == "", (
        "Unsloth quantized it in memory, and a merge does so, too"
    )
    assert len(compared["alignments"]) == deltas.MODULES and len(compared["base"]["fingerprint"]["id"]) == 16


def test_inspect_counts_kinds_of_changes(cli: Cli, tmp_path: Path) -> None:
    dora = models.adapter(models.llama(torch.float32), tmp_path / "dora", use_dora=True)
    assert json.loads(cli("inspect", dora, "--json").out)["changes"] == {"DoRA": 14}
    more = models.adapter(
        models.llama(torch.float32, attention_bias=True), tmp_path / "more", bias="lora_only",
        target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"],
    )  # fmt: skip
    found = json.loads(cli("inspect", more, "--json").out)["changes"]
    assert found == {"LoRA": 2, "LoRA of embeddings": 1, "biases, trained": 2, "trained whole": 1}


# --- which model it is -------------------------------------------------------------------------------------------------------


def printed(folder: Path) -> Fingerprint:
    with Reader() as reader:
        return fingerprint(scan(folder, reader), reader)


def test_fingerprint_does_not_depend_on_files(dense: Path, sharded: Path, tmp_path: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 1 and printed(dense) == printed(sharded)
    again = shutil.copytree(dense, tmp_path / "again")
    tensors = load_file(dense / "model.safetensors")
    save_file(dict(reversed(tensors.items())), again / "model.safetensors", {"format": "pt", "by": "another"})
    models.edit_json(again / "config.json", transformers_version="9.9", _name_or_path="/x", use_cache=False)
    assert printed(again) == printed(dense) and printed(again).id == printed(dense).id


def test_fingerprint_sees_every_kind_of_change(dense: Path, nf4: Path, tmp_path: Path) -> None:
    one = printed(dense)
    tuned = shutil.copytree(dense, tmp_path / "tuned")
    tensors = load_file(dense / "model.safetensors")
    save_file({name: t + 1 for name, t in tensors.items()}, tuned / "model.safetensors", {"format": "pt"})
    other = printed(tuned)
    assert (other.tensors, other.config) == (one.tensors, one.config) and other.values != one.values
    configured = shutil.copytree(dense, tmp_path / "configured")
    models.edit_json(configured / "config.json", rms_norm_eps=1e-3)
    assert replace(printed(configured), config=one.config) == one and printed(configured).id != one.id
    assert printed(nf4).tensors != one.tensors


def test_fingerprint_reads_little(dense: Path) -> None:
    """At most 64 tensors are read, 1 KiB at 4 positions of each, as counted by the reader."""

    class Counting(Reader):
        total = 0

        def bytes(self, info: Any, start: int, stop: int) -> bytearray:
            self.total += stop - start
            return super().bytes(info, start, stop)

    with Counting() as reader:
        checkpoint = scan(dense, reader)
        before = reader.total
        fingerprint(checkpoint, reader)
    size = sum(weight.nbytes for weight in checkpoint.weights.values())
    assert 0 < reader.total - before <= min(2**18, size / 2)


def test_inspect_identifies_a_model(cli: Cli, nf4: Path, lora: Path, tmp_path: Path) -> None:
    asked = ("--base", nf4, "--adapter", lora, "--target", "nf4", "--rounding", "nearest", "--out", tmp_path / "out")
    assert cli(*asked, "--device", "cpu").code == 0
    made = json.loads(cli("inspect", tmp_path / "out", "--json").out)
    assert made["made_of"]["base"]["fingerprint"] == json.loads(cli("inspect", nf4, "--json").out)["fingerprint"]["id"]
    assert made["made_of"]["adapter"] == {"name": "lora", "commit": None, "fingerprint": None}
    assert made["fingerprint"]["id"] != made["made_of"]["base"]["fingerprint"]
    shown = cli("inspect", tmp_path / "out")
    assert shown.code == 0 and "made of base: nf4" in shown.out and max(map(len, shown.out.splitlines())) <= 80
    assert cli("inspect", nf4, "--base", nf4).code == 2


def test_fingerprint_is_recorded(cli: Cli, nf4: Path, dense: Path, lora: Path, tmp_path: Path) -> None:
    asked = ("--base", nf4, "--original", dense, "--merge-onto", "original", "--adapter", lora, "--target", "bf16")
    assert cli(*asked, "--out", tmp_path / "out", "--device", "cpu").code == 0
    records = {r["role"]: r["fingerprint"] for r in json.loads((tmp_path / "out/qmerge.json").read_text())["inputs"]}
    assert records["base"]["id"] == printed(nf4).id and records["original"]["values"] == printed(dense).values
    assert records["adapter"] is None
