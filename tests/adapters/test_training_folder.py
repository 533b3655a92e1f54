"""What training folders of Axolotl, LLaMA-Factory, ms-swift, torchtune and Unsloth say about the base, as these tools write it."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from qmerge.adapters.reading.named import find_adapter
from qmerge.adapters.reading.training_folder import AXOLOTL_HEADING, UNKNOWN_TRAINING, read_training
from qmerge.checkpoint.model_cards import card_fields
from qmerge.checkpoint.plain_yaml import plain_mapping
from qmerge.errors import AdapterError
from qmerge.recipe import AS_STORED

AXOLOTL = """---
library_name: peft
tags:
- generated_from_trainer
---
<!-- This model card has been generated automatically. -->
<details><summary>See axolotl config</summary>

axolotl version: `0.21.0`
```yaml
base_model: NousResearch/Llama-3.2-1B
{lines}
```

</details><br>
"""
LLAMA_FACTORY = "finetuning_type: lora\nmodel_name_or_path: Qwen/Qwen3-4B\n"
SWIFT = {"model": "Qwen/Qwen3-4B", "quant_method": None, "quant_bits": None}


def axolotl(**settings: Any) -> dict[str, str]:
    return {"README.md": AXOLOTL.format(lines="\n".join(f"{name}: {json.dumps(v)}" for name, v in settings.items()))}


def swift(**settings: Any) -> dict[str, str]:
    return {"args.json": json.dumps({**SWIFT, **settings})}


def torchtune(component: str) -> dict[str, str]:
    return {"torchtune_config.yaml": f"model:\n  _component_: torchtune.models.{component}\n  lora_rank: 8\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (axolotl(adapter="qlora", load_in_4bit=True), "nf4-dq"),
        (axolotl(adapter="qlora", load_in_4bit=True, bnb_config_kwargs={"bnb_4bit_use_double_quant": False}), "nf4"),
        (axolotl(adapter="lora", load_in_8bit=True), "int8"),
        (axolotl(adapter="lora", load_in_8bit=False), AS_STORED),
        (axolotl(adapter="lora", gptq=True), None),
        (axolotl(adapter="lora", load_in_4bit=True), None),
        ({"my-run.yml": "base_model: NousResearch/Llama-3.2-1B\nadapter: qlora\nload_in_4bit: true\n"}, "nf4-dq"),
        ({"a.yaml": "a: 1\n", "config.yaml": "base_model: a/b\nadapter: lora\n"}, AS_STORED),
        ({"llamaboard_config.yaml": "top.finetuning_type: lora\ntop.quantization_bit: '4'\n"}, "nf4-dq"),
        ({"llamaboard_config.yaml": "top.quantization_bit: '8'\ntop.quantization_method: bnb\n"}, "int8"),
        ({"llamaboard_config.yaml": "top.quantization_bit: '4'\ntop.quantization_method: hqq\n"}, None),
        ({"llamaboard_config.yaml": "top.quantization_bit: none\n"}, AS_STORED),
        ({"training_args.yaml": f"{LLAMA_FACTORY}quantization_bit: 4\nquantization_method: bnb\n"}, "nf4-dq"),
        ({"training_args.yaml": f"{LLAMA_FACTORY}quantization_bit: 4\ndouble_quantization: false\n"}, "nf4"),
        ({"training_args.yaml": f"{LLAMA_FACTORY}quantization_bit: 4\nquantization_method: hqq\n"}, None),
        ({"training_args.yaml": f"{LLAMA_FACTORY}quantization_bit: 8\n"}, "int8"),
        ({"training_args.yaml": LLAMA_FACTORY}, AS_STORED),
        ({"training_args.yaml": "stage: sft\nmodel_name_or_path: Qwen/Qwen3-4B\n"}, AS_STORED),
        ({"training_args.yaml": "model_name_or_path: Qwen/Qwen3-4B\nquantization_bit: 4\n"}, "nf4-dq"),
        (swift(quant_method="bnb", quant_bits=4, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), "nf4-dq"),
        (swift(quant_method="bnb", quant_bits=4, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False), "fp4"),
        (swift(quant_method="bnb", quant_bits=4, bnb_4bit_quant_type="fp4"), "fp4-dq"),
        (swift(quant_method="bnb", quant_bits=3), None),
        (swift(quant_method="gptq"), None),
        (swift(), AS_STORED),
        (torchtune("llama3_1.qlora_llama3_1_8b"), "nf4-dq"),
        (torchtune("llama3_1.lora_llama3_1_8b"), AS_STORED),
    ],
)  # fmt: skip
def test_what_each_tool_says(files: dict[str, str], expected: str | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    training = read_training(tmp_path, {})
    assert training.quantization == expected and training.source
    checkpoint = tmp_path / "checkpoint-60"
    checkpoint.mkdir()
    assert read_training(checkpoint, {}) == training
    (tmp_path / "other").mkdir()
    assert read_training(tmp_path / "other", {}) == UNKNOWN_TRAINING, "only a checkpoint belongs to the folder above it"


def test_training_args_of_another_tool_say_nothing(tmp_path: Path) -> None:
    """TRL's options, written to a file of LLaMA-Factory's name: the base was quantized, though there is no quantization_bit."""
    (tmp_path / "training_args.yaml").write_text("model_name_or_path: Qwen/Qwen3-4B\nload_in_4bit: true\n")
    assert read_training(tmp_path, {}) == UNKNOWN_TRAINING


def test_a_yaml_file_of_another_tool_says_nothing(tmp_path: Path) -> None:
    """mergekit's config has a base_model, too."""
    (tmp_path / "merge.yml").write_text("base_model: a/b\nmerge_method: ties\nload_in_4bit: true\n")
    assert read_training(tmp_path, {}) == UNKNOWN_TRAINING


@pytest.mark.parametrize(("method", "expected"), [("qlora", "nf4-dq"), ("lora", AS_STORED), ("CPT", None)])
def test_unsloth_says_it_in_the_config(method: str, expected: str | None, tmp_path: Path) -> None:
    assert read_training(tmp_path, {"unsloth_training_method": method}).quantization == expected


def test_files_that_cannot_be_read_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them the pickle of transformers, which would run code."""
    monkeypatch.chdir(tmp_path)  # where the code would leave a file
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    (tmp_path / "args.json").write_text('{"quant_method": ')
    (tmp_path / "training_args.yaml").write_text("finetuning_type: &a [*a]\n")
    (tmp_path / "README.md").write_text(AXOLOTL.format(lines="adapter: [" * 1000))
    os.mkfifo(tmp_path / "torchtune_config.yaml")
    assert read_training(tmp_path, {}) == UNKNOWN_TRAINING
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", ["!!bool maybe", "!!timestamp x", "!!int ''", "!!int x", "!!set [a]", "{[]: 1}"])
def test_values_that_their_tags_do_not_fit_say_nothing(value: str, tmp_path: Path) -> None:
    """PyYAML raises errors of many kinds on them."""
    (tmp_path / "training_args.yaml").write_text(f"finetuning_type: lora\nlicense: {value}\n")
    (tmp_path / "README.md").write_text(f"---\nlicense: {value}\n---\n")
    assert read_training(tmp_path, {}) == UNKNOWN_TRAINING
    assert card_fields(tmp_path, ("license",)) == {}


def test_long_files_of_strangers_take_no_time(tmp_path: Path) -> None:
    """A card of headings without a config, and a number to base 60."""
    (tmp_path / "README.md").write_text(f"{AXOLOTL_HEADING}\n" * 6000)
    number = ":".join(["1"] * 60_000)
    started = time.process_time()
    assert read_training(tmp_path, {}) == UNKNOWN_TRAINING
    assert plain_mapping(f"a: {number}\nb: 12\nc: -1.5\n", 2**17) == {"a": number, "b": 12, "c": -1.5}
    assert time.process_time() - started < 1.5


def test_the_last_checkpoint_of_a_run(lora: Path, tmp_path: Path) -> None:
    """By number, not by name; of ms-swift, in the only folder of a run."""
    run = tmp_path / "output/v0-20260102-030405"
    for name in ("checkpoint-90", "checkpoint-100"):
        shutil.copytree(lora, run / name)
    assert find_adapter(str(run)).folder == find_adapter(str(tmp_path / "output")).folder == run / "checkpoint-100"
    for name in ("epoch_9", "epoch_10"):
        shutil.copytree(lora, tmp_path / "torchtune" / name)
    assert find_adapter(str(tmp_path / "torchtune")).folder.name == "epoch_10"
    shutil.copytree(run, tmp_path / "output/v1-20260103-030405")
    found = find_adapter(str(tmp_path / "output"))
    assert found.folder == (tmp_path / "output"), "several runs: none is guessed"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_of_an_adapter_is_its_folder(name: str, lora: Path) -> None:
    assert find_adapter(str(lora / name)).folder == lora.resolve()


def test_other_files_are_not(lora: Path, tmp_path: Path) -> None:
    alone = shutil.copy(lora / "adapter_model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(AdapterError, match=r"no adapter_config.json, which says what the tensors"):
        find_adapter(str(alone))
