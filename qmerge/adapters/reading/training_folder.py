"""What a training folder says about how its adapter was trained: which tool, and how the base was quantized.

    Axolotl        README.md holds the user's YAML:   adapter: qlora, load_in_4bit: true (or a .yml file of any name has it)
    LLaMA-Factory  training_args.yaml:                quantization_bit: 4 (written by its web interface)
                   llamaboard_config.yaml:            top.quantization_bit: '4' (the same)
    ms-swift       args.json:                         quant_method: bnb, quant_bits: 4
    torchtune      torchtune_config.yaml:             model: {_component_: torchtune.models.llama3.qlora_llama3_8b}
    Unsloth        adapter_config.json:               unsloth_training_method: qlora (Unsloth Studio)

Defaults are those of the tools (Axolotl ``_set_quantization_config``; LLaMA-Factory ``QuantizationArguments``; ms-swift
``QuantizeArguments``). TRL and transformers leave nothing but ``training_args.bin``, a pickle, which is never read. These files
are a help: one that cannot be read is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmerge.checkpoint.documents import read_json
from qmerge.checkpoint.model_cards import card_text
from qmerge.checkpoint.plain_yaml import plain_mapping
from qmerge.errors import AdapterError
from qmerge.hub import CHECKPOINT, is_state_of_run
from qmerge.recipe import AS_STORED, TRAINED_ON, TrainedOn

AXOLOTL_HEADING = "See axolotl config</summary>"
"""Before the config in the card that Axolotl writes."""

YAML_FENCE = re.compile(r"^```ya?ml\n", re.MULTILINE)

LLAMA_FACTORY_NAMES = ("finetuning_type", "stage", "quantization_bit")
"""Settings of LLaMA-Factory alone. All have a default (lora, sft, none), so any of them may be missing."""

LARGEST_YAML = 2**16
"""Bytes of a config in YAML that are parsed."""

MOST_YAML_FILES = 20
"""Files of a folder in which a config of Axolotl is looked for."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How an adapter was trained, as far as its folder tells.

    source        what tells, for messages: ``args.json of ms-swift``; empty where nothing does
    quantization  how the base was quantized in memory: a value of ``--trained-on``, or None where this is not known. The stored
                  base of ``AS_STORED`` may be quantized
    in_16_bits    the stored base was not quantized either
    """

    source: str = ""
    quantization: TrainedOn | None = None
    in_16_bits: bool = False


UNKNOWN_TRAINING = Training()
"""Of a folder that says nothing."""


def checkpoint_number(name: str) -> float:
    """By how far training had come, the names of checkpoints are in order."""
    match = CHECKPOINT.fullmatch(name)
    return float(match["number"]) if match and match["number"] else float("inf")


def best_checkpoint(checkpoint: Path) -> str:
    """Name of the checkpoint that did best on the evaluation set, as Trainer has noted in another one of the same run.

    Empty where this is not known, where it is this checkpoint itself, and where it was deleted.
    """
    best = _json(checkpoint / "trainer_state.json").get("best_model_checkpoint")
    name = re.split(r"[/\\]", best)[-1] if isinstance(best, str) else ""
    if not CHECKPOINT.fullmatch(name) or name == checkpoint.name:
        return ""
    return name if (checkpoint.parent / name).is_dir() else ""


def checkpoints_of(run: Path) -> list[str]:
    """Names of the checkpoints in the folder of a training run, the first one first; also of those without an adapter."""
    names = [folder.name for folder in run.glob("*/") if CHECKPOINT.fullmatch(folder.name)]
    return sorted(names, key=checkpoint_number)


def read_training(folder: Path, config: Mapping[str, Any]) -> Training:
    """How the adapter in a folder was trained.

    Args:
        folder: the adapter's own; of a state of a run, the folder of the run above it is read, too.
        config: adapter_config.json.
    """
    folders = [folder]
    # Most tools describe a run once, in its own folder.
    if is_state_of_run(folder.name):
        folders.append(folder.parent)
    for place in folders:
        for read in READERS:
            training = read(place)
            if training is not None:
                return training
    return _unsloth(config)


# --- one tool each: None where the folder is not of this tool ----------------------------------------------------------


def _axolotl_card(folder: Path) -> Training | None:
    settings = plain_mapping(_axolotl_yaml(card_text(folder)), LARGEST_YAML)
    if "base_model" not in settings:
        return None
    return _axolotl(settings, "Axolotl's config in README.md")


def _axolotl_file(folder: Path) -> Training | None:
    """The user's own config, which may have any name."""
    files = sorted([*folder.glob("*.yml"), *folder.glob("*.yaml")])
    for file in files[:MOST_YAML_FILES]:
        settings = plain_mapping(_text(file), LARGEST_YAML)
        if "base_model" in settings and "adapter" in settings:
            return _axolotl(settings, f"Axolotl's {file.name}")
    return None


def _axolotl(settings: Mapping[str, Any], source: str) -> Training:
    adapter = settings.get("adapter")
    quantization: TrainedOn | None = None
    if adapter == "qlora" and settings.get("load_in_4bit"):
        # Axolotl's own defaults, which the user's settings override.
        given = settings.get("bnb_config_kwargs")
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options |= given if isinstance(given, dict) else {}
        quantization = quantized_by_bitsandbytes(
            4, options["bnb_4bit_quant_type"], options["bnb_4bit_use_double_quant"]
        )
    elif adapter == "lora" and settings.get("load_in_8bit"):
        quantization = "int8"
    # A base that is stored as GPTQ says so itself. With lora, load_in_4bit meant fp4 in older versions, and newer ones ignore it.
    elif adapter == "lora" and not settings.get("load_in_4bit") and not settings.get("gptq"):
        quantization = AS_STORED
    return Training(source=source, quantization=quantization)


def _axolotl_yaml(card: str) -> str:
    """The config in a card of Axolotl; empty where there is none. Its time grows with the length of the card alone."""
    _, _, after_heading = card.partition(AXOLOTL_HEADING)
    fence = YAML_FENCE.search(after_heading)
    if fence is None:
        return ""
    # The end of an empty block directly follows the line of its beginning.
    start = fence.end() - 1
    end = after_heading.find("\n```", start)
    return after_heading[start:end] if end >= 0 else ""


def _llama_factory_arguments(folder: Path) -> Training | None:
    settings = plain_mapping(_text(folder / "training_args.yaml"), LARGEST_YAML)
    # Other tools' files of this name have other settings for quantization (load_in_4bit): nothing may be concluded from them.
    if settings.keys().isdisjoint(LLAMA_FACTORY_NAMES):
        return None
    return _llama_factory(settings, "training_args.yaml of LLaMA-Factory")


def _llama_factory_board(folder: Path) -> Training | None:
    """The state of its web interface: ``top.quantization_bit`` is a text, ``none`` where the option is off."""
    state = plain_mapping(_text(folder / "llamaboard_config.yaml"), LARGEST_YAML)
    if "top.quantization_bit" not in state:
        return None
    bits = str(state["top.quantization_bit"])
    settings = {
        "quantization_bit": int(bits) if bits.isdecimal() else None,
        "quantization_method": state.get("top.quantization_method", "bnb"),
    }
    return _llama_factory(settings, "llamaboard_config.yaml of LLaMA-Factory")


def _llama_factory(settings: Mapping[str, Any], source: str) -> Training:
    # Of the methods, only bitsandbytes can be repeated here.
    method = settings.get("quantization_method", "bnb")
    quantization: TrainedOn | None = None
    # The web interface leaves the option out where it is off.
    if not settings.get("quantization_bit"):
        quantization = AS_STORED
    elif method in ("bnb", "bitsandbytes"):
        quantization = quantized_by_bitsandbytes(
            settings["quantization_bit"],
            settings.get("quantization_type", "nf4"),
            settings.get("double_quantization", True),
        )
    return Training(source=source, quantization=quantization)


def _ms_swift(folder: Path) -> Training | None:
    settings = _json(folder / "args.json")
    if "quant_method" not in settings or "model" not in settings:
        return None
    quantization: TrainedOn | None = None
    # quant_bits has a value even where nothing was quantized.
    if settings["quant_method"] is None:
        quantization = AS_STORED
    elif settings["quant_method"] == "bnb":
        quantization = quantized_by_bitsandbytes(
            settings.get("quant_bits"),
            settings.get("bnb_4bit_quant_type", "nf4"),
            settings.get("bnb_4bit_use_double_quant", True),
        )
    return Training(source="args.json of ms-swift", quantization=quantization)


def _torchtune(folder: Path) -> Training | None:
    settings = plain_mapping(_text(folder / "torchtune_config.yaml"), LARGEST_YAML)
    model = settings.get("model")
    component = str(model.get("_component_", "")) if isinstance(model, dict) else ""
    if not component:
        return None
    # torchao's NF4, whose scales are quantized, too. It rounds them in another way than bitsandbytes: values differ a little.
    is_qlora = component.rpartition(".")[2].startswith("qlora_")
    return Training(source="torchtune_config.yaml", quantization="nf4-dq" if is_qlora else AS_STORED)


READERS: tuple[Callable[[Path], Training | None], ...] = (
    _axolotl_card, _llama_factory_arguments, _llama_factory_board, _ms_swift, _torchtune, _axolotl_file,
)  # fmt: skip
"""In this order: files whose names tell the tool come before those of any name."""


def _unsloth(config: Mapping[str, Any]) -> Training:
    method = str(config.get("unsloth_training_method") or "").lower()
    # Unsloth trains qlora in 4 bits of bitsandbytes with double quantization, and lora in 16 bits; other methods (CPT) do not
    # tell.
    source = f"unsloth_training_method={method}"
    if method == "qlora":
        return Training(source=source, quantization="nf4-dq")
    if method == "lora":
        return Training(source=source, quantization=AS_STORED, in_16_bits=True)
    return UNKNOWN_TRAINING


def quantized_by_bitsandbytes(bits: Any, quant_type: Any, double_quant: Any) -> TrainedOn | None:
    """The value of ``--trained-on`` for what bitsandbytes did in memory; None where there is none."""
    if bits == 8:
        return "int8"
    if bits != 4:
        return None
    # A format of 4 bits that is not in the table (another library's) has no value.
    wanted = (quant_type, bool(double_quant))
    return next((name for name, quantization in TRAINED_ON.items() if quantization == wanted), None)


def _text(path: Path) -> str:
    """A small text file; empty where it is missing, large, no regular file, or not UTF-8."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_YAML:  # a pipe would be waited for
            return ""
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        return read_json(path, AdapterError)
    except AdapterError:
        return {}
